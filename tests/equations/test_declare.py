"""Declaring a cell: what is refused and how, what a declared cell is, shows and does when it is called."""

import copy
import pickle
import re

import numpy as np
import pytest
import torch
from torch.nn import functional

import rnnfast
from rnnfast.declare import DECLARED, found


@rnnfast.cell(gates="i f g o", states="h c", parameters="p_i p_f p_o")
def peephole(x, u, state, p):
    """LSTM whose gates see the cell state.

    More about it.
    """
    c = state[1]
    i = torch.sigmoid(x.i + u.i + p.p_i * c)
    f = torch.sigmoid(x.f + u.f + p.p_f * c)
    c = f * c + i * torch.tanh(x.g + u.g)
    o = torch.sigmoid(x.o + u.o + p.p_o * c)
    return o * torch.tanh(c), c


# What a step does that it may not, and what the message names, among them what to write instead.
REFUSED = {
    "data-dependent if": (lambda x, u: x.a if x.a > u.a else u.a, "torch.where(condition, a, b)"),
    "builtin max": (lambda x, u: max(x.a, u.a), "torch.maximum"),
    "and": (lambda x, u: torch.where((x.a > 0) and (u.a > 0), x.a, u.a), "& | ~"),
    "matrix product": (lambda x, u: x.a @ u.a, "operator @"),
    "torch.matmul": (lambda x, u: torch.matmul(x.a, u.a), "torch.matmul"),
    "linear": (lambda x, u: functional.linear(x.a, u.a), "linear"),
    "softmax": (lambda x, u: torch.softmax(x.a + u.a, -1), "torch.softmax"),
    "layer norm": (lambda x, u: functional.layer_norm(x.a + u.a, (3,)), "layer_norm"),
    "mean": (lambda x, u: (x.a + u.a).mean(), ".mean"),
    "dropout": (lambda x, u: functional.dropout(x.a + u.a), "signals"),
    "unknown function": (lambda x, u: torch.lgamma(x.a + u.a), "torch.lgamma is not known"),
    "unknown method": (lambda x, u: (x.a + u.a).lgamma(), ".lgamma is not known"),
    "in place": (lambda x, u: (x.a + u.a).sigmoid_(), "without the underscore"),
    "heaviside": (lambda x, u: torch.heaviside(x.a, u.a), "surrogate"),
    "power": (lambda x, u: x.a**u.a, "torch.exp(exponent * torch.log(base))"),
    "math": (lambda x, u: __import__("math").exp(x.a) * u.a, "torch.exp"),
    "numpy": (lambda x, u: np.tanh(x.a + u.a), "numpy.tanh"),
    "loop over a value": (lambda x, u: sum(x.a) + u.a, "one unit at a time"),
    "index": (lambda x, u: x.a[0] + u.a, "one unit at a time"),
    "a tensor": (lambda x, u: x.a * torch.ones(3) + u.a, "torch.Tensor as an argument of mul"),
    "a tensor on the left": (lambda x, u: torch.ones(3) - x.a + u.a, "parameters"),
    "random": (lambda x, u: torch.rand_like(x.a) + u.a, "signals"),
    "a gate that is not there": (lambda x, u: x.b + u.a, "x.b is used but not declared"),
    "an index that is not there": (lambda x, u: x[1] + u.a, "x[1] is used but not declared"),
    "a parameter that is not there": (lambda x, u, p: x.a + u.a * p.w, "p.w is used but not declared"),
    "modulo": (lambda x, u: x.a % 2.0 + u.a, "operator %"),
    "a value as a condition": (lambda x, u: torch.where(x.a, u.a, u.a * 2), "value > 0"),
    "a bound that is a value": (lambda x, u: torch.clamp(x.a, min=u.a), "torch.maximum"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused_with_the_line_and_with_what_to_write_instead(name):
    step, says = REFUSED[name]
    with pytest.raises(rnnfast.CellError) as caught:
        rnnfast.cell(gates="a")(step)
    message = str(caught.value)
    assert says in message
    line = step.__code__.co_firstlineno
    assert re.search(rf"test_declare\.py:{line}: ", message), message
    assert f'"{name}": (lambda' in message


# Declarations that do not fit their steps.
WRONG = {
    "an unused gate": ({"gates": "a b"}, lambda x, u: x.a + u.a + u.b, "gate x.b is declared but not used"),
    "an unused recurrent part": ({"gates": "a b"}, lambda x, u: x.a + u.a + x.b, "u.b is declared but not used"),
    "an unused parameter": ({"gates": "a", "parameters": "w"}, lambda x, u: x.a + u.a, "parameter p.w"),
    "an unused signal": ({"gates": "a", "signals": "m"}, lambda x, u: x.a + u.a, "signal s.m"),
    "too many states": ({"gates": "a"}, lambda x, u: (x.a, u.a), "expected the 1 new states (h), got 2"),
    "too few states": ({"gates": "a", "states": "h c"}, lambda x, u: x.a + u.a, "expected the 2 new states (h, c)"),
    "no value": ({"gates": "a"}, lambda x, u: None, "got NoneType"),
    "an unknown argument": ({"gates": "a"}, lambda x, hidden: x.a, "argument hidden is not known"),
    "an unknown output": ({"gates": "a", "output": "c"}, lambda x, u: x.a + u.a, "output='c'"),
    "an unknown state to read": ({"gates": "a", "read": "c"}, lambda x, u: x.a + u.a, "read='c'"),
    "a recurrent gate that is not there": (
        {"gates": "a", "recurrent": "b"},
        lambda x, u: x.a,
        "b is not one of the gates",
    ),
    "a name twice": ({"gates": "a a"}, lambda x, u: x.a + u.a, "occurs twice"),
    "not a name": ({"gates": "a 1b"}, lambda x, u: x.a + u.a, "'1b'"),
    "the name of a weight": ({"gates": "a", "parameters": "bias_ih"}, lambda x, u, p: x.a, "name of a weight"),
    "no recurrent part": ({"gates": "a b", "recurrent": "a"}, lambda x, u: x.a + u.b + x.b, "recurrent="),
}


@pytest.mark.parametrize("name", WRONG)
def test_declarations_that_do_not_fit(name):
    declared, step, says = WRONG[name]
    with pytest.raises(rnnfast.CellError, match=re.escape(says)):
        rnnfast.cell(**declared)(step)


def test_printed_it_shows_equations_what_is_kept_and_the_gradient():
    text = str(peephole)
    assert (
        "peephole: gates i f g o; states h c; parameters p_i p_f p_o\n    LSTM whose gates see the cell state." in text
    )
    assert "    i = sigmoid(x.i + u.i + p.p_i * c)\n" in text
    assert "    i, f, tanh(x.g + u.g), o\n" in text
    assert "    dp.p_i = " in text
    assert "du = dx" in text


def test_called_with_tensors_it_is_one_step_of_torch():
    torch.manual_seed(0)
    x, u, h, c = (torch.randn(2, n) for n in (12, 12, 3, 3))
    p = {name: torch.randn(3) for name in peephole.parameters}
    expected = peephole.function(
        *(type("Gates", (), dict(zip("ifgo", t.chunk(4, -1), strict=True))) for t in (x, u)),
        (h, c),
        type("Parameters", (), p),
    )
    for given in ((x, u, (h, c), p), (x.chunk(4, -1), u.chunk(4, -1), (h, c), list(p.values()))):
        got = peephole(*given)
        assert all(torch.equal(a, b) for a, b in zip(expected, got, strict=True))
    with pytest.raises(ValueError, match="expected 4 entries in x, got 2"):
        peephole(x.chunk(2, -1), u, (h, c), p)


def test_identity_is_the_name_and_the_equations():
    def declare(step, name="same"):
        step.__name__ = name
        return rnnfast.cell(gates="a")(step)

    one, again = declare(lambda x, u: torch.tanh(x.a + u.a)), declare(lambda x, u: (x[0] + u[0]).tanh())
    other = declare(lambda x, u: torch.relu(x.a + u.a))
    assert one.identity == again.identity != other.identity
    assert found(other.identity) is other
    assert pickle.loads(pickle.dumps(other)) is other
    assert copy.deepcopy(other) is other


def test_the_order_of_states_belongs_to_the_identity():
    def declare(states, step):
        step.__name__ = "ordered"
        return rnnfast.cell(gates="a", states=states, output="h")(step)

    one = declare("h c", lambda x, u, state: (torch.tanh(x.a + u.a), state[1] + state[0]))
    other = declare("c h", lambda x, u, state: (state[0] + state[1], torch.tanh(x.a + u.a)))
    assert one.order == (0, 1)
    assert other.order == (1, 0)
    assert one.identity != other.identity
    layers = [rnnfast.Recurrent(cell, 2, 3) for cell in (one, other)]
    layers[1].load_state_dict(layers[0].state_dict())
    x = torch.randn(4, 2, 2)
    with rnnfast.use_backend("reference"):
        (a, (h, c)), (b, (c2, h2)) = (layer(x) for layer in layers)
    assert torch.equal(a, b)
    assert torch.equal(h, h2)
    assert torch.allclose(c, c2)


def test_a_cell_that_is_not_declared_is_named():
    with pytest.raises(RuntimeError, match=f"the cell peephole-0123 is not declared.*{peephole.identity}"):
        found("peephole-0123")
    with pytest.raises(RuntimeError, match=r"the cell nobody-0123 is not declared in this process$"):
        found("nobody-0123")


def test_numbers_of_numpy_and_booleans_of_comparisons_count_as_numbers():
    @rnnfast.cell(gates="a")
    def mixed(x, u):
        return np.float64(2.0) * x.a + (u.a > 0) * 0.5 + (x.a >= u.a).to(x.a.dtype)

    a, b = torch.randn(4), torch.randn(4)
    assert torch.allclose(mixed((a,), (b,)), 2 * a + (b > 0) * 0.5 + (a >= b).float())
    text = rnnfast.cell(gates="a")(mixed.function).kernel.text
    assert "2.0 * x[0]" in text


def test_helper_functions_and_loops_are_traced_through():
    def mix(z, a, b):
        return z * a + (1 - z) * b

    @rnnfast.cell(gates="z a b")
    def mixed(x, u, state):
        total = state[0]
        for gate in ("a", "b"):
            total = mix(torch.sigmoid(x.z + u.z), total, torch.tanh(getattr(x, gate) + getattr(u, gate)))
        return total

    assert mixed.kernel.text.count("sigmoid(") == 1
    assert mixed.identity in DECLARED


def test_surrogate_is_a_step_with_the_derivative_given():
    value = torch.tensor([-0.5, 0.0, 0.5, float("nan")], dtype=torch.float64, requires_grad=True)
    spike = rnnfast.surrogate(value, lambda v: 1 / (1 + v.abs()) ** 2)
    assert spike.tolist() == [0, 0, 1, 0]
    (first,) = torch.autograd.grad(spike[:3].sum(), value, create_graph=True)
    assert torch.allclose(first[:3], 1 / (1 + value[:3].abs()) ** 2)
    (second,) = torch.autograd.grad(first[2], value)
    assert second[2].item() == pytest.approx(-2 / 1.5**3)
    assert rnnfast.surrogate(value, 0.5).tolist() == [0, 0, 1, 0]
    with pytest.raises(TypeError, match="expected a tensor, got float"):
        rnnfast.surrogate(0.5, 1.0)


def test_printed_gradients_keep_their_parentheses():
    assert "sigmoid(-(x.f + u.f))" in str(rnnfast.cells.slstm)
