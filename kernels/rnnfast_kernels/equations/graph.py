"""Expression graphs: operations over numbers and unknown values, each written once."""

import math
from collections.abc import Callable, Iterable


class Node:
    """An operation on other nodes; a number ("number"); or an unknown value ("leaf"): a group's name and a position.

    Nodes of a graph are equal only if they are the same object.
    """

    __slots__ = ("args", "graph", "op", "order")

    def __init__(self, graph: "Graph", op: str, args: tuple, order: int):
        self.graph, self.op, self.args, self.order = graph, op, args, order

    @property
    def operands(self) -> tuple["Node", ...]:
        """Return the nodes that this one depends on."""
        return () if self.op in ("number", "leaf") else self.args

    @property
    def number(self) -> float | None:
        """Return the value of a number, None for other nodes."""
        return self.args[0] if self.op == "number" else None

    def __add__(self, other: "Node | float") -> "Node":
        return self.graph.make("+", self, other)

    def __sub__(self, other: "Node | float") -> "Node":
        return self.graph.make("-", self, other)

    def __mul__(self, other: "Node | float") -> "Node":
        return self.graph.make("*", self, other)

    def __truediv__(self, other: "Node | float") -> "Node":
        return self.graph.make("/", self, other)

    def __neg__(self) -> "Node":
        return self.graph.make("neg", self)

    def __repr__(self) -> str:
        return f"{self.op}{self.args}"


class Graph:
    """The nodes made so far. Equal operations on the same nodes are one node."""

    def __init__(self, values: dict[str, Callable[..., float]]):
        """values: for each operation, what it does to numbers."""
        self.values = values
        self.nodes: dict[tuple, Node] = {}

    def leaf(self, group: str, position: int) -> Node:
        """Return an unknown value."""
        return self.intern("leaf", (group, position), (group, position))

    def leaves(self, group: str, count: int) -> tuple[Node, ...]:
        """Return the unknown values of a group."""
        return tuple(self.leaf(group, position) for position in range(count))

    def number(self, value: float) -> Node:
        """Return a number. 0.0 and -0.0 are two."""
        value = float(value)
        return self.intern("number", (value,), (repr(value),))

    def intern(self, op: str, args: tuple, key: tuple) -> Node:
        wanted = (op, *key)
        if wanted not in self.nodes:
            self.nodes[wanted] = Node(self, op, args, len(self.nodes))
        return self.nodes[wanted]

    def make(self, op: str, *operands: Node | float) -> Node:
        """Return an operation's result, simplified where that changes no value, NaN and infinity included."""
        args = tuple(each if isinstance(each, Node) else self.number(each) for each in operands)
        numbers = [each.number for each in args]
        if None not in numbers:
            return self.number(self.fold(op, *numbers))
        return self.simplified(op, args, numbers) or self.intern(op, args, tuple(map(id, args)))

    def fold(self, op: str, *numbers: float) -> float:
        try:
            return self.values[op](*numbers)
        except OverflowError:
            return math.inf  # of exp and expm1
        except ValueError:
            return math.nan

    def simplified(self, op: str, args: tuple[Node, ...], numbers: list[float | None]) -> Node | None:
        """Return what an operation on at least one unknown value comes to without it, or None."""
        first = args[0]
        if op in ("+", "*") and numbers[0] == (0.0 if op == "+" else 1.0):
            return args[1]
        if op in ("+", "-") and numbers[1] == 0.0:
            return first
        if op in ("*", "/") and numbers[1] == 1.0:
            return first
        if op == "*" and -1.0 in numbers:
            return -args[numbers[0] == -1.0]
        if op == "neg" and first.op == "neg":
            return first.args[0]
        if op == "-" and numbers[0] == 0.0:
            return -args[1]
        if op in ("+", "-") and args[1].op == "neg":
            return self.make("-" if op == "+" else "+", first, args[1].args[0])
        if op == "+" and first.op == "neg":
            return args[1] - first.args[0]
        if op.startswith("where") and args[2] is args[3]:
            return args[2]
        return None


def ordered(roots: Iterable[Node | None], known: Iterable[Node] = ()) -> list[Node]:
    """List the nodes that roots depend on, operands first, without looking into those that are known."""
    seen, stack = set(known), [root for root in roots if root is not None]
    found = []
    while stack:
        node = stack.pop()
        if node not in seen:
            seen.add(node)
            found.append(node)
            stack += node.operands
    return sorted(found, key=lambda node: node.order)
