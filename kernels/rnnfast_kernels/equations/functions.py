"""What a step function may call: functions of torch, by their names, as operations of the table."""

import math
from collections.abc import Callable
from typing import Any

from rnnfast_kernels.equations.graph import Graph, Node
from rnnfast_kernels.equations.operations import call, where


class Refusal(Exception):
    """What is not possible, and what to write instead."""


class Condition:
    """A comparison: chooses between two values, given as nodes."""

    def __init__(self, graph: Graph, choose: "Callable[[Any, Any], Node]"):
        self.graph, self.choose = graph, choose

    def number(self) -> Node:
        """Return 1 where it holds, else 0."""
        return self.choose(self.graph.number(1.0), self.graph.number(0.0))


Value = Node | Condition


def node_of(given: Any) -> Node:
    """Return a node; a condition counts as 0 or 1."""
    if isinstance(given, Condition):
        return given.number()
    if isinstance(given, Node):
        return given
    raise Refusal(f"expected a value or a number, got {type(given).__name__}")


def condition(given: Any) -> Condition:
    if isinstance(given, Condition):
        return given
    raise Refusal("expected a comparison, got a value", "compare it, as in value > 0")


def compare(relation: str, turned: bool = False, negated: bool = False) -> Callable:
    """Return the comparison of two values. turned: with its operands exchanged. negated: the opposite of `relation`."""

    def function(input, other) -> Condition:
        a, b = node_of(input), node_of(other)
        a, b = (b, a) if turned else (a, b)

        def choose(yes, no):
            yes, no = (no, yes) if negated else (yes, no)
            return where(a, relation, a, b, yes, no)

        return Condition(a.graph, choose)

    return function


def logical_and(input, other) -> Condition:
    first, second = condition(input), condition(other)
    return Condition(first.graph, lambda yes, no: first.choose(second.choose(yes, no), no))


def logical_or(input, other) -> Condition:
    first, second = condition(input), condition(other)
    return Condition(first.graph, lambda yes, no: first.choose(yes, second.choose(yes, no)))


def logical_not(input) -> Condition:
    given = condition(input)
    return Condition(given.graph, lambda yes, no: given.choose(no, yes))


def where_(input, *args) -> Value:
    """`torch.where(condition, a, b)`, and `a.where(condition, b)`."""
    if len(args) != 2:
        raise Refusal("torch.where without values", "write torch.where(condition, a, b)")
    if isinstance(args[0], Condition) and not isinstance(input, Condition):
        input, args = args[0], (input, args[1])
    given, (a, b) = condition(input), args
    if isinstance(a, Condition) and isinstance(b, Condition):
        return Condition(given.graph, lambda yes, no: given.choose(a.choose(yes, no), b.choose(yes, no)))
    return given.choose(node_of(a), node_of(b))


def of_conditions(values: Callable, conditions: Callable) -> Callable:
    """Return a function of two values that does something else to two comparisons, as torch does to booleans."""

    def function(input, other=None, **options) -> Value:
        both = isinstance(input, Condition) and isinstance(other, Condition)
        return (conditions if both else values)(input, other, **options)

    return function


def sum_of_conditions(input, other, **options):
    raise Refusal(
        "a sum of two comparisons, which torch takes as `or`", "write a | b, or a.float() + b to count how many hold"
    )


def unary(name: str) -> Callable:
    return lambda input: call(name, node_of(input))


def binary(name: str) -> Callable:
    return lambda input, other: call(name, node_of(input), node_of(other))


def add(input, other, *, alpha=None) -> Node:
    return node_of(input) + (node_of(other) if alpha is None else node_of(other) * alpha)


def subtract(input, other, *, alpha=None) -> Node:
    return node_of(input) - (node_of(other) if alpha is None else node_of(other) * alpha)


def divide(input, other, *, rounding_mode=None) -> Node:
    if rounding_mode is not None:
        raise Refusal("torch.div with rounding_mode")
    return node_of(input) / node_of(other)


