"""Expression graphs as the source of Python functions."""

import hashlib
import linecache
import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from rnnfast_kernels.equations.graph import Node, ordered
from rnnfast_kernels.equations.operations import INFIX

# Results of a function: nested tuples of nodes. None stands for 0.
Results = Sequence["Node | Results | None"]
ATOM = 9
# Length of an expression that is worth a line of its own.
LONG = 60


class Writer:
    """Writes statements that compute nodes, each once.

    names: what the nodes that are given are called. hints: names for other nodes, used once each.
    """

    def __init__(self, names: Mapping[Node, str], hints: Mapping[Node, str] | None = None):
        self.names = dict(names)
        self.hints = dict(hints or {})
        self.taken = {name.split("[")[0].split(".")[0] for name in self.names.values()}
        self.lines: list[str] = []

    def write(self, roots: Sequence[Node]) -> None:
        """Write statements for what roots want and what is used several times, has a name to bear, or is long."""
        nodes = ordered(roots, known=self.names)
        uses = Counter([*roots, *(operand for node in nodes for operand in node.operands)])
        for node in nodes:
            if node.op == "leaf":
                raise ValueError(f"the value of {node.args} is not there")
            if node.op != "number" and (uses[node] > 1 or node in self.hints or len(self.text(node)) > LONG):
                self.assign(node)

    def assign(self, node: Node) -> None:
        """Write a statement that gives a node a name."""
        text, name = self.text(node), self.hints.get(node, "")
        if not name or name in self.taken:
            name = next(each for n in range(len(self.taken) + 1) if (each := f"{name or 'v'}{n}") not in self.taken)
        self.taken.add(name)
        self.names[node] = name
        self.lines.append(f"{name} = {text}")

    def text(self, node: Node) -> str:
        """Return the expression of a node."""
        return self.expression(node)[0]

    def expression(self, node: Node) -> tuple[str, int]:
        """Return the expression of a node and how tightly it binds."""
        if node in self.names:
            return self.names[node], ATOM
        if node.number is not None:
            if math.isnan(node.number):
                return "(1e999 - 1e999)", ATOM
            text = "1e999" if math.isinf(node.number) else repr(abs(node.number))
            return (text, ATOM) if math.copysign(1, node.number) > 0 else (f"-{text}", 3)
        if node.op == "neg":
            return f"-{self.inner(node.args[0], 3)}", 3
        if node.op in INFIX:
            level = INFIX[node.op]
            left, right = self.inner(node.args[0], level), self.inner(node.args[1], level + 1)
            return f"{left} {node.op} {right}", level
        return f"{node.op}({', '.join(map(self.text, node.args))})", ATOM

    def inner(self, node: Node, level: int) -> str:
        """Return the expression of an operand, in parentheses where it binds less than `level`."""
        text, own = self.expression(node)
        return text if own >= level else f"({text})"

    def results(self, results: Results, zero: str) -> str:
        """Return the expression of nested tuples. zero: what stands for a node that is 0."""
        inner = (
            zero if each is None else self.text(each) if isinstance(each, Node) else self.results(each, zero)
            for each in results
        )  # fmt: skip
        return f"({''.join(f'{each}, ' for each in inner).rstrip() if len(results) == 1 else ', '.join(inner)})"


def flat(results: Results) -> list[Node]:
    """List the nodes of nested tuples."""
    found: list[Node] = []
    for each in results:
        if isinstance(each, Node):
            found.append(each)
        elif each is not None:
            found += flat(each)
    return found


def source(name: str, arguments: Sequence[str], names: Mapping[Node, str], results: Results, zero: str = "") -> str:
    """Write a function. zero: the expression of a result that is 0."""
    writer = Writer(names)
    writer.write(flat(results))
    returned = writer.results(results, zero)
    body = [*writer.lines, f"return {returned}"]
    return f"def {name}({', '.join(arguments)}):\n" + "".join(f"    {line}\n" for line in body)


def compiled(name: str, text: str) -> Callable:
    """Compile a function, which keeps its source as `text`."""
    file = f"<{name}, derived, {hashlib.sha256(text.encode()).hexdigest()[:12]}>"
    namespace: dict[str, Any] = {}
    exec(compile(text, file, "exec"), namespace)
    namespace[name].text = text
    return shown(namespace[name])


def shown(function: Any) -> Any:
    """Have `inspect` find the source of a compiled function, for compilers and for readers of a traceback.

    `linecache.clearcache` makes it forget every source that is in no file.
    """
    file, text = function.__code__.co_filename, function.text
    linecache.cache[file] = (len(text), None, text.splitlines(keepends=True), file)
    return function
