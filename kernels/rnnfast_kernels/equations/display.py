"""A cell as readable source: its equations, what backward keeps, and the derived gradient."""

from collections.abc import Mapping

from rnnfast_kernels.equations.cell import Cell
from rnnfast_kernels.equations.emit import ATOM, Writer
from rnnfast_kernels.equations.graph import Node


def text(cell: Cell, read: str, doc: str | None) -> str:
    """Describe a cell."""
    traced = cell.traced
    given: dict[Node, str] = {}
    for group, names in cell.groups.items():
        for name, leaf in zip(names, traced.leaves[group], strict=True):
            given[leaf] = name if group == "state" else f"{group}.{name}"
    # A local variable that bears a state's name is most often its new value.
    new = dict(zip(traced.new_state, (f"{name}_new" for name in cell.states), strict=True))
    hints = {node: name for node, name in traced.hints.items() if node.operands and name not in cell.states} | {
        node: name for node, name in new.items() if node.operands
    }
    forward = Writer(given, hints)
    forward.write(list(traced.new_state))
    results = [f"{name} = {forward.text(node)}" for node, name in new.items() if not node.operands]
    kept = [forward.text(node) for node in cell.kept_nodes]
    known = given | {node: forward.inner(node, ATOM) for node in cell.kept_nodes}
    known |= {node: forward.names.get(node, name) for node, name in new.items()}
    known |= {seed: f"d{name}_new" for seed, name in zip(cell.seeds, cell.states, strict=True)}
    backward = gradient(cell, known)
    lines = [header(cell, read), *([f"    {line}" for line in (doc or "").strip().splitlines()[:1]]), "", "forward"]
    lines += [f"    {line}" for line in (*forward.lines, *results)]
    lines += ["", "kept for backward, beside the states", f"    {', '.join(kept) if kept else 'nothing'}", ""]
    lines += ["backward", *(f"    {line}" for line in backward)]
    return "\n".join(lines)


def header(cell: Cell, read: str) -> str:
    parts = [f"gates {' '.join(cell.gate_names) or '-'}"]
    if cell.recurrent != cell.gates:
        parts.append(f"recurrent {' '.join(cell.recurrent_names) or '-'}")
    parts.append(f"states {' '.join(cell.states)}")
    parts += [f"parameters {' '.join(cell.parameters)}"] * bool(cell.parameters)
    parts += [f"signals {' '.join(cell.signals)}"] * bool(cell.signals)
    output = cell.states[cell.output]
    parts += [f"output {output}"] * (cell.output != 0)
    parts += [f"product of {read}"] * (cell.recurrent > 0 and read != output)
    return f"{cell.name}: {'; '.join(parts)}"


def gradient(cell: Cell, known: Mapping[Node, str]) -> list[str]:
    """Write the gradient, one line for each result."""
    wanted = [each for group in cell.gradients for each in group if each is not None]
    writer = Writer(known)
    writer.write(wanted)
    lines = list(writer.lines)
    groups = zip(cell.groups.items(), cell.gradients, strict=True)
    for (group, names), nodes in groups:
        if group == "u" and cell.one_gradient:
            lines.append("du = dx")
            continue
        for name, node in zip(names, nodes, strict=True):
            what = name if group == "state" else f"{group}.{name}"
            lines.append(f"d{what} = {'0' if node is None else writer.text(node)}")
    return lines
