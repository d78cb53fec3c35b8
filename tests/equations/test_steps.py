"""Steps that users write: what torch would compute otherwise is refused, and every kind of function is taken."""

import functools
import random
import re
import time

import pytest
import torch
from torch.nn import functional

import rnnfast
from rnnfast import reference

F64 = torch.float64


class Spike(torch.autograd.Function):
    """A spike as it is written for eager torch."""

    @staticmethod
    def forward(ctx, value):
        ctx.save_for_backward(value)
        return (value > 0).to(value.dtype)

    @staticmethod
    def backward(ctx, gradient):
        (value,) = ctx.saved_tensors
        return gradient / (1 + value.abs()) ** 2


def without_gradient(x, u):
    with torch.no_grad():
        gate = torch.sigmoid(x.a)
    return gate * u.a


def counting(x, u, seen=[]):  # noqa: B006
    seen.append(0)
    return x.a * len(seen) + u.a


def decayed_in_place(x, u, state):
    h = state[0]
    h *= 0.9
    return h + x.a + u.a


def detached_in_place(x, u):
    value = (x.a * u.a).detach()
    value += 1
    return value + x.a * u.a


def saved_and_changed(x, u):
    gate = torch.sigmoid(x.a + u.a)
    product = gate * u.a
    gate *= 2
    return gate + product


def grown_in_place(x, u, p):
    leak = torch.sigmoid(p.w)
    leak *= x.a
    return leak + u.a


# What a trace cannot know, and what the error says.
OTHERWISE = {
    "a Function": (lambda x, u: Spike.apply(x.a + u.a) + 0.1 * x.a, r"gradient by x\.a .* rnnfast\.surrogate"),
    "no_grad": (without_gradient, r"gradient by x\.a .* value\.detach\(\) in place of torch\.no_grad"),
    "a counter": (counting, "another h than .* not on random numbers, counters or types"),
    "a random number": (lambda x, u: x.a * random.random() + u.a, "not on random numbers"),
    "a type": (lambda x, u: x.a + (u.a if isinstance(x.a, torch.Tensor) else x.a * u.a), "not on .* types"),
    "1 - a comparison": (
        lambda x, u: 1 - (x.a > 0) + u.a,
        r"torch refuses the step: \w+Error: Subtraction.*must run on tensors",
    ),
    "a number for maximum": (lambda x, u: x.a.maximum(0.0) + u.a, "torch refuses the step: TypeError"),
    "a gate changed after use": (saved_and_changed, "torch refuses the step: RuntimeError: .*inplace operation"),
    "a state in place": (decayed_in_place, r"h \*= 0\.9.*not h \+= value"),
    "a detached value in place": (detached_in_place, r"not h \+= value"),
    "relu in place": (lambda x, u: functional.relu(x.a, inplace=True) + u.a, "leaf Variable"),
}


@pytest.mark.parametrize("name", OTHERWISE)
def test_what_torch_computes_otherwise_is_refused(name):
    step, says = OTHERWISE[name]
    with pytest.raises(rnnfast.CellError, match=re.compile(says, re.DOTALL)):
        rnnfast.cell(gates="a")(step)


def test_the_line_that_torch_refuses_is_shown():
    with pytest.raises(rnnfast.CellError, match=r"test_steps\.py:\d+: leak \*= x\.a"):
        rnnfast.cell(gates="a", parameters="w")(grown_in_place)


class Leaky:
    """Leaky units."""

    def __init__(self, rate):
        self.rate = rate

    def __call__(self, x, u, state):
        return (1 - self.rate) * state[0] + self.rate * torch.tanh(x.a + u.a)

    def step(self, x, u, state):
        return self(x, u, state)


def leaky(x, u, state, *, rate, scale=1.0):
    """Leaky units by keywords."""
    return (1 - rate) * state[0] + scale * rate * torch.tanh(x.a + u.a)


@pytest.mark.parametrize(
    ("step", "name", "doc"),
    [
        (Leaky(0.25), "Leaky", "Leaky units."),
        (Leaky(0.25).step, "step", None),
        (functools.partial(leaky, rate=0.25), "leaky", "Leaky units by keywords."),
    ],
    ids=["object", "method", "partial"],
)
def test_every_kind_of_function_is_a_step(step, name, doc):
    made = rnnfast.cell(gates="a")(step)
    assert made.__name__ == name
    assert made.identity.startswith(f"{name}-")
    assert str(made).startswith(f"{name}: gates a; states h\n" + (f"    {doc}\n" if doc else "\n"))
    a, u, h = torch.randn(3, 2)
    assert torch.allclose(made((a,), (u,), (h,)), 0.75 * h + 0.25 * torch.tanh(a + u))


