"""Each guard of `vmap.py` has a test here that fails where it is deleted."""

from functools import partial

import pytest
import torch
from small_layers import F64, each, spied, weights
from torch import Tensor
from torch.autograd import forward_ad
from torch.func import grad, jacrev, jvp, vmap

from rnnfast.functional import gru, lstm

# torch's forward mode scripts its own decompositions when it is first used.
pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated:DeprecationWarning")


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


# Which members run together


def test_members_with_lengths_of_their_own():
    w, x, lengths = weights(gru), torch.randn(4, 2, 2, **F64), torch.tensor([[1, 4], [0, 2], [3, 3]])

    def run(lengths):
        return gru(x, w, lengths=lengths)[0]

    def gradient(lengths):
        return jacrev(lambda x: gru(x, w, lengths=lengths)[0].sin().sum())(x)

    for function in (run, gradient):
        torch.testing.assert_close(vmap(function)(lengths), each(function, 3, lengths))


@pytest.mark.parametrize("differentiated", [False, True])
def test_members_with_weights_and_resets_of_their_own(differentiated):
    w, x, resets = weights(gru, 3), torch.randn(4, 2, 2, **F64), torch.rand(3, 4, 2) < 0.5

    def run(resets, *w):
        return gru(x, list(w), resets=resets)[0].sin().sum()

    function = grad(run, (1, 2)) if differentiated else run
    torch.testing.assert_close(vmap(function)(resets, *w), each(function, 3, resets, *w))


@pytest.mark.parametrize("own_weights", [False, True])
def test_states_that_were_not_asked_for_have_no_members(own_weights):
    w, x = weights(lstm, *(3,) * own_weights), torch.randn(3, 4, 2, 2, **F64)
    found = vmap(lambda x, w: lstm(x, w)[0], (0, 0 if own_weights else None))(x, w)
    expected = [lstm(x[n], [each[n] for each in w] if own_weights else w)[0] for n in range(3)]
    torch.testing.assert_close(found, torch.stack(expected))


def test_a_shared_input_has_a_gradient_of_each_member():
    w, x = weights(gru, 3), torch.randn(4, 2, 2, **F64)
    gradient = grad(lambda x, *w: gru(x, list(w))[0].sin().sum())
    torch.testing.assert_close(vmap(partial(gradient, x))(*w), each(partial(gradient, x), 3, *w))


# Gradients of samples


def loss(w_hh: Tensor, x: Tensor, w: list[Tensor]) -> Tensor:
    return gru(x[:, None], [w[0], w_hh, *w[2:]])[0].sin().sum()


@pytest.mark.parametrize("samples", [1, 3])
def test_gradients_of_samples_of_samples(samples):
    w, x = weights(gru), torch.randn(2, samples, 4, 2, **F64)
    gradient = grad(partial(loss, w=w))
    found = vmap(vmap(gradient, (None, 0)), (None, 0))(w[1], x)
    expected = torch.stack([torch.stack([gradient(w[1], sample) for sample in row]) for row in x])
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("by", ["weights", "x"])
@pytest.mark.parametrize("nested", [1, 2])
def test_autograd_over_gradients_of_samples(nested, by):
    """Below a map a tensor does not say itself that it wants a gradient."""
    w, x, results = weights(gru), torch.randn(2, 2, 4, 2, **F64), []
    gradient = grad(partial(loss, w=w))

    def mapped(p, x):
        once = vmap(gradient, (None, 0))
        return vmap(once, (None, 0))(p, x) if nested == 2 else once(p, x[0])

    def plain(p, x):
        found = torch.stack([torch.stack([gradient(p, sample) for sample in row]) for row in x])
        return found if nested == 2 else found[0]

    for function in (mapped, plain):
        leaves = [each.clone().requires_grad_(name == by) for name, each in (("weights", w[1]), ("x", x))]
        leaf = leaves[by == "x"]
        results.append(torch.autograd.grad(function(*leaves).sin().sum(), leaf)[0])
    torch.testing.assert_close(*results)


def test_forward_mode_over_gradients_of_samples():
    w, x = weights(gru), torch.randn(3, 4, 2, **F64)
    dp, gradient = torch.randn_like(w[1]), grad(partial(loss, w=w))
    expected = jvp(lambda p: torch.stack([gradient(p, s) for s in x]), (w[1],), (dp,))[1]
    torch.testing.assert_close(jvp(lambda p: vmap(gradient, (None, 0))(p, x), (w[1],), (dp,))[1], expected)
    with forward_ad.dual_level():
        found = vmap(gradient, (None, 0))(forward_ad.make_dual(w[1], dp), x)
        torch.testing.assert_close(forward_ad.unpack_dual(found).tangent, expected)


def test_no_groups_where_weights_want_no_gradient(monkeypatch):
    calls, w = spied(monkeypatch, "layer_backward"), weights(gru)
    vmap(grad(lambda x: gru(x, w)[0].sum()))(torch.randn(3, 4, 2, 2, **F64))
    assert [call[5] for call in calls] == [1]


def test_incoming_gradients_of_torchs_older_vmap():
    w, x = weights(gru), torch.randn(4, 2, 2, **F64, requires_grad=True)
    output, incoming = gru(x, w)[0], torch.randn(3, 4, 2, 3, **F64)
    found = torch.autograd.grad(output, x, incoming, is_grads_batched=True, retain_graph=True)[0]
    expected = [torch.autograd.grad(output, x, g, retain_graph=True)[0] for g in incoming]
    torch.testing.assert_close(found, torch.stack(expected))
