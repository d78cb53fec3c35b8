"""Expression graphs: tracing, derivatives, residuals, and the cells of torch against their backward written by hand."""

import inspect
import linecache
import math
import random

import pytest
from rnnfast_kernels.bind import bind
from rnnfast_kernels.cells import CELLS
from rnnfast_kernels.equations.cell import Cell
from rnnfast_kernels.equations.graph import ordered
from rnnfast_kernels.equations.operations import OPERATIONS, call, new_graph

# ruff: noqa: F821


def rnn_tanh_backward(dstate, saved, state, new_state):
    dx = (tanh_backward(dstate[0], new_state[0]),)
    return dx, dx, (None,)


def rnn_relu_backward(dstate, saved, state, new_state):
    dx = (relu_backward(dstate[0], new_state[0]),)
    return dx, dx, (None,)


def lstm_backward(dstate, saved, state, new_state):
    i, f, g, o = saved
    tanh_c = tanh(new_state[1])
    dc = dstate[1] + tanh_backward(dstate[0] * o, tanh_c)
    dx = (
        sigmoid_backward(dc * g, i),
        sigmoid_backward(dc * state[1], f),
        tanh_backward(dc * i, g),
        sigmoid_backward(dstate[0] * tanh_c, o),
    )
    return dx, dx, (None, dc * f)


def gru_backward(dstate, saved, state, new_state):
    r, z, n, u_n = saved
    dh = dstate[0]
    dx_n = tanh_backward(dh - dh * z, n)
    dx_r = sigmoid_backward(dx_n * u_n, r)
    dx_z = sigmoid_backward(dh * (state[0] - n), z)
    return (dx_r, dx_z, dx_n), (dx_r, dx_z, dx_n * r), (dh * z,)


# Backward by hand, values saved, whether du equals dx.
BY_HAND = {
    "rnn_tanh": (rnn_tanh_backward, 0, True),
    "rnn_relu": (rnn_relu_backward, 0, True),
    "lstm": (lstm_backward, 4, True),
    "gru": (gru_backward, 4, False),
}


@pytest.mark.parametrize("name", BY_HAND)
def test_derived_is_what_was_written_by_hand(name):
    """Each derived gradient is the same node, so the same operations in the same order, so the same bits."""
    backward, saved, one_gradient = BY_HAND[name]
    cell = CELLS[name]
    functions = {each: lambda *args, each=each: call(each, *args) for each in OPERATIONS if each.isidentifier()}
    traced = cell.traced
    found = bind(backward, functions)(cell.seeds, cell.kept_nodes, traced.leaves["state"], traced.new_state)
    assert cell.gradients[:3] == found
    assert (cell.saved, cell.one_gradient) == (saved, one_gradient)


def evaluate(node, values):
    """Compute a node from the values of its leaves."""
    for each in ordered([node]):
        if each.op == "number":
            values[each] = each.number
        elif each not in values:
            values[each] = OPERATIONS[each.op].value(*(values[operand] for operand in each.operands))
    return values[node]


@pytest.mark.parametrize("name", [name for name in OPERATIONS if name not in ("surrogate", "detach")])
def test_partial_derivatives_of_every_operation(name):
    """The rules, and the rules of what they return, against differences."""
    chance = random.Random(1)
    count = len(inspect.signature(OPERATIONS[name].partials).parameters) - 2
    graph = new_graph()
    bounds = {"clamp_low": (-0.4,), "clamp_high": (0.4,), "bounded": (-0.4, 0.4)}.get(name, ())
    leaves = graph.leaves("a", count - len(bounds))
    node, d = graph.make(name, *leaves, *bounds), graph.leaf("d", 0)
    for _ in range(20):
        low = 0.1 if name in ("log", "sqrt", "rsqrt", "/") else -0.9
        point = {leaf: chance.uniform(low, 1.5) for leaf in leaves} | {d: chance.uniform(0.5, 1.5)}
        for place, term in enumerate(OPERATIONS[name].partials(d, node, *node.operands)[: len(leaves)]):
            found = 0.0 if term is None else evaluate(term, dict(point))
            assert found == pytest.approx(point[d] * slope(node, leaves[place], point), rel=1e-5, abs=1e-6)
            for inner in () if term is None else ordered([term]):
                for at, operand in enumerate(inner.operands):
                    if operand.number is None:
                        again = OPERATIONS[inner.op].partials(d, inner, *inner.operands)[at]
                        assert again is None or math.isfinite(evaluate(again, dict(point)))


def slope(node, leaf, point, h=1e-6):
    higher, lower = ({**point, leaf: point[leaf] + step} for step in (h, -h))
    return (evaluate(node, higher) - evaluate(node, lower)) / (2 * h)


def test_common_parts_are_computed_once_and_numbers_folded():
    cell = Cell("twice", lambda x, u: (x[0] + u[0]).tanh() * (x[0] + u[0]).tanh() * (2.0 * 0.25), "a", "h")
    source = inspect.getsource(cell.forward)
    assert source.count("tanh(") == 1
    assert "* 0.5" in source


def test_sources_are_kept_though_linecache_forgets_them(monkeypatch):
    cell = Cell("kept", lambda x, u: (x[0] + u[0]).tanh(), "a", "h")
    before = cell.sources(2)
    assert before.startswith(inspect.getsource(cell.forward))
    monkeypatch.setattr(linecache, "cache", {})
    assert cell.sources(2) == before


def test_what_is_cheap_to_compute_again_is_not_kept():
    cell = Cell("leaky", lambda x, u, state: state[0] + (x[0] + u[0] - state[0]) * (x[1] + u[1]).sigmoid(), "ab", "h")
    assert [node.op for node in cell.kept_nodes] == ["-", "sigmoid"]


def test_text_and_digest_tell_cells_apart():
    def make(step, states="h"):
        return Cell("same", step, "a", states)

    one = make(lambda x, u: (x[0] + u[0]).tanh())
    assert one.text == make(lambda x, u: (x.a + u.a).tanh()).text
    others = [make(lambda x, u: (x[0] + u[0]).relu()), make(lambda x, u: (x[0] + u[0]).tanh() * 0.5)]
    assert len({one.digest, *(other.digest for other in others)}) == 3