# What is no step, and what the error says.
NO_STEP = {
    "a builtin": (torch.tanh, "tanh: its arguments cannot be read"),
    "positional arguments": (eval("lambda x, u, /: x.a + u.a"), "write no / behind it"),
    "a module": (torch.nn.Linear(2, 2), "Linear: the argument args is not known"),
    "any arguments": (lambda *x: x[0].a, "the argument x is not known"),
    "no result": (lambda x, u: None, "got NoneType; a step returns its new states"),
    "round": (lambda x, u: round(x.a) + u.a, r"round\(\)"),
}


@pytest.mark.parametrize("name", NO_STEP)
def test_what_is_no_step_is_refused(name):
    step, says = NO_STEP[name]
    with pytest.raises(rnnfast.CellError, match=says):
        rnnfast.cell(gates="a")(step)


def test_names_that_are_none():
    with pytest.raises(rnnfast.CellError, match=r"as in @rnnfast\.cell\(gates='i f g o'\), got <function"):
        rnnfast.cell(leaky)
    with pytest.raises(rnnfast.CellError, match=r"states: expected names .* got 2"):
        rnnfast.cell(gates="a", states=2)
    with pytest.raises(rnnfast.CellError, match="expected names in one string or a sequence"):
        rnnfast.cell(gates={"a", "b"})
    with pytest.raises(rnnfast.CellError, match="Python reads the name 'µ' as 'μ'"):
        rnnfast.cell(gates="µ")(lambda x, u: x[0] + u[0])


def test_states_are_read_by_name_and_may_be_returned_as_they_are():
    @rnnfast.cell(gates="a", states="h c", output="c", read="c")
    def named(x, u, state):
        return torch.tanh(x.a + u.a) + state.c, state["h"]

    assert named.order == (1, 0)
    a, u, h, c = torch.randn(4, 2)
    for state in ((h, c), {"h": h, "c": c}, torch.cat((h, c))):
        new = named((a,), (u,), state)
        assert torch.equal(new[0], torch.tanh(a + u) + c)
        assert torch.equal(new[1], h)
    with pytest.raises(ValueError, match="expected h, c in state, got h"):
        named((a,), (u,), {"h": h})
    with pytest.raises(ValueError, match="expected 2 entries of one width in state"):
        named((a,), (u,), torch.randn(3))
    assert rnnfast.cell(gates="a", states="h c")(lambda x, u, state: (x.a + u.a, state[0])).kernel.saved == 0


def test_values_of_a_step_change_in_place_as_tensors_do():
    @rnnfast.cell(gates="a")
    def changed(x, u, state):
        total = 0.0
        for value in (x.a, u.a):
            total += torch.tanh(value)
        other = total
        total *= state[0]
        return other

    assert changed.kernel.text.endswith("return ((tanh(x[0]) + tanh(u[0])) * state[0],)\n")


def test_new_states_that_are_numbers_or_comparisons_run_in_the_plain_loop():
    @rnnfast.cell(gates="a", states="h n k")
    def constant(x, u, state):
        return torch.tanh(x.a + u.a + 0.1 * state.n), 0.5, state.h > 0

    layer, x = rnnfast.Recurrent(constant, 2, 3, dtype=torch.bfloat16), torch.randn(4, 2, 2, dtype=torch.bfloat16)
    assert rnnfast.explain(layer, x).backend == "reference"
    assert "cells with a state that is a number" in rnnfast.explain(layer, x).reason
    _, (h, n, k) = layer(x)
    assert h.dtype == n.dtype == k.dtype == torch.bfloat16
    assert n.eq(0.5).all()
    old = torch.zeros(2, 3, dtype=F64)
    assert reference.as_state(torch.tensor(True), old).tolist() == [[1.0] * 3] * 2


def test_many_inner_steps_are_declared_at_once():
    @rnnfast.cell(gates="a")
    def euler(x, u, state):
        v = state[0]
        for _ in range(200):
            v = v + 0.01 * (x.a - v)
        return torch.tanh(v + u.a)

    start = time.perf_counter()
    assert euler.kernel.saved == 0
    assert time.perf_counter() - start < 5


def test_a_number_that_is_none_and_an_empty_docstring_are_written():
    def marked(x, u):
        """ """
        return torch.where(x.a > 9, 0.0 * torch.zeros_like(x.a) / torch.zeros_like(x.a), x.a) + u.a

    assert "(1e999 - 1e999)" in str(rnnfast.cell(gates="a")(marked))


@pytest.mark.parametrize(
    ("initial", "error", "says"),
    [
        (3.0, TypeError, "initial: expected a mapping of values by name, got float"),
        ({"leak": "half"}, TypeError, "expected a number, a tensor or a function for leak, got str"),
        ({"leak": torch.ones(4)}, ValueError, r"expected a number or \[3\] for leak, got \[4\]"),
    ],
    ids=["no mapping", "no value", "another shape"],
)
def test_initial_values_that_do_not_fit_are_named(initial, error, says):
    with pytest.raises(error, match=says):
        rnnfast.Recurrent(rnnfast.cells.leaky_rnn_learned, 2, 3, initial=initial)
