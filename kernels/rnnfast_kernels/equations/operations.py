"""The table of operations: what each does to numbers, its partial derivatives, and what it costs to compute again.

A step is pointwise, so one rule serves both modes: `partials(d, y, *operands)` returns, for each operand, d times the
derivative of the result y by it, or None where that is 0. The gradient multiplies by the gradient of y, the tangent by
that of the operand. The rules use operations of this table only, so they can be differentiated again.

Where torch chooses at a tie or for NaN, the rules choose the same.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

from rnnfast_kernels.equations.graph import Graph, Node

# Cost of an exponential, in additions.
EXPENSIVE = 8


class Operation(NamedTuple):
    """A row of the table."""

    value: Callable[..., float]
    partials: Callable[..., tuple[Node | None, ...]]
    cost: int = 1


def where(graph_of: Node, relation: str, a: Node | float, b: Node | float, yes: Node | float, no: Node | float) -> Node:
    """Select by a comparison of a and b."""
    return graph_of.graph.make(f"where_{relation}", a, b, yes, no)


def call(name: str, first: Node, *others: Node | float) -> Node:
    """Apply an operation by its name."""
    return first.graph.make(name, first, *others)


def selection(holds: Callable[[float, float], bool], name: str) -> Operation:
    """A selection; a comparison with NaN is false."""

    def partials(d, y, a, b, yes, no):
        return None, None, where(d, name, a, b, d, 0.0), where(d, name, a, b, 0.0, d)

    return Operation(lambda a, b, yes, no: yes if holds(a, b) else no, partials)


def extremum(larger: bool) -> Operation:
    """The larger or smaller of two numbers, NaN if one is. At a tie each has half of the gradient."""

    def value(a, b):
        return math.nan if math.isnan(a) or math.isnan(b) else (max if larger else min)(a, b)

    def partial(d, a, b):
        other_wins = (b, a) if larger else (a, b)
        return where(d, "equal", a, b, d * 0.5, where(d, "greater", *other_wins, 0.0, d))

    return Operation(value, lambda d, y, a, b: (partial(d, a, b), partial(d, b, a)))


def divided(a: float, b: float) -> float:
    """Divide as processors do, also by 0."""
    if b:
        return a / b
    return math.copysign(math.inf, a) * math.copysign(1.0, b) if a else math.nan


def logarithm(a: float) -> float:
    return math.log(a) if a else -math.inf


def sigmoid(a: float) -> float:
    return 1 / (1 + math.exp(-a)) if a >= 0 else math.exp(a) / (1 + math.exp(a))


OPERATIONS: dict[str, Operation] = {
    "+": Operation(lambda a, b: a + b, lambda d, y, a, b: (d, d)),
    "-": Operation(lambda a, b: a - b, lambda d, y, a, b: (d, -d)),
    "*": Operation(lambda a, b: a * b, lambda d, y, a, b: (d * b, d * a)),
    "/": Operation(divided, lambda d, y, a, b: (d / b, -(d * (y / b))), 2),
    "neg": Operation(lambda a: -a, lambda d, y, a: (-d,)),
    "where_greater": selection(lambda a, b: a > b, "greater"),
    "where_at_most": selection(lambda a, b: a <= b, "at_most"),
    "where_equal": selection(lambda a, b: a == b, "equal"),
    "sigmoid": Operation(sigmoid, lambda d, y, a: (call("sigmoid_backward", d, y),), EXPENSIVE),
    "tanh": Operation(math.tanh, lambda d, y, a: (call("tanh_backward", d, y),), EXPENSIVE),
    "relu": Operation(lambda a: 0.0 if a <= 0 else a, lambda d, y, a: (call("relu_backward", d, y),)),
    # The gradient of an activation by its result y, and how that changes with y.
    "sigmoid_backward": Operation(
        lambda d, y: d * y * (1 - y),
        lambda d, _, a, y: (call("sigmoid_backward", d, y), call("sigmoid_hvp", d, a, y)),
    ),
    "tanh_backward": Operation(
        lambda d, y: d * (1 - y * y),
        lambda d, _, a, y: (call("tanh_backward", d, y), call("tanh_hvp", d, a, y)),
    ),
    "relu_backward": Operation(
        lambda d, y: 0.0 if y <= 0 else d, lambda d, _, a, y: (call("relu_backward", d, y), None)
    ),
    "sigmoid_hvp": Operation(
        lambda e, d, y: e * d * (1 - 2 * y),
        lambda d, _, e, a, y: (call("sigmoid_hvp", d, a, y), call("sigmoid_hvp", d, e, y), d * e * a * -2.0),
    ),
    "tanh_hvp": Operation(
        lambda e, d, y: -2 * e * d * y,
        lambda d, _, e, a, y: (call("tanh_hvp", d, a, y), call("tanh_hvp", d, e, y), d * e * a * -2.0),
    ),
    "exp": Operation(math.exp, lambda d, y, a: (d * y,), EXPENSIVE),
    "expm1": Operation(math.expm1, lambda d, y, a: (d * (y + 1.0),), EXPENSIVE),
    "log": Operation(logarithm, lambda d, y, a: (d / a,), EXPENSIVE),
    "log1p": Operation(
        lambda a: math.log1p(a) if a > -1 else logarithm(a + 1), lambda d, y, a: (d / (a + 1.0),), EXPENSIVE
    ),
    "softplus": Operation(
        lambda a: a if a > 20 else math.log1p(math.exp(a)),
        lambda d, y, a: (where(d, "greater", a, 20.0, d, d * call("sigmoid", a)),),
        2 * EXPENSIVE,
    ),
    "logsigmoid": Operation(
        lambda a: min(a, 0.0) - math.log1p(math.exp(-abs(a))),
        lambda d, y, a: (d * call("sigmoid", -a),),
        2 * EXPENSIVE,
    ),
    "sqrt": Operation(math.sqrt, lambda d, y, a: (d / (y * 2.0),), 3),
    "rsqrt": Operation(lambda a: divided(1.0, math.sqrt(a)), lambda d, y, a: (d * -0.5 * (y * y * y),), 4),
    "abs": Operation(abs, lambda d, y, a: (d * call("sign", a),)),
    "sign": Operation(lambda a: (a > 0) - (a < 0), lambda d, y, a: (None,)),
    "sin": Operation(math.sin, lambda d, y, a: (d * call("cos", a),), EXPENSIVE),
    "cos": Operation(math.cos, lambda d, y, a: (-(d * call("sin", a)),), EXPENSIVE),
    "erf": Operation(
        math.erf, lambda d, y, a: (d * (call("exp", -(a * a)) * (2 / math.sqrt(math.pi))),), 2 * EXPENSIVE
    ),
    "maximum": extremum(True),
    "minimum": extremum(False),
    # Bounds are numbers. `clamp` lets a gradient pass at its bounds, `bounded` (of hardtanh) does not.
    "clamp_low": Operation(
        lambda a, low: low if low > a else a, lambda d, y, a, low: (where(d, "at_most", low, a, d, 0.0), None)
    ),
    "clamp_high": Operation(
        lambda a, high: high if a > high else a, lambda d, y, a, high: (where(d, "at_most", a, high, d, 0.0), None)
    ),
    "bounded": Operation(
        lambda a, low, high: min(max(a, low), high),
        lambda d, y, a, low, high: (where(d, "at_most", a, low, 0.0, where(d, "at_most", high, a, 0.0, d)), None, None),
    ),
    "detach": Operation(lambda a: a, lambda d, y, a: (None,)),
    # 1 where a > 0, else 0, with a derivative by a that is given.
    "surrogate": Operation(lambda a, slope: float(a > 0), lambda d, y, a, slope: (d * slope, None)),
}

# What is written between its operands, and how tightly it binds them.
INFIX = {"+": 1, "-": 1, "*": 2, "/": 2}
# What is called by its name.
FUNCTIONS = tuple(name for name in OPERATIONS if name.isidentifier() and name != "neg")


def new_graph() -> Graph:
    """Return an empty graph over the operations of the table."""
    return Graph({name: operation.value for name, operation in OPERATIONS.items()})
