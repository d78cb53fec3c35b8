"""Trace a step function: call it once with symbols that record what it does.

A `Symbol` stands for a tensor. It takes part in torch's functions by `__torch_function__`, which is looked up by name,
so that torch is not imported here. What a step may not do is refused where it does it, with the line of the user's code
and what to write instead.
"""

import functools
import inspect
import linecache
import math
import numbers
import sys
import traceback
from collections.abc import Callable, Sequence
from types import FrameType
from typing import Any

from rnnfast_kernels.equations.functions import FUNCTIONS, INSTEAD, Condition, Refusal, Value
from rnnfast_kernels.equations.graph import Graph, Node
from rnnfast_kernels.equations.operations import new_graph

ARGUMENTS = ("x", "u", "state", "p", "s")
OURS = ("rnnfast", "rnnfast_kernels", "torch")


class CellError(ValueError):
    """A step function that cannot become a cell: what it does, where, and what to write instead."""


def is_ours(frame: FrameType) -> bool:
    """Say whether a frame runs code of rnnfast or torch, not the user's."""
    return frame.f_globals.get("__name__", "").split(".")[0] in OURS


def refuse(what: str, instead: str = "") -> CellError:
    """Return the error for something that the user's code does right now."""
    frame = sys._getframe(1)
    while frame.f_back is not None and is_ours(frame):
        frame = frame.f_back
    return placed(what, frame, frame.f_lineno, instead)


def placed(what: str, frame: FrameType, line: int, instead: str) -> CellError:
    """Return the error for something that the user's code does in a line of a frame."""
    file = frame.f_code.co_filename
    code = linecache.getline(file, line, frame.f_globals).strip()
    where = f"\n  {file}:{line}: {code}" if code else f"\n  {file}:{line}"
    return CellError(f"{what}{where}" + (f"\n  {instead}" if instead else ""))


def failed(what: str, error: Exception, instead: str) -> CellError:
    """Return the error for a step that raised one itself, with the line of the user's code."""
    what = f"{what}: {type(error).__name__}: {error}"
    own = [(frame, line) for frame, line in traceback.walk_tb(error.__traceback__) if not is_ours(frame)]
    return placed(what, *own[-1], instead) if own else CellError(f"{what}\n  {instead}")


class Symbol:
    """A value of a step that is not known while it is traced: a number or a condition."""

    __slots__ = ("value",)

    def __init__(self, value: Value):
        self.value = value

    # Called like a tensor's methods: everything that is not below is a function of `FUNCTIONS`.
    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        if name in ("dtype", "device"):
            return Placeholder(name)
        if name not in FUNCTIONS:
            raise refuse(*unknown(f"the method or attribute .{name}", name))
        return lambda *args, **options: apply(name, self, *args, **options)

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        name = getattr(function, "__name__", str(function))
        name = name.strip("_") if name.startswith("__") else name
        reflected = name.startswith("r") and name[1:] in FUNCTIONS and name not in FUNCTIONS
        if reflected:
            name, args = name[1:], (args[1], args[0])
        if name not in FUNCTIONS:
            module = getattr(function, "__module__", None) or "torch"
            raise refuse(*unknown(f"the function {module}.{name}", name))
        return apply(name, *args, **(kwargs or {}))

    def __bool__(self):
        raise refuse(
            "an if, and, or, not, min, max or while that depends on a value: a step is traced once, without values",
            "write torch.where(condition, a, b), torch.maximum or torch.minimum; conditions combine by & | ~",
        )

    def refused(self, *args):
        raise refuse(
            "float(), int(), round(), len(), an index or a loop over a value: a step sees one unit at a time",
            "write torch.exp and so on in place of math.exp; loop over gates by their names",
        )

    __float__ = __int__ = __complex__ = __index__ = __len__ = __iter__ = __getitem__ = __setitem__ = refused
    __contains__ = __round__ = __trunc__ = __floor__ = __ceil__ = refused

    def __array_ufunc__(self, ufunc, method, *inputs, **options):
        # What NumPy's numbers do where they stand on the left of an operator.
        name = ufunc.__name__
        if method == "__call__" and name in NUMPY_OPERATORS and any(isinstance(each, numbers.Real) for each in inputs):
            return apply(name, *inputs)
        raise refuse(f"the function numpy.{name}", "write the function of torch")

    def __array__(self, *args, **options):
        raise refuse("a NumPy function of a value", "write the function of torch")

    __hash__ = object.__hash__


NUMPY_OPERATORS = (
    "add", "subtract", "multiply", "divide", "true_divide", "greater", "less", "greater_equal", "less_equal",
)  # fmt: skip


