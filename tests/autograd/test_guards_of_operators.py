"""Each guard that the operators meet under autograd has a test here that fails where it is deleted."""

import pytest
import torch
from small_layers import F64, weights
from torch.func import grad, hessian, jvp, vmap

from rnnfast.functional import gru, lstm
from rnnfast.gradients import add_tangents

# torch's forward mode scripts its own decompositions when it is first used.
pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated:DeprecationWarning")


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


PRESENT = [True] * 4 + [False] * 4


def operator(x, w, save=False):
    tensors = [x, *[x.new_zeros(1, 2, 3)] * 2, *w]
    return torch.ops.rnnfast.layer("numba", "lstm", [False], PRESENT, save, False, tensors)


def test_the_operator_under_autograd():
    w, x = [each.requires_grad_() for each in weights(lstm)], torch.randn(4, 2, 2, **F64)
    found = operator(x, w)
    assert found[1].shape == (0,)
    assert len(found) == 4
    assert operator(x, w, save=True)[1].shape == (4, 2, 1, 3)
    for a, b in zip(torch.autograd.grad(found[0].sum(), w), torch.autograd.grad(lstm(x, w)[0].sum(), w), strict=True):
        torch.testing.assert_close(a, b)
    with torch.no_grad():
        assert not operator(x, w)[0].requires_grad


def test_the_operator_refuses_nested_forward_mode():
    w, x = weights(lstm), torch.randn(4, 2, 2, **F64)
    once = lambda x: jvp(lambda x: operator(x, w)[0], (x,), (x,))[1]  # noqa: E731
    torch.testing.assert_close(once(x), jvp(lambda x: lstm(x, w)[0].unsqueeze(2), (x,), (x,))[1])
    with pytest.raises(RuntimeError, match="nested forward-mode"):
        jvp(once, (x,), (x,))


def nested(function, v, dv):
    """Return second derivatives by v, by nestings of transforms."""
    yield jvp(grad(function), (v,), (dv,))[1]
    yield grad(lambda v: grad(function)(v).sin().sum())(v)
    yield grad(lambda v: jvp(function, (v,), (dv,))[1])(v)
    yield vmap(grad(lambda v: grad(function)(v).sin().sum()))(torch.stack([v, dv]))
    yield hessian(function)(v)


@pytest.mark.parametrize("by", ["x", "weights"])
def test_the_operator_under_nested_transforms(by):
    """That is how compiled graphs meet them; the outer derivative lost what went through the inner one's results."""
    w, x = weights(lstm), torch.randn(4, 2, 2, **F64)
    v = x if by == "x" else w[1]

    def by_operator(v):
        given = (v, w) if by == "x" else (x, [w[0], v, *w[2:]])
        return operator(*given)[0].sin().sum()

    def by_layer(v):
        given = (v, w) if by == "x" else (x, [w[0], v, *w[2:]])
        return lstm(*given)[0].sin().sum()

    dv = torch.randn_like(v)
    for found, expected in zip(nested(by_operator, v, dv), nested(by_layer, v, dv), strict=True):
        torch.testing.assert_close(found, expected)


@pytest.mark.long
@pytest.mark.parametrize("cell", [gru, lstm])
def test_nested_transforms_in_a_compiled_graph(cell):
    w, x = weights(cell), torch.randn(4, 2, 2, **F64)

    def derivatives(v):
        def loss(v, x):
            return cell(x, [w[0], v, *w[2:]])[0].sin().sum()

        samples = jvp(lambda v: vmap(grad(loss), (None, 0))(v, torch.stack([x, x.cos()])), (v,), (v.cos(),))[1]
        return samples, *nested(lambda v: loss(v, x), v, v.cos())

    found = torch.compile(derivatives, backend="aot_eager", fullgraph=True)(w[1])
    for a, b in zip(found, derivatives(w[1]), strict=True):
        torch.testing.assert_close(a, b)


def test_gradients_in_groups_have_no_derivative():
    w = [each.requires_grad_() for each in weights(gru)]
    x, h = torch.randn(4, 2, 2, **F64), torch.zeros(1, 2, 3, **F64)
    constants, tensors = ("numba", "gru", [False], PRESENT), [x, h, *w]
    results = torch.ops.rnnfast.layer(*constants, True, False, tensors)
    states, saved = [results[0].detach()], [results[2].detach()]
    gradients, needs = [states[0].new_ones(4, 2, 1, 3), None], [False, False, True, False]
    grads = torch.ops.rnnfast.layer_backward(*constants, needs, 2, tensors, states, saved, gradients)
    assert grads[2].shape == (2, 9, 2)
    with pytest.raises(RuntimeError, match="gradients in groups"):
        torch.autograd.grad(grads[3].sum(), w)
    with pytest.raises(RuntimeError, match="gradients in groups"):
        add_tangents(torch.zeros(2, 9, 2), torch.zeros(9, 2))
