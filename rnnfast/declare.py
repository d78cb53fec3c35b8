"""`rnnfast.cell`: declare a cell by one step, written in plain torch; and `rnnfast.surrogate`.

The step is traced once, at the declaration, which refuses what cannot become a kernel, and compared with torch
(`step_check`). Kernels, gradients and the plain loop are derived from what was traced. A declared cell is known by its
identity, its name and a digest of its equations.
"""

import hashlib
import re
import unicodedata
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

from rnnfast_kernels.bind import bind
from rnnfast_kernels.cells import CELLS
from rnnfast_kernels.equations import cell as equations
from rnnfast_kernels.equations import display, trace
from torch import Tensor

from rnnfast import reference, step_check, tangent, torch_functions
from rnnfast.spec import cell_named

CellError = trace.CellError
Names = str | Sequence[str]


class Cell:
    """A declared cell, to be given to `rnnfast.Recurrent`.

    Called with tensors, it is one step in eager torch. Printed, it shows its equations, what backward keeps, and the
    derived gradient.

    identity: name and digest, under which compiled and exported programs know the cell.
    """

    def __init__(self, function: Callable[..., Any], declared: equations.Cell, read: str):
        """declared: the cell with its states as the user orders them. read: the state that the product takes."""
        self.function, self.declared = function, declared
        named = function.func if isinstance(function, partial) else function
        self.__name__, self.__doc__, self.__module__ = declared.name, named.__doc__, named.__module__
        self.__wrapped__ = function
        self.gates, self.recurrent = declared.gate_names, declared.recurrent_names
        self.states, self.parameters, self.signals = declared.states, declared.parameters, declared.signals
        self.output, self.read = declared.states[declared.output], read
        # Loops take the state that the product reads first.
        self.order = tuple(sorted(range(len(self.states)), key=lambda n: self.states[n] != read))
        # Where loops have the states in the order of the declaration.
        self.places = tuple(map(self.order.index, range(len(self.order))))
        self.kernel = self.reordered()
        # Cells whose states the user orders differently may be the same to the loops.
        digest = hashlib.sha256(f"{self.kernel.digest} {self.order}".encode()).hexdigest()[:12]
        self.identity = f"{re.sub(r'[^0-9A-Za-z_]', '_', declared.name)}-{digest}"
        self.kernel.name = self.identity

    def reordered(self) -> equations.Cell:
        """Return the cell as loops take it."""
        order, declared = self.order, self.declared
        states = tuple(self.states[n] for n in order)
        step = self.in_loop_order if order != tuple(range(len(order))) else self.function
        return equations.Cell(
            declared.name,
            step,
            self.gates,
            states,
            recurrent=self.recurrent,
            parameters=self.parameters,
            signals=self.signals,
            output=states.index(self.output),
        )

    def in_loop_order(self, x, u, state, p, s) -> tuple:
        """Call the step with its states in the order of loops."""
        ordered = [state[n] for n in self.places]
        groups = {"x": x, "u": u, "state": trace.Group("state", self.states, ordered), "p": p, "s": s}
        new = trace.as_tuple(trace.call_step(self.function, groups))
        return tuple(new[n] for n in self.order)

    def step(self, x, u, state, p=(), s=()) -> tuple[Tensor, ...]:
        """Run one step on sequences of tensors, states in the order of loops."""
        groups = {"x": x, "u": u, "p": p, "s": s}
        named: dict[str, Any] = {
            name: trace.Group(name, self.declared.groups[name], values) for name, values in groups.items()
        }
        return self.in_loop_order(**named, state=tuple(state))

    def __call__(self, *args: Any, **options: Any) -> Any:
        """Run one step in eager torch.

        The arguments are the function's. x and u may be tensors whose last dimension holds the gates one after another,
        and x, u, p and s sequences or mappings of tensors by name.
        """
        names = trace.arguments_of(self.function)
        if len(args) > len(names):
            raise TypeError(f"{self.__name__} takes {', '.join(names)}, got {len(args)} arguments")
        given = dict(zip(names, args, strict=False)) | options
        return self.function(**{name: self.grouped(name, each) for name, each in given.items()})

    def grouped(self, name: str, given: Any) -> Any:
        """Give an argument of a step names."""
        names = self.declared.groups.get(name)
        if names is None or isinstance(given, trace.Group):
            return given
        if isinstance(given, Mapping):
            if set(given) != set(names):
                raise ValueError(f"{self.__name__}: expected {', '.join(names)} in {name}, got {', '.join(given)}")
            return trace.Group(name, names, [given[each] for each in names])
        if isinstance(given, Tensor):
            if given.shape[-1:].numel() % max(len(names), 1):
                raise ValueError(
                    f"{self.__name__}: expected {len(names)} entries of one width in {name}, got {list(given.shape)}"
                )
            given = given.chunk(len(names), -1)
        if isinstance(given, (tuple, list)):
            if len(given) != len(names):
                raise ValueError(f"{self.__name__}: expected {len(names)} entries in {name}, got {len(given)}")
            return trace.Group(name, names, given)
        return given

    def __str__(self) -> str:
        return display.text(self.declared, self.read, self.__doc__)

    def __repr__(self) -> str:
        return f"<rnnfast.cell {self.identity}>"

    def __reduce__(self):
        return found, (self.identity,)

    def __deepcopy__(self, memo) -> "Cell":
        return self