def power(input, exponent) -> Node:
    base, number = node_of(input), node_of(exponent).number
    if number in (0.5, -0.5):
        return call("sqrt" if number > 0 else "rsqrt", base)
    if number is None or number != int(number) or abs(number) > 8:
        raise Refusal(
            "a power whose exponent is not a whole number up to 8, 0.5 or -0.5",
            "write torch.exp(exponent * torch.log(base))",
        )
    one = result = base.graph.number(1.0)
    factor = base if number >= 0 else one / base
    for _ in range(int(abs(number))):
        result = result * factor
    return result


def bound(given: Any) -> float | None:
    if given is None:
        return None
    number = node_of(given).number
    if number is None:
        raise Refusal("clamp with a bound that is not a number", "write torch.maximum and torch.minimum")
    return number


def clamp(input, min=None, max=None) -> Node:
    node, low, high = node_of(input), bound(min), bound(max)
    if low is None and high is None:
        raise Refusal("clamp without bounds")
    node = node if low is None or low == -math.inf else call("clamp_low", node, low)
    return node if high is None or high == math.inf else call("clamp_high", node, high)


def extremum(name: str) -> Callable:
    """`maximum` of two values; `max` with a dimension is a reduction."""

    def function(input, other=None) -> Node:
        if other is None:
            raise Refusal(f"torch.{name[:3]} of one value is a reduction: a step sees one unit at a time")
        return call(name, node_of(input), node_of(other))

    return function


def softplus(input, beta=1, threshold=20) -> Node:
    scale = 1.0 if beta == 1 else bound(beta)
    if threshold != 20 and bound(threshold) != 20:
        raise Refusal("softplus with another threshold than 20")
    return call("softplus", node_of(input) * scale) / scale


def elu(input, alpha=1.0, inplace=False) -> Node:
    node = node_of(input)
    negative = call("expm1", where(node, "greater", node, 0.0, 0.0, node))
    return where(node, "greater", node, 0.0, node, negative * bound_or(alpha))


def bound_or(given: Any) -> float:
    return given if isinstance(given, int | float) else bound(given) or 0.0


def gelu(input, *, approximate="none") -> Node:
    x = node_of(input)
    if approximate == "tanh":
        inner = call("tanh", (x + x * x * x * 0.044715) * math.sqrt(2 / math.pi))
    elif approximate == "none":
        inner = call("erf", x * math.sqrt(0.5))
    else:
        raise Refusal(f"gelu with approximate={approximate!r}")
    return x * 0.5 * (inner + 1.0)


def silu(input, inplace=False) -> Node:
    return node_of(input) * call("sigmoid", node_of(input))


def leaky_relu(input, negative_slope=0.01, inplace=False) -> Node:
    x = node_of(input)
    return where(x, "greater", x, 0.0, x, x * bound_or(negative_slope))


def hardtanh(input, min_val=-1.0, max_val=1.0, inplace=False) -> Node:
    return call("bounded", node_of(input), bound_or(min_val), bound_or(max_val))


def hardsigmoid(input, inplace=False) -> Node:
    return call("bounded", node_of(input) + 3.0, 0.0, 6.0) / 6.0


def like(number: float) -> Callable:
    return lambda input, **options: node_of(input).graph.number(number)


def same(input, *args, **options) -> Node:
    """A conversion of dtype: a step computes in one."""
    return node_of(input)


def lerp(input, end, weight) -> Node:
    return node_of(input) + node_of(weight) * (node_of(end) - node_of(input))


def addcmul(input, tensor1, tensor2, *, value=None) -> Node:
    product = node_of(tensor1) * node_of(tensor2)
    return node_of(input) + (product if value is None else product * value)