class Placeholder:
    """The dtype or the device of a symbol, good only for being passed on."""

    def __init__(self, kind: str):
        self.kind = kind

    def __eq__(self, other):
        raise refuse(
            f"a look at the {self.kind} of a value: a step is traced once, for every dtype and device",
            f"pass the {self.kind} on, as in value.to(x.dtype)",
        )

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return self == name

    __hash__ = object.__hash__


def unknown(what: str, name: str) -> tuple[str, str]:
    """Say that a function is not known in a step, and what there is instead."""
    for names, instead in INSTEAD.items():
        if name in names.split():
            return f"{what} cannot be used in a step", instead
    known = ", ".join(sorted(each for each in FUNCTIONS if each not in HIDDEN))
    return f"{what} is not known in a step", f"there are the operators + - * / ** and comparisons, and {known}"


HIDDEN = {
    "add", "sub", "mul", "div", "truediv", "true_divide", "neg", "negative", "pos", "pow", "gt", "lt", "ge", "le",
    "eq", "ne", "and", "or", "invert", "absolute", "type_as", "to", "float", "double", "greater", "less", "sgn",
    "greater_equal", "less_equal", "not_equal", "multiply", "subtract", "divide", "clamp_min", "clamp_max", "clip",
}  # fmt: skip


def apply(name: str, *args, **options) -> Symbol:
    """Apply a function of `FUNCTIONS` to symbols and numbers."""
    graph = next(each.value.graph for each in (*args, *options.values()) if isinstance(each, Symbol))
    plain = [plainly(name, each, graph) for each in args]
    named = {key: plainly(name, each, graph) for key, each in options.items()}
    try:
        found = FUNCTIONS[name](*plain, **named)
    except Refusal as refusal:
        raise refuse(*refusal.args) from None
    except TypeError as error:
        raise refuse(f"{name} with these arguments: {error}") from None
    return Symbol(found)


def plainly(name: str, argument: Any, graph: Graph) -> Any:
    """Turn an argument of a function into what `FUNCTIONS` takes."""
    if isinstance(argument, Symbol):
        return argument.value
    if isinstance(argument, bool) or argument is None or isinstance(argument, str | Placeholder):
        return argument
    if isinstance(argument, numbers.Real):
        if math.isnan(argument):
            raise refuse(f"NaN as an argument of {name}")
        return graph.number(float(argument))
    kind = type(argument)
    if kind.__module__.split(".")[0] == "torch" and kind.__name__ == "dtype":
        return None
    what = f"a {kind.__module__.split('.')[0]}.{kind.__name__} as an argument of {name}"
    raise refuse(
        f"{what}: a step works on x, u, state, p, s and Python numbers",
        "declare it as one of the parameters (learned, one value for each unit) or the signals (given at each call), "
        "or write a Python number",
    )


OPERATORS = {
    "add": "add", "sub": "sub", "mul": "mul", "truediv": "div", "pow": "pow",
    "gt": "gt", "lt": "lt", "ge": "ge", "le": "le", "eq": "eq", "ne": "ne", "and": "and", "or": "or",
}  # fmt: skip


def add_operators() -> None:
    """Give symbols the operators."""

    def forward(name):
        return lambda self, other: apply(name, self, other)

    def reflected(name):
        return lambda self, other: apply(name, other, self)

    def in_place(name):
        def method(self, other):
            if isinstance(self.value, Node) and self.value.op in ("leaf", "detach"):
                raise refuse(
                    "a change in place of a value that the step was given",
                    "write h = h + value, not h += value: the caller's tensor would change",
                )
            self.value = apply(name, self, other).value
            return self

        return method

    def refused(symbol, instead):
        def method(self, *others):
            raise refuse(f"the operator {symbol} in a step", instead)

        return method

    for operator, name in OPERATORS.items():
        setattr(Symbol, f"__{operator}__", forward(name))
        if operator in ("add", "sub", "mul", "truediv", "pow", "and", "or"):
            setattr(Symbol, f"__r{operator}__", reflected(name))
            setattr(Symbol, f"__i{operator}__", in_place(name))
    for operator, name in {"neg": "neg", "pos": "pos", "invert": "invert", "abs": "abs"}.items():
        setattr(Symbol, f"__{operator}__", lambda self, name=name: apply(name, self))
    matrix = "the products are W_ih x, read as x.<gate>, and W_hh h, read as u.<gate>; a step itself is pointwise"
    for operator, symbol, instead in (
        ("matmul", "@", matrix),
        ("mod", "%", "there is no function for it"),
        ("floordiv", "//", "write / and, for a step function, torch.where"),
        ("xor", "^", "write a power as **, and an exclusive or by & | ~"),
    ):
        setattr(Symbol, f"__{operator}__", refused(symbol, instead))
        setattr(Symbol, f"__r{operator}__", refused(symbol, instead))


add_operators()