DECLARED: dict[str, Cell] = {}


def found(identity: str) -> Cell:
    """Return a declared cell by its identity."""
    cell_named(identity)  # which declares the library's
    return DECLARED[identity]


def cell(
    gates: Names,
    states: Names = "h",
    *,
    recurrent: Names | None = None,
    parameters: Names = (),
    signals: Names = (),
    output: str | None = None,
    read: str | None = None,
) -> Callable[[Callable[..., Any]], Cell]:
    """Declare a cell: a decorator of one step, a function of some of `x`, `u`, `state`, `p` and `s`.

    Args:
        gates: names of the entries of `x`, the input part W_ih x + b_ih of each gate, and of `u`, the recurrent part
            W_hh h + b_hh, in the order of the weights' rows.
        states: names of the states, in the order of the tuple `state` and of what the step returns.
        recurrent: the gates that have an entry in `u`, if not all; empty for a cell without a recurrent product.
        parameters: names of learned vectors [H], the entries of `p`.
        signals: names of further inputs of each step, broadcastable to [T, B, H], the entries of `s`.
        output: the state that is the layer's output. Default: the first.
        read: the state that the recurrent product takes. Default: the output.

    Names are given as a sequence, or as one string with spaces between.

    Raises:
        CellError: the step does something that cannot become a kernel, or the declaration does not fit it.
    """
    split = {
        "gates": names(gates, "gates"),
        "states": names(states, "states"),
        "parameters": names(parameters, "parameters"),
        "signals": names(signals, "signals"),
    }
    split["recurrent"] = split["gates"] if recurrent is None else names(recurrent, "recurrent")

    def declare(function: Callable[..., Any]) -> Cell:
        if not callable(function):
            raise TypeError(f"rnnfast.cell: expected a function to decorate, got {type(function).__name__}")
        name = trace.name_of(function)
        check_names(name, split)
        shown = split["states"][0] if output is None else output
        taken = shown if read is None else read
        for what, state in (("output", shown), ("read", taken)):
            if state not in split["states"]:
                raise CellError(f"{name}: {what}={state!r} is not one of the states {', '.join(split['states'])}")
        declared = equations.Cell(
            name,
            function,
            split["gates"],
            split["states"],
            recurrent=split["recurrent"],
            parameters=split["parameters"],
            signals=split["signals"],
            output=split["states"].index(shown),
        )
        declared.check()
        step_check.check(declared)
        made = Cell(function, declared, taken if declared.recurrent else shown)
        return register(made)

    return declare


def names(given: Names, what: str) -> tuple[str, ...]:
    """Split names."""
    if isinstance(given, str):
        given = given.split()
    if not isinstance(given, Sequence) or not all(isinstance(each, str) for each in given):
        raise CellError(
            f"{what}: expected names in one string or a sequence, as in @rnnfast.cell(gates='i f g o'), got {given!r}"
        )
    return tuple(given)


def check_names(cell: str, split: Mapping[str, tuple[str, ...]]) -> None:
    """Refuse names that cannot be attributes, that occur twice, or of which there are too few."""
    for what, each in split.items():
        for name in each:
            if not re.fullmatch(r"[^\W\d]\w*", name) or name.startswith("_"):
                raise CellError(f"{cell}: {what}: expected names with spaces between, got {name!r}")
            if unicodedata.normalize("NFKC", name) != name:
                normal = unicodedata.normalize("NFKC", name)
                raise CellError(f"{cell}: {what}: Python reads the name {name!r} as {normal!r}; declare that")
        if len(set(each)) != len(each):
            raise CellError(f"{cell}: {what}: a name occurs twice in {' '.join(each)!r}")
    if not split["states"]:
        raise CellError(f"{cell}: expected at least one state")
    unknown = set(split["recurrent"]) - set(split["gates"])
    if unknown:
        raise CellError(f"{cell}: recurrent: {', '.join(sorted(unknown))} is not one of the gates")
    clash = set(split["parameters"]) & {"weight_ih", "weight_hh", "bias_ih", "bias_hh"}
    if clash:
        raise CellError(f"{cell}: parameters: {', '.join(sorted(clash))} is the name of a weight")


def register(made: Cell) -> Cell:
    """Make a cell known to whatever runs layers. One with the same equations and name takes the place of another."""
    CELLS[made.identity] = made.kernel
    DECLARED[made.identity] = made
    reference.STEPS[made.identity] = made.step
    if made.kernel.standard:
        reference.FORWARD[made.identity] = bind(made.kernel.forward, torch_functions.FORWARD)
        tangent.BACKWARD[made.identity] = bind(made.kernel.backward, torch_functions.BACKWARD)
    return made


def surrogate(value: Tensor, derivative: Tensor | float | Callable[[Tensor], Tensor | float]) -> Tensor:
    """Return 1 where value > 0, else 0, with a derivative by `value` that is given: a spike (Neftci et al., 2019).

    Args:
        value: a tensor, or what a step is called with where a cell is declared.
        derivative: a tensor or a number, or a function of `value` that returns one.

    Raises:
        TypeError: `value` is neither.
    """
    slope = derivative(value) if callable(derivative) else derivative
    if isinstance(value, Tensor):
        return torch_functions.surrogate(value, slope)
    if not isinstance(value, trace.Symbol):
        raise TypeError(f"surrogate: expected a tensor, got {type(value).__name__}")
    return trace.apply("surrogate", value, slope)