FUNCTIONS: dict[str, Callable] = {
    "add": of_conditions(add, sum_of_conditions),
    **dict.fromkeys(("sub", "subtract"), subtract),
    **dict.fromkeys(("mul", "multiply"), of_conditions(binary("*"), logical_and)),
    **dict.fromkeys(("div", "divide", "truediv", "true_divide"), divide),
    **dict.fromkeys(("neg", "negative"), unary("neg")),
    "pos": lambda input: node_of(input),
    "pow": power,
    "square": lambda input: node_of(input) * node_of(input),
    "reciprocal": lambda input: node_of(input).graph.number(1.0) / node_of(input),
    **dict.fromkeys(("gt", "greater"), compare("greater")),
    **dict.fromkeys(("lt", "less"), compare("greater", turned=True)),
    **dict.fromkeys(("le", "less_equal"), compare("at_most")),
    **dict.fromkeys(("ge", "greater_equal"), compare("at_most", turned=True)),
    "eq": compare("equal"),
    **dict.fromkeys(("ne", "not_equal"), compare("equal", negated=True)),
    **dict.fromkeys(("and", "logical_and"), logical_and),
    **dict.fromkeys(("or", "logical_or"), logical_or),
    **dict.fromkeys(("invert", "logical_not"), logical_not),
    "where": where_,
    **{name: unary(name) for name in ("exp", "expm1", "log", "log1p", "sqrt", "rsqrt", "sin", "cos", "erf", "detach")},
    **dict.fromkeys(("abs", "absolute"), unary("abs")),
    **dict.fromkeys(("sign", "sgn"), unary("sign")),
    **{name: unary(name) for name in ("sigmoid", "tanh")},
    "relu": lambda input, inplace=False: call("relu", node_of(input)),
    **dict.fromkeys(("maximum", "max"), of_conditions(extremum("maximum"), logical_or)),
    **dict.fromkeys(("minimum", "min"), of_conditions(extremum("minimum"), logical_and)),
    **dict.fromkeys(("clamp", "clip"), clamp),
    "clamp_min": lambda input, min: clamp(input, min, None),
    "clamp_max": lambda input, max: clamp(input, None, max),
    "softplus": softplus,
    **dict.fromkeys(("logsigmoid", "log_sigmoid"), unary("logsigmoid")),
    "elu": elu,
    "gelu": gelu,
    "silu": silu,
    "leaky_relu": leaky_relu,
    "hardtanh": hardtanh,
    "relu6": lambda input, inplace=False: hardtanh(input, 0.0, 6.0),
    "hardsigmoid": hardsigmoid,
    "lerp": lerp,
    "addcmul": addcmul,
    "zeros_like": like(0.0),
    "ones_like": like(1.0),
    **dict.fromkeys(("to", "type_as", "float", "double"), same),
    "surrogate": binary("surrogate"),
}

# Names that people try, and what to write instead.
INSTEAD = {
    "matmul mm bmm linear einsum dot addmm baddbmm tensordot bilinear conv1d": "the products are W_ih x, read as "
    "x.<gate>, and W_hh h, read as u.<gate>; a step itself is pointwise, so a second product is not of this form",
    "sum mean norm var std softmax log_softmax layer_norm rms_norm batch_norm group_norm amax amin cumsum logsumexp "
    "normalize prod argmax argmin all any": "a step sees one unit at a time, so sums over units (normalisation, "
    "softmax) are not of this form",
    "dropout rand_like randn_like bernoulli alpha_dropout bernoulli_": "pass the random mask as one of the signals",
    "chunk split unbind cat stack view reshape transpose t permute unsqueeze squeeze expand flatten size "
    "shape ndim dim numel select index_select gather unflatten": "a step sees one unit at a time: gates are x.<name> "
    "and u.<name>, states are in the tuple state",
    "item tolist numpy data grad backward requires_grad requires_grad_ cpu cuda": "a step is traced once, "
    "without values",
    "add_ sub_ mul_ div_ copy_ fill_ zero_ clamp_ sigmoid_ tanh_ relu_ exp_": "values are not changed in place; "
    "write the function without the underscore",
    "atan2 atan asin acos tan sinh cosh asinh acosh atanh floor ceil round trunc frac fmod remainder sign_": "there is "
    "no operation for it; write it by those that there are",
    "heaviside": "write torch.where(value > 0, 1.0, 0.0), or rnnfast.surrogate(value, derivative) for a gradient",
}
