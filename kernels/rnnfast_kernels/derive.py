"""Derivatives of a cell's equations, derived from the equations: more plain Python over the names that `bind` supplies.

    push(x_dot, u_dot, state_dot, saved, state, new_state)   -> new_state_dot, saved_dot
    bend(dstate, saved, state, new_state, dstate_dot, saved_dot, state_dot, new_state_dot)
        -> (dx, du, dstate_direct), (dx_dot, du_dot, dstate_direct_dot)

`name_dot` is how `name` changes. `push` differentiates a cell's `forward`, `bend` its `backward`; the other names are
those of `cells`. `push` does without x and u: it takes the values it needs from what the cell saved.

A cell's function is called once with symbols for numbers. The expressions that come back are written out again, values
and changes, as the source of a function. What the names `f_bend(dot, dy, y)` mean: how `f_backward(dy, y)` changes
where y does so by `dot`.
"""

import linecache
from collections.abc import Callable, Iterable, Sequence

from rnnfast_kernels.bind import bind
from rnnfast_kernels.cells import Cell

# For each argument, what its change does to the result; `dot` is that change, `a` and `b` are the arguments' values.
CHANGES = {
    "+": ("{dot}", "{dot}"),
    "-": ("{dot}", "-{dot}"),
    "*": ("{dot} * {b}", "{a} * {dot}"),
    "sigmoid": ("sigmoid_backward({dot}, {result})",),
    "tanh": ("tanh_backward({dot}, {result})",),
    "relu": ("relu_backward({dot}, {result})",),
    "sigmoid_backward": ("sigmoid_backward({dot}, {b})", "sigmoid_bend({dot}, {a}, {b})"),
    "tanh_backward": ("tanh_backward({dot}, {b})", "tanh_bend({dot}, {a}, {b})"),
    "relu_backward": ("relu_backward({dot}, {b})", ""),
    "zeros_like": ("",),
}


class Symbol:
    """An unknown number, or an operation on others."""

    def __init__(self, operation: str = "", *operands: "Symbol"):
        self.operation, self.operands = operation, operands

    def __add__(self, other: "Symbol") -> "Symbol":
        return Symbol("+", self, other)

    def __sub__(self, other: "Symbol") -> "Symbol":
        return Symbol("-", self, other)

    def __mul__(self, other: "Symbol") -> "Symbol":
        return Symbol("*", self, other)


Symbols = tuple[Symbol, ...]
FUNCTIONS = {name: (lambda *operands, name=name: Symbol(name, *operands)) for name in CHANGES if name.isidentifier()}


def symbols(count: int) -> Symbols:
    return tuple(Symbol() for _ in range(count))


class Writer:
    """Statements that compute values and changes of symbols, each written once and only if something wants it."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self.values: dict[Symbol, str] = {}
        self.changes: dict[Symbol, str] = {}

    def know(self, name: str, given: Symbols) -> None:
        """Let `name[n]` be the value of a symbol, where it is not yet known."""
        for place, symbol in enumerate(given):
            self.values.setdefault(symbol, f"{name}[{place}]")

    def vary(self, name: str, given: Symbols) -> None:
        """Let `name[n]` be the change of a symbol."""
        self.changes |= {symbol: f"{name}[{place}]" for place, symbol in enumerate(given)}

    def write(self, expression: str) -> str:
        name = f"v{len(self.lines)}"
        self.lines.append(f"    {name} = {expression}\n")
        return name

    def value(self, symbol: Symbol) -> str:
        if symbol not in self.values:
            if not symbol.operation:
                raise ValueError("a cell's derivatives want a value that the cell does not save")
            operands = [self.value(operand) for operand in symbol.operands]
            joined = f" {symbol.operation} ".join(operands)
            call = f"{symbol.operation}({', '.join(operands)})"
            self.values[symbol] = self.write(call if symbol.operation in FUNCTIONS else joined)
        return self.values[symbol]

    def change(self, symbol: Symbol) -> str:
        """The name of a symbol's change, empty if it is 0."""
        if symbol not in self.changes:
            terms = []
            for operand, change in zip(symbol.operands, CHANGES.get(symbol.operation, ()), strict=True):
                dot = self.change(operand) if change else ""
                if dot:
                    terms.append(change.format_map(Operands(self, symbol, dot)))
            self.changes[symbol] = self.write(" + ".join(terms)) if terms else ""
        return self.changes[symbol]

    def change_or_zero(self, symbol: Symbol) -> str:
        return self.change(symbol) or f"zeros_like({self.value(symbol)})"

    def function(self, name: str, arguments: str, results: Iterable[str]) -> Callable:
        """Compile what was written; its source stays, for compilers and for readers of a traceback."""
        source = "".join((f"def {name}({arguments}):\n", *self.lines, f"    return {', '.join(results)}\n"))
        file = f"<{name}, derived>"
        linecache.cache[file] = (len(source), None, source.splitlines(keepends=True), file)
        namespace: dict[str, Callable] = {}
        exec(compile(source, file, "exec"), namespace)
        return namespace[name]


class Operands(dict):
    """What may stand in a change of `CHANGES`. Values are written when they are asked for."""

    def __init__(self, writer: Writer, symbol: Symbol, dot: str):
        super().__init__(dot=dot)
        self.of = {"a": symbol.operands[0], "b": symbol.operands[-1], "result": symbol}
        self.writer = writer

    def __missing__(self, key: str) -> str:
        return self.writer.value(self.of[key])


def listed(write: Callable[[Symbol], str], results: Sequence[Symbol]) -> str:
    return f"({''.join(write(result) + ', ' for result in results)})"


def push(cell: Cell) -> Callable:
    """Differentiate a cell's `forward`."""
    x, u, state = symbols(cell.gates), symbols(cell.gates), symbols(len(cell.states))
    new_state, saved = bind(cell.forward, FUNCTIONS)(x, u, state)
    writer = Writer()
    for name, given in (("state", state), ("saved", saved), ("new_state", new_state)):
        writer.know(name, given)
    for name, given in (("x_dot", x), ("u_dot", u), ("state_dot", state)):
        writer.vary(name, given)
    results = [listed(writer.change_or_zero, parts) for parts in (new_state, saved)]
    return writer.function(f"{cell.name}_push", "x_dot, u_dot, state_dot, saved, state, new_state", results)


def bend(cell: Cell) -> Callable:
    """Differentiate a cell's `backward`."""
    states = len(cell.states)
    names = ("dstate", "saved", "state", "new_state")
    given = [symbols(count) for count in (states, cell.saved, states, states)]
    parts = bind(cell.backward, FUNCTIONS)(*given)
    writer = Writer()
    for name, each in zip(names, given, strict=True):
        writer.know(name, each)
        writer.vary(f"{name}_dot", each)
    results = [
        f"({', '.join(listed(write, part) for part in parts)})" for write in (writer.value, writer.change_or_zero)
    ]
    return writer.function(f"{cell.name}_bend", ", ".join((*names, *(f"{name}_dot" for name in names))), results)
