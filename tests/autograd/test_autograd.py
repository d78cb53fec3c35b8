"""First, second and third derivatives, for every cell and option."""

import pytest
import torch
from closeness import assert_close
from conftest import INTERPRETED
from layers import CELLS, pair, random_hx, run
from torch.autograd import gradcheck, gradgradcheck

from rnnfast import use_backend

F64 = {"dtype": torch.float64}
OPTIONS = {
    "plain": {},
    "lengths": {"lengths": torch.tensor([2, 4, 0])},
    "resets": {"resets": torch.tensor([[0, 1, 0], [1, 0, 0], [0, 0, 0], [1, 1, 0]], dtype=torch.bool)},
    "all_states": {"all_states": True},
}
options = pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
cells = pytest.mark.parametrize("cell", CELLS)


def function_of(layer, options):
    """Return the layer as a function of input, initial states and weights, and tensors to call it with."""
    names = [name for name, _ in layer.named_parameters()]
    hx = random_hx(layer, 3)
    states = hx if isinstance(hx, tuple) else (hx,)
    x = torch.randn(4, 3, 2, **F64, requires_grad=True)
    options = {
        name: given.to(x.device) if isinstance(given, torch.Tensor) else given for name, given in options.items()
    }

    def function(x, *rest):
        hx = rest[: len(states)]
        weights = dict(zip(names, rest[len(states) :], strict=True))
        hx = hx if isinstance(states, tuple) and len(states) > 1 else hx[0]
        results = torch.func.functional_call(layer, weights, (x, hx), options)
        return tuple(leaf for leaf in torch.utils._pytree.tree_leaves(results))

    return function, (x, *states, *(p for _, p in layer.named_parameters()))


@options
@cells
def test_first_derivatives(cell, options, backend):
    torch.manual_seed(0)
    two_ways = "resets" not in options
    function, inputs = function_of(pair(cell, 2, 6, bidirectional=two_ways, **F64)[1], options)
    assert gradcheck(function, inputs, fast_mode=True)


@options
@cells
def test_second_derivatives(cell, options, backend):
    torch.manual_seed(0)
    function, inputs = function_of(pair(cell, 2, 6, **F64)[1], options)
    assert gradgradcheck(function, inputs, fast_mode=True)


@cells
def test_every_derivative_entry(cell, backend):
    torch.manual_seed(0)
    function, inputs = function_of(pair(cell, 2, 6, **F64)[1], {})
    assert gradcheck(function, inputs)


@cells
def test_third_derivatives(cell, backend):
    torch.manual_seed(0)
    _, ours = pair(cell, 2, 6, **F64)
    x = torch.randn(4, 3, 2, **F64, requires_grad=True)

    def third():
        value = ours(x)[0].sin().sum()
        for _ in range(3):
            (grad,) = torch.autograd.grad(value, x, create_graph=True)
            value = grad.pow(2).sum()
        return grad

    got = third()
    with use_backend("reference"):
        expected = third()
    torch.testing.assert_close(got, expected)


@cells
def test_gradients_of_a_part_of_the_results(cell, backend):
    theirs, ours = pair(cell, 2, 6, 2, bidirectional=True, **F64)
    x = torch.randn(4, 3, 2, **F64, requires_grad=True)
    hx = random_hx(theirs, 3)

    def parts(layer):
        output, finals = layer(x, hx)
        finals = finals if isinstance(finals, tuple) else (finals,)
        return [output[1:3], output[0, 1], *finals]

    for expected, got in zip(parts(theirs), parts(ours), strict=True):
        leaves = [x, *(hx if isinstance(hx, tuple) else (hx,))]
        a = torch.autograd.grad(expected.sum(), leaves, retain_graph=True, allow_unused=True, materialize_grads=True)
        b = torch.autograd.grad(got.sum(), leaves, retain_graph=True, allow_unused=True, materialize_grads=True)
        torch.testing.assert_close(b, a)


@cells
def test_backward_twice_through_one_graph(cell, backend):
    _, ours = pair(cell, 2, 6, **F64)
    x = torch.randn(4, 3, 2, **F64, requires_grad=True)
    loss = ours(x)[0].sum()
    first = torch.autograd.grad(loss, x, retain_graph=True)[0]
    second = torch.autograd.grad(loss, x)[0]
    assert torch.equal(first, second)
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        torch.autograd.grad(loss, x)


def saved_bytes(layer, x) -> int:
    """Return the bytes that a call keeps for backward, beside its parameters and input."""
    kept = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        layer(x)
    others = {p.data_ptr() for p in (x, *layer.parameters())}
    return sum(size for address, size in kept.items() if address not in others)


@cells
def test_recomputing_gives_the_same_gradients_for_less_memory(cell, backend):
    _, ours = pair(cell, 3, 17, 2, bidirectional=True)
    x = torch.randn(3 if INTERPRETED else 20, 4, 3, requires_grad=True)
    hx = random_hx(ours, 4)
    expected, kept = run(ours, x, hx), saved_bytes(ours, x)
    ours.recompute = True
    got = run(ours, x, hx)
    for name in expected:
        assert torch.equal(got[name], expected[name]), name
    assert not saved_bytes(ours, x) > kept / 2


@pytest.mark.parametrize(("cell", "units"), [("rnn_tanh", 1), ("lstm", 6), ("gru", 5)])
def test_bytes_saved_for_backward(cell, units, backend):
    _, ours = pair(cell, 64, 64)
    x = torch.randn(200, 8, 64, requires_grad=True)
    one = 200 * 8 * 64 * 4
    assert saved_bytes(ours, x) <= (units + 0.1) * one


@cells
@pytest.mark.parametrize("calls", [1, 3])
def test_batches_of_gradients_at_once(cell, calls, backend):
    """In a first call, and in one that may have been prepared."""
    _, layer = pair(cell, 3, 9, bidirectional=True, **F64)
    x = torch.randn(4, 2, 3, **F64, requires_grad=True)
    wanted = [x, *layer.parameters()]
    for _ in range(calls):
        output, _ = layer(x)
    grads = torch.randn(6, *output.shape, **F64)
    got = torch.autograd.grad(output, wanted, grads, is_grads_batched=True, retain_graph=True)
    one_by_one = [torch.autograd.grad(output, wanted, grad, retain_graph=True) for grad in grads]
    for name, stacked, parts in zip(
        ("x", *dict(layer.named_parameters())), got, zip(*one_by_one, strict=True), strict=True
    ):
        assert_close(name, torch.stack(parts), stacked)


@cells
def test_vectorized_hessian(cell, backend):
    _, layer = pair(cell, 2, 6, **F64)
    x = torch.randn(3, 2, 2, **F64)

    def loss(weight):
        return torch.func.functional_call(layer, {"weight_hh_l0": weight}, (x,))[0].square().sum()

    weight = layer.weight_hh_l0.detach()
    expected, got = (torch.autograd.functional.hessian(loss, weight, vectorize=each) for each in (False, True))
    assert_close("hessian", expected, got)
