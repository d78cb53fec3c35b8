"""Guards of derivatives that few calls meet: each test fails where its guard is deleted."""

import pytest
import torch
from recurrent_layers import make as make_declared
from torch.autograd import forward_ad
from torch.func import grad, jvp, vmap
from torch.nn.utils.rnn import pack_padded_sequence
from torch_releases import needs_saved_data

import rnnfast
from rnnfast import _torch, gradients
from rnnfast.backends.dispatch import load
from rnnfast.functional import gru

pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated:DeprecationWarning")
F64 = {"dtype": torch.float64}


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def weights(*members: int) -> list[torch.Tensor]:
    return [torch.randn(*members, *size, **F64) for size in ((9, 2), (9, 3), (9,), (9,))]


class Ones(torch.autograd.Function):
    """Its gradient is the same whatever comes in."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, g):
        return torch.ones(1, 2, 3, **F64)


def test_one_gradient_for_all_members_of_torchs_older_vmap():
    w, x = weights(), torch.randn(4, 2, 2, **F64, requires_grad=True)
    output, h = gru(x, w)
    results, incoming = (output, Ones.apply(h)), (torch.randn(5, 4, 2, 3, **F64), torch.randn(5, 1, 2, 3, **F64))
    (found,) = torch.autograd.grad(results, x, incoming, is_grads_batched=True, retain_graph=True)
    one_by_one = [torch.autograd.grad((output, h), x, (g, torch.ones_like(h)), retain_graph=True) for g in incoming[0]]
    torch.testing.assert_close(found, torch.stack([each for (each,) in one_by_one]))


def test_members_without_rows():
    w = weights()
    assert vmap(lambda x: gru(x, w)[0])(torch.randn(3, 4, 0, 2, **F64)).shape == (3, 4, 0, 3)


def test_members_run_one_by_one_where_a_backend_takes_no_ensembles(monkeypatch):
    w, x, calls, backend = weights(3), torch.randn(4, 2, 2, **F64), [], load("numba")
    run = backend.forward
    together = vmap(lambda *w: gru(x, list(w))[0])(*w)
    monkeypatch.setattr(backend, "TAKES_ENSEMBLES", False)
    monkeypatch.setattr(backend, "forward", lambda layer, **options: calls.append(layer) or run(layer, **options))
    torch.testing.assert_close(vmap(lambda *w: gru(x, list(w))[0])(*w), together)
    assert [len(layer.reverse) for layer in calls] == [1, 1, 1]


def test_an_absent_gradient_below_a_map():
    w, x, h = weights(), torch.randn(4, 2, 2, **F64), torch.zeros(1, 2, 3, **F64)
    constants = ("numba", "gru", [False], [True] * 4 + [False] * 4)
    output, _, saved = torch.ops.rnnfast.layer(*constants, True, True, [x, h, *w])

    def gradient(g):
        needs = [True, False, False, False]
        return torch.ops.rnnfast.layer_backward(*constants, needs, 1, [x, h, *w], [output], [saved], [g, None])[0]

    incoming = torch.randn(2, 3, *output.shape, **F64)
    expected = torch.stack([torch.stack([gradient(g) for g in row]) for row in incoming])
    torch.testing.assert_close(vmap(vmap(gradient))(incoming), expected)


# What was changed in place, of calls that are not on the fast path.


def changed(change, create_graph: bool = False, x_grad: bool = False) -> list[torch.Tensor]:
    """Change tensors between a call with lengths and backward; return the gradients."""
    torch.manual_seed(0)
    layer = rnnfast.GRU(2, 3, **F64)
    x = torch.randn(4, 2, 2, **F64, requires_grad=x_grad)
    output, _ = layer(x, lengths=torch.tensor([4, 2]))
    with torch.no_grad():
        change(layer, output)
    wanted = [layer.weight_hh_l0, *([x] if x_grad else [])]
    return torch.autograd.grad(output, wanted, torch.ones_like(output), create_graph=create_graph)


CHANGES = {
    "bias": (lambda layer, y: layer.bias_hh_l0.add_(1), {}),
    "input weight": (lambda layer, y: layer.weight_ih_l0.add_(1), {}),
    "output": (lambda layer, y: y.mul_(2), {}),
    "output, create_graph": (lambda layer, y: y.mul_(2), {"create_graph": True}),
}
REFUSED = {
    "weight": (lambda layer, y: layer.weight_hh_l0.add_(1), {}),
    "input weight": (lambda layer, y: layer.weight_ih_l0.add_(1), {"x_grad": True}),
    "bias, create_graph": (lambda layer, y: layer.bias_hh_l0.add_(1), {"create_graph": True}),
    "weight and output": (lambda layer, y: (layer.weight_hh_l0.add_(1), y.mul_(2)), {}),
}


@needs_saved_data
@pytest.mark.parametrize(("change", "options"), CHANGES.values(), ids=CHANGES)
def test_what_may_change_before_backward(change, options):
    expected = changed(lambda layer, y: None, **options)
    torch.testing.assert_close(changed(change, **options), expected)


@needs_saved_data
@pytest.mark.parametrize(("change", "options"), REFUSED.values(), ids=REFUSED)
def test_what_may_not(change, options):
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        changed(change, **options)


@needs_saved_data
@pytest.mark.parametrize("create_graph", [False, True])
def test_a_weight_and_the_output_on_the_fast_path(create_graph):
    """Computed again from the changed weight, the output would be another one."""
    layer, x = rnnfast.GRU(2, 3), torch.randn(4, 2, 2)
    for _ in range(4):
        output, _ = layer(x)
        with torch.no_grad():
            layer.weight_hh_l0.add_(1)
            output.mul_(2)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            output.sum().backward(create_graph=create_graph)
        output, _ = layer(x)
        with torch.no_grad():
            layer.bias_hh_l0.add_(1)
        if create_graph:
            with pytest.raises(RuntimeError, match="modified by an inplace operation"):
                torch.autograd.grad(output.sum(), layer.weight_hh_l0, create_graph=True)
        else:
            torch.autograd.grad(output.sum(), layer.weight_hh_l0)


@needs_saved_data
def test_a_weight_of_other_strides_and_a_changed_output():
    """The output cannot be computed again from addresses of the weight as it was."""
    layer, x = rnnfast.GRU(2, 3), torch.randn(4, 2, 2)
    for _ in range(3):
        output, _ = layer(x)
        layer.weight_hh_l0.data = layer.weight_hh_l0.data.mT.contiguous().mT
        with torch.no_grad():
            output.mul_(2)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            output.sum().backward()
        layer.weight_hh_l0.data = layer.weight_hh_l0.data.contiguous()


# Forward mode.


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_tangents_in_half_precision(dtype):
    """There are no kernels for them."""
    w, x, dx = weights(), *torch.randn(2, 4, 2, 2, **F64)

    def run(x, w):
        return gru(x, w)[0].sin().sum()

    half = [each.to(dtype) for each in w]
    found = jvp(lambda x: run(x, half), (x.to(dtype),), (dx.to(dtype),))[1]
    torch.testing.assert_close(found.double(), jvp(lambda x: run(x, w), (x,), (dx,))[1], rtol=0.1, atol=0.1)
    twice = jvp(grad(lambda x: run(x, half)), (x.to(dtype),), (dx.to(dtype),))[1]
    torch.testing.assert_close(twice.double(), jvp(grad(lambda x: run(x, w)), (x,), (dx,))[1], rtol=0.1, atol=0.1)


@pytest.mark.parametrize("by", ["x", "weights"])
@pytest.mark.parametrize("layout", ["packed", "lengths", "dense"])
def test_second_derivatives_by_torchs_operators_are_those_of_kernels(layout, by, monkeypatch):
    """Rows that are packed are laid out step by step for them."""
    w, x, lengths = weights(), torch.randn(4, 3, 2, **F64), torch.tensor([4, 2, 1])
    w = [each.requires_grad_(by == "weights") for each in w]
    x, found = x.requires_grad_(by == "x"), []
    for kernels in (True, False):
        if not kernels:
            monkeypatch.setattr(gradients, "differentiates_twice", lambda *args: False)
        given = pack_padded_sequence(x, lengths) if layout == "packed" else x
        output, h = gru(given, w, lengths=lengths if layout == "lengths" else None)
        loss = (output.data if layout == "packed" else output).sin().sum() + h.square().sum()
        leaves = w if by == "weights" else [x]
        first = torch.autograd.grad(loss, leaves, create_graph=True)
        found.append(torch.autograd.grad(sum(each.square().sum() for each in first), leaves))
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b)


def test_a_dual_level_within_a_gradient():
    """The innermost transform is the gradient then, and nothing lies below a jvp."""
    w, x, dx = weights(), *torch.randn(2, 4, 2, 2, **F64)

    def tangent(x):
        with forward_ad.dual_level():
            return forward_ad.unpack_dual(gru(forward_ad.make_dual(x, dx), w)[0].sin().sum()).tangent

    expected = grad(lambda x: jvp(lambda x: gru(x, w)[0].sin().sum(), (x,), (dx,))[1])(x)
    torch.testing.assert_close(grad(tangent)(x), expected)


def test_transforms_of_a_declared_cell_without_a_gradient():
    layer, x, hx, signals = make_declared(steps=3, shapes=((3, 4, 19), (3, 1, 1)))
    hx, signals = ({name: each.detach() for name, each in group.items()} for group in (hx, signals))
    members = torch.stack((x.detach(), x.detach() + 1))
    with torch.no_grad():
        found = vmap(lambda x: layer(x, hx, signals=signals)[0])(members)
        torch.testing.assert_close(found, torch.stack([layer(each, hx, signals=signals)[0] for each in members]))


def test_forward_mode_of_a_declared_cell_outside_of_transforms():
    layer, x, hx, signals = make_declared(steps=3, shapes=((3, 4, 19), (3, 1, 1)))
    x, dx = x.detach(), torch.ones_like(x)
    with forward_ad.dual_level():
        output, _ = layer(forward_ad.make_dual(x, dx), hx, signals=signals)
        found = forward_ad.unpack_dual(output).tangent
    torch.testing.assert_close(found, jvp(lambda x: layer(x, hx, signals=signals)[0], (x,), (dx,))[1])


def test_forward_nesting_enters_a_dual_level():
    """So one question is enough to know of forward mode."""
    seen = []
    jvp(
        lambda x: seen.append((_torch.forward_nesting(), _torch.in_dual_level())) or x,
        (torch.ones(1),),
        (torch.ones(1),),
    )
    assert seen == [(1, True)]
