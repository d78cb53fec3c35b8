"""A cell: a step function, its declaration, and what is derived from both."""

import hashlib
from collections.abc import Callable, Sequence
from functools import cached_property

from rnnfast_kernels.equations import emit
from rnnfast_kernels.equations.differentiate import gradient, residuals, tangent
from rnnfast_kernels.equations.graph import Node, ordered
from rnnfast_kernels.equations.trace import CellError, Traced

Nodes = tuple[Node, ...]


class Cell:
    """Pointwise equations of one step.

        forward(x, u, state)                        -> new_state, saved
        backward(dstate, saved, state, new_state)   -> dx, du, dstate_direct

    x, u            one entry per gate and per recurrent gate: input part W_ih x + b_ih, recurrent part W_hh h + b_hh
    state           one entry per state tensor; the first is the h that the recurrent product takes
    saved           what backward needs beside the states
    dstate          gradient of the loss by each entry of new_state
    dx, du          gradient by each entry of x and u
    dstate_direct   gradient by each entry of state, except the part that flows through u

    Where there are parameters or signals, both take two more arguments, p and s, and backward returns two more results,
    dp and ds. Everything but the declaration is derived when it is first asked for.
    """

    def __init__(
        self,
        name: str,
        step: Callable,
        gates: Sequence[str],
        states: Sequence[str],
        *,
        recurrent: Sequence[str] | None = None,
        parameters: Sequence[str] = (),
        signals: Sequence[str] = (),
        output: int = 0,
    ):
        """output: position of the state that is the layer's output."""
        self.name, self.step = name, step
        self.gate_names, self.states = tuple(gates), tuple(states)
        self.recurrent_names = self.gate_names if recurrent is None else tuple(recurrent)
        self.parameters, self.signals = tuple(parameters), tuple(signals)
        self.output = output

    def __repr__(self) -> str:
        return f"<cell {self.name}>"

    @property
    def gates(self) -> int:
        """Return G, the number of gates."""
        return len(self.gate_names)

    @property
    def recurrent(self) -> int:
        """Return the number of gates that have a recurrent part."""
        return len(self.recurrent_names)

    @property
    def standard(self) -> bool:
        """Say whether it has the form of torch's: gates, all recurrent; no parameters, no signals; the output is h."""
        return self.recurrent == self.gates and self.gates > 0 and not (self.parameters or self.signals or self.output)

    @property
    def sets_numbers(self) -> bool:
        """Say whether a new state is a number, for which kernels have no vector."""
        return any(node.op == "number" for node in self.traced.new_state)

    @cached_property
    def groups(self) -> dict[str, tuple[str, ...]]:
        """Return the names in each of the step's arguments."""
        return {
            "x": self.gate_names,
            "u": self.recurrent_names,
            "state": self.states,
            "p": self.parameters,
            "s": self.signals,
        }

    @cached_property
    def traced(self) -> Traced:
        """Return the step as a graph."""
        return Traced(self.step, self.groups)

    def check(self) -> None:
        """Raise CellError where something is declared and not used."""
        used = {node.args for node in ordered(self.traced.new_state) if node.op == "leaf"}
        for group, kind in (("x", "gate"), ("u", "recurrent part"), ("p", "parameter"), ("s", "signal")):
            for position, name in enumerate(self.groups[group]):
                if (group, position) not in used:
                    instead = {
                        "u": "name the gates that have one by recurrent=, or none by recurrent=''",
                        "x": "every gate has rows in W_ih; leave it out of gates=",
                    }.get(group, "leave it out of the declaration")
                    raise CellError(f"{self.name}: the {kind} {group}.{name} is declared but not used; {instead}")

    @cached_property
    def seeds(self) -> Nodes:
        """Return the unknown gradients by the new states."""
        return self.traced.graph.leaves("dstate", len(self.states))

    @cached_property
    def gradients(self) -> tuple[tuple[Node | None, ...], ...]:
        """Return dx, du, dstate_direct, dp and ds as expressions."""
        leaves = self.traced.leaves
        found = gradient(self.traced.new_state, self.seeds, [leaf for each in leaves.values() for leaf in each])
        return tuple(tuple(map(found.get, leaves[group])) for group in self.groups)

    @cached_property
    def kept_nodes(self) -> Nodes:
        """Return what a forward pass keeps beside the states."""
        traced, wanted = self.traced, [each for group in self.gradients for each in group]
        forward = [node for node in ordered((*traced.new_state, *self.slopes)) if node.op != "number"]
        free = {*self.given, *traced.new_state}
        return tuple(residuals(wanted, forward, free))

    @cached_property
    def slopes(self) -> list[Node]:
        """Return the derivatives given to `surrogate`, which are operands of the step's graph as well."""
        return [node.args[1] for node in ordered(self.traced.new_state) if node.op == "surrogate"]

    @cached_property
    def given(self) -> dict[Node, str]:
        """Return the leaves that are there in every pass, and what emitted functions call them."""
        return {
            leaf: f"{group}[{n}]" for group in ("state", "p", "s") for n, leaf in enumerate(self.traced.leaves[group])
        }

    @property
    def saved(self) -> int:
        """Return the number of values that forward keeps beside the states."""
        return len(self.kept_nodes)

    @property
    def kept(self) -> int:
        """Entries of a buffer that holds the input part of the gates and then what is saved; 0 if nothing is."""
        return max(self.gates, self.saved) if self.saved else 0

    @cached_property
    def one_gradient(self) -> bool:
        """Say whether `du` equals `dx`, so that loops need to write only one of them."""
        dx, du = self.gradients[:2]
        return len(dx) == len(du) and all(a is b for a, b in zip(dx, du, strict=True))

    @property
    def more(self) -> tuple[str, ...]:
        """Return the arguments that a cell with parameters or signals takes beside those of every cell."""
        return ("p", "s") if self.parameters or self.signals else ()

    def emitted(self, name: str, arguments: Sequence[str], names: dict[Node, str], results, zero: str) -> Callable:
        """Compile a derived function."""
        full = f"{self.name}_{name}"
        plain = "".join(c if c.isalnum() else "_" for c in full)
        return emit.compiled(plain, emit.source(plain, arguments, names, results, zero))

    def make_forward(self, more: Sequence[str]) -> Callable:
        """Return forward, with these arguments beside those of every cell."""
        results = (self.traced.new_state, self.kept_nodes)
        return self.emitted("forward", ("x", "u", "state", *more), self.input_names, results, "")

    def make_backward(self, more: Sequence[str]) -> Callable:
        """Return backward, with these arguments and the gradients by them beside those of every cell."""
        arguments = ("dstate", "saved", "state", "new_state", *more)
        results = self.gradients[: 3 + len(more)]
        return self.emitted("backward", arguments, self.backward_names, results, "zeros_like(dstate[0])")

    @cached_property
    def forward(self) -> Callable:
        return self.make_forward(self.more)

    @cached_property
    def backward(self) -> Callable:
        return self.make_backward(self.more)

    @cached_property
    def input_names(self) -> dict[Node, str]:
        """Return what forward calls what it is given."""
        leaves = self.traced.leaves
        return self.given | {leaf: f"{group}[{n}]" for group in ("x", "u") for n, leaf in enumerate(leaves[group])}

    @property
    def backward_names(self) -> dict[Node, str]:
        """Return what backward calls what is there."""
        return self.known_names | {seed: f"dstate[{n}]" for n, seed in enumerate(self.seeds)}

    @property
    def known_names(self) -> dict[Node, str]:
        """Return what functions that follow the forward pass call what it left."""
        names = dict(self.given)
        for name, nodes in (("saved", self.kept_nodes), ("new_state", self.traced.new_state)):
            for n, node in enumerate(nodes):
                names.setdefault(node, f"{name}[{n}]")
        return names

    @cached_property
    def jvp(self) -> Callable:
        """Differentiate forward: jvp(x_dot, u_dot, state_dot, saved, state, new_state) -> new_state_dot, saved_dot."""
        graph, leaves = self.traced.graph, self.traced.leaves
        names, tangents = self.known_names, {}
        for group in ("x", "u", "state"):
            for n, (leaf, dot) in enumerate(
                zip(leaves[group], graph.leaves(f"{group}_dot", len(leaves[group])), strict=True)
            ):
                names[dot], tangents[leaf] = f"{group}_dot[{n}]", dot
        new, kept = self.traced.new_state, self.kept_nodes
        found = tangent((*new, *kept), tangents)
        arguments = ("x_dot", "u_dot", "state_dot", "saved", "state", "new_state")
        return self.emitted("jvp", arguments, names, (found[: len(new)], found[len(new) :]), "zeros_like(state[0])")

    @cached_property
    def hvp(self) -> Callable:
        """Differentiate backward: what it returns, and its tangents.

        hvp(dstate, saved, state, new_state, dstate_dot, saved_dot, state_dot, new_state_dot)
            -> (dx, du, dstate_direct), (dx_dot, du_dot, dstate_direct_dot)
        """
        graph = self.traced.graph
        names, tangents = self.backward_names, {}
        groups = {
            "dstate": self.seeds,
            "saved": self.kept_nodes,
            "state": self.traced.leaves["state"],
            "new_state": self.traced.new_state,
        }
        for group in ("state", "saved", "new_state", "dstate"):
            nodes = groups[group]
            for n, (node, dot) in enumerate(zip(nodes, graph.leaves(f"{group}_dot", len(nodes)), strict=True)):
                names[dot] = f"{group}_dot[{n}]"
                tangents.setdefault(node, dot)
        results = self.gradients[:3]
        wanted = [each for group in results for each in group if each is not None]
        along = dict(zip(wanted, tangent(wanted, tangents), strict=True))
        dots = tuple(tuple(None if each is None else along[each] for each in group) for group in results)
        arguments = (*groups, *(f"{group}_dot" for group in groups))
        return self.emitted("hvp", arguments, names, (results, dots), "zeros_like(dstate[0])")

    def sources(self, derivatives: int) -> str:
        """Return the source of the derived functions, for kernels of so many derivatives."""
        functions = [self.forward, self.backward]
        functions += [self.jvp, self.hvp] if derivatives > 1 else []
        return "\n".join(function.text for function in functions)

    @cached_property
    def text(self) -> str:
        """Return the canonical text: equal for cells that compute the same in the same way."""
        shape = [f"{group} {len(names)}" for group, names in self.groups.items()]
        where = [self.gate_names.index(name) for name in self.recurrent_names]
        header = f"# {', '.join(shape)}; recurrent {where}; output {self.output}\n"
        return header + emit.source(
            "step", ("x", "u", "state", "p", "s"), self.input_names, self.traced.new_state, "0.0"
        )

    @cached_property
    def digest(self) -> str:
        """Return a short hash of the canonical text and the names of what is declared."""
        return hashlib.sha256(f"{self.text}\0{self.groups}".encode()).hexdigest()[:12]
