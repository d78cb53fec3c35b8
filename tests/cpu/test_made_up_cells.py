"""Cells that the table does not have: fewer values saved than gates, more, and more than two states."""

import pytest
import torch
from closeness import assert_close
from conftest import backends_under_test
from rnnfast_kernels.bind import bind
from rnnfast_kernels.cells import CELLS, Cell

from rnnfast import functional, reference, tangent, torch_functions, use_backend
from rnnfast.backends.dispatch import load
from rnnfast.spec import Layer, Options, group

F64 = {"dtype": torch.float64}


def leak(x, u, state):
    """h' = f h + candidate: two gates, of which one is saved."""
    f = (x[0] + u[0]).sigmoid()
    return f * state[0] + (x[1] + u[1])


def rich(x, u, state):
    """h' = g + f (h - g): one gate, two values saved."""
    g, f = x[0].tanh(), u[0].sigmoid()
    return g + f * (state[0] - g)


def three(x, u, state):
    """h' = tanh(x + u + b), b' = tanh(h' + c), c' = h + b: three states."""
    h = (x[0] + u[0] + state[1]).tanh()
    return h, (h + state[2]).tanh(), state[0] + state[1]


MADE_UP = {
    cell.name: cell
    for cell in (Cell("leak", leak, "fc", "h"), Cell("rich", rich, "g", "h"), Cell("three", three, "g", "hbc"))
}
# Kernels are compiled for each: that of three states alone in the default run.
ONE_STATE = [pytest.param(name, marks=pytest.mark.long) for name in ("leak", "rich")]


@pytest.fixture(autouse=True)
def registered(monkeypatch):
    for name, cell in MADE_UP.items():
        monkeypatch.setitem(CELLS, name, cell)
        monkeypatch.setitem(reference.FORWARD, name, bind(cell.forward, torch_functions.FORWARD))
        monkeypatch.setitem(tangent.BACKWARD, name, bind(cell.backward, torch_functions.BACKWARD))
        if backends_under_test() == ["triton"]:
            from rnnfast_kernels.gpu import activations

            bound = activations.BoundCell(activations.bound(cell.forward), activations.bound(cell.backward))
            monkeypatch.setitem(activations.BOUND, name, bound)


def make(cell, steps, batch, hidden, directions=2, inputs=3):
    """x, the initial states and the weights."""
    torch.manual_seed(0)
    columns = MADE_UP[cell].gates * hidden
    x = torch.randn(steps, batch, inputs, **F64)
    hx = [torch.randn(directions, batch, hidden, **F64) for _ in MADE_UP[cell].states]
    shapes = [(columns, inputs), (columns, hidden), (columns,), (columns,)] * directions
    weights = [torch.randn(shape, **F64) * hidden**-0.5 for shape in shapes]
    return [tensor.requires_grad_() for tensor in (x, *hx, *weights)]


def everything(cell, leaves, **options):
    """Results, gradients, and the gradient of their squares."""
    states = len(MADE_UP[cell].states)
    x, hx, weights = leaves[0], leaves[1 : 1 + states], leaves[1 + states :]
    choice = Options(cell, bidirectional=len(weights) > 4)
    output, finals = functional.recurrent(choice, x, weights, hx if states > 1 else hx[0], **options)[:2]
    finals = finals if states > 1 else (finals,)
    results = [output, *finals]
    loss = sum((each * torch.arange(each.numel(), **F64).view_as(each).cos()).sum() for each in results)
    first = torch.autograd.grad(loss, leaves, create_graph=True)
    second = torch.autograd.grad(sum((each**2).sum() for each in first), leaves)
    return [*results, *first, *second]


def compare(cell, leaves, backend, **options):
    for _ in range(3):
        got = everything(cell, leaves, **options)
    with use_backend("reference"):
        expected = everything(cell, leaves, **options)
    for n, (value, found) in enumerate(zip(expected, got, strict=True)):
        assert_close(f"{cell} {n}", value, found, 1e-11)


def test_as_many_values_are_saved_as_said():
    assert {name: cell.saved for name, cell in MADE_UP.items()} == {"leak": 1, "rich": 2, "three": 0}


@pytest.mark.parametrize("size", [(1, 1, 5), (5, 3, 17)], ids=str)
@pytest.mark.parametrize("cell", ONE_STATE)
def test_any_number_of_values_may_be_saved(cell, size, backend):
    compare(cell, make(cell, *size), backend)


@pytest.mark.parametrize("cell", ONE_STATE)
def test_and_with_lengths_and_resets(cell, backend):
    resets = torch.rand(5, 3) < 0.3
    compare(cell, make(cell, 5, 3, 17, 1), backend, lengths=torch.tensor([2, 5, 3]), resets=resets)


@pytest.mark.parametrize("directions", [1, 2])
@pytest.mark.parametrize("cell", ONE_STATE)
def test_what_is_saved_is_as_announced(cell, directions, backend):
    x, h, *weights = (leaf.detach() for leaf in make(cell, 4, 2, 5, directions))
    named = group(Options(cell, bidirectional=directions > 1), weights)
    layer = Layer(cell, x, (h,), named, (False, True)[:directions])
    saved = load(backend).forward(layer, save=True, all_states=False).saved
    assert tuple((tuple(each.shape), each.dtype) for each in saved) == load(backend).saved_like(layer)


def test_three_states(backend):
    compare("three", make("three", 4, 3, 17), backend)
    resets = torch.rand(5, 3) < 0.3
    compare("three", make("three", 5, 3, 17, 1), backend, lengths=torch.tensor([2, 5, 3]), resets=resets)
    compare("three", make("three", 4, 3, 5, 1), backend, all_states=True)


def test_three_states_start_from_zero():
    x, *states = make("three", 4, 3, 5)[:4]
    options, weights = Options("three", bidirectional=True), make("three", 4, 3, 5)[4:]
    with use_backend("reference"):
        (output, finals), zero = functional.recurrent(options, x, weights, None), [s * 0 for s in states]
        expected, expected_finals = functional.recurrent(options, x, weights, zero)
    assert torch.equal(output, expected)
    assert len(finals) == 3
    assert all(torch.equal(a, b) for a, b in zip(finals, expected_finals, strict=True))


def test_torch_lacks_them():
    with use_backend("torch"), pytest.raises(RuntimeError, match="lacks the cell three"):
        everything("three", make("three", 4, 3, 5))