class Group:
    """Values by name and by index: `x.i`, `x[0]`, or all in order by unpacking."""

    def __init__(self, kind: str, names: Sequence[str], values: Sequence[Any], hint: str = ""):
        self._kind, self._names, self._values, self._hint = kind, tuple(names), tuple(values), hint

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        if name not in self._names:
            raise refuse(self._absent(f"{self._kind}.{name}"), self._hint)
        return self._values[self._names.index(name)]

    def __getitem__(self, position) -> Any:
        if isinstance(position, str):
            return getattr(self, position)
        try:
            return self._values[position]
        except IndexError:
            raise refuse(self._absent(f"{self._kind}[{position}]"), self._hint) from None

    def _absent(self, what: str) -> str:
        there = ", ".join(f"{self._kind}.{name}" for name in self._names) or "nothing"
        return f"{what} is used but not declared; there is {there}"

    def __iter__(self):
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)


def name_of(function: Callable) -> str:
    """Return what a step function is called; an object that is called and a `functools.partial` have no name."""
    function = function.func if isinstance(function, functools.partial) else function
    return getattr(function, "__name__", type(function).__name__)


def call_step(function: Callable, groups: dict[str, Any]) -> Any:
    """Call a step function with those of its arguments that it takes."""
    return function(**{name: groups[name] for name in arguments_of(function)})


def as_tuple(result: Any) -> tuple:
    """Return what a step returned as a tuple."""
    return tuple(result) if isinstance(result, tuple | list | Group) else (result,)


def arguments_of(function: Callable) -> tuple[str, ...]:
    """Return the names of a step function's arguments."""
    found = []
    try:
        parameters = inspect.signature(function).parameters
    except (TypeError, ValueError):
        raise CellError(f"{name_of(function)}: its arguments cannot be read; write a function in Python") from None
    for name, parameter in parameters.items():
        if parameter.kind is parameter.POSITIONAL_ONLY:
            raise CellError(f"{name_of(function)}: the argument {name} is passed by name; write no / behind it")
        if name in ARGUMENTS and parameter.kind is not parameter.VAR_POSITIONAL:
            found.append(name)
        elif parameter.default is parameter.empty:
            raise CellError(
                f"{name_of(function)}: the argument {name} is not known; a step takes some of x (input parts), "
                f"u (recurrent parts), state, p (parameters) and s (signals), by these names"
            )
    return tuple(found)


class Traced:
    """A step as a graph: the leaves of each group, the new states, and names of its local variables for display."""

    def __init__(self, function: Callable, names: dict[str, tuple[str, ...]]):
        """names: of the values in each group of `ARGUMENTS`, in order."""
        self.graph = new_graph()
        self.leaves = {group: self.graph.leaves(group, len(each)) for group, each in names.items()}
        self.hints: dict[Node, str] = {}
        self.new_state = self.run(function, names)

    def run(self, function: Callable, names: dict[str, tuple[str, ...]]) -> tuple[Node, ...]:
        """Call the function with symbols."""
        hint = "a gate without a recurrent part has no entry in u; recurrent= names those that have one"
        groups: dict[str, Any] = {
            group: Group(group, names[group], [Symbol(leaf) for leaf in leaves], hint if group == "u" else "")
            for group, leaves in self.leaves.items()
        }

        def keep_names(frame, event, argument):
            if event == "return" and frame.f_code is getattr(function, "__code__", None):
                self.hints = {
                    each.value: name
                    for name, each in frame.f_locals.items()
                    if isinstance(each, Symbol) and isinstance(each.value, Node)
                }

        # Names of local variables are for display; without them, where a profiler is at work.
        watched = sys.getprofile() is None
        if watched:
            sys.setprofile(keep_names)
        try:
            result = call_step(function, groups)
        except CellError:
            raise
        except Exception as error:  # whatever the user's code raises
            what = f"{name_of(function)}: the step cannot be traced"
            instead = "a step is traced once, with symbols in place of tensors, which have no values and formats"
            raise failed(what, error, instead) from error
        finally:
            if watched:
                sys.setprofile(None)
        return self.states_of(name_of(function), result, names["state"])

    def states_of(self, name: str, result: Any, states: tuple[str, ...]) -> tuple[Node, ...]:
        """Check what a step returned."""
        given = as_tuple(result)
        if len(given) != len(states):
            raise CellError(
                f"{name}: expected the {len(states)} new states ({', '.join(states)}), got {len(given)} values; "
                "a step returns its new states in the order of states="
            )
        found = []
        for state, each in zip(states, given, strict=True):
            if isinstance(each, numbers.Real) and not isinstance(each, bool):
                found.append(self.graph.number(float(each)))
            elif isinstance(each, Symbol):
                value = each.value
                found.append(value.number() if isinstance(value, Condition) else value)
            else:
                raise CellError(
                    f"{name}: expected a value for the new state {state}, got {type(each).__name__}; "
                    "a step returns its new states in the order of states="
                )
        return tuple(found)
