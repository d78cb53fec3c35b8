"""Where everything is in a layer's jobs: records, strides, scratch memory, panels, phases.

The loops and the packing of panels take it from here: a wrong size or stride is a wrong address. What may be tuned is
in `policy`.
"""

import functools
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from rnnfast_kernels.cells import CELLS, Cell
from rnnfast_kernels.cpu.job import SIGNAL
from rnnfast_kernels.cpu.loops import products, steps, tasks
from rnnfast_kernels.cpu.plan.policy import even_cuts, threads_for, work_per_row
from rnnfast_kernels.cpu.plan.recipe import Recipe, Ref
from rnnfast_kernels.cpu.target import Target, target, widest_panel

ZEROS: list[np.ndarray] = []
WEIGHTS = ("w_ih", "w_hh", "b_ih", "b_hh", "w_hr", "parameters")


@dataclass(frozen=True)
class Shape:
    """All that a plan depends on.

    rows: of all steps together. sharing: successive directions that read the same input; where that is not all of them,
    their inputs stand side by side in x, each `inputs` wide. cuts: bounds of the slices of the batch. workers: threads
    that share a slice's hidden units. unpacked: whether the forward pass uses its weights too seldom to be worth
    packing them. x_row, x_step: strides in bytes. weights: the format of panels that the caller holds (see `panels`),
    empty where weights are tensors.
    """

    cell: str
    dtype: str
    steps: int
    batch: int
    rows: int
    inputs: int
    hidden: int
    width: int
    reverse: tuple[bool, ...]
    sharing: int
    x_row: int
    x_step: int
    projected: bool
    threads: int
    cuts: tuple[int, ...]
    workers: int
    unpacked: bool
    weights: str = ""

    @property
    def definition(self) -> Cell:
        """The cell's entry in the table."""
        return CELLS[self.cell]

    @functools.cached_property
    def target(self) -> Target:
        return target(self.dtype, self.weights)

    @property
    def acc_bytes(self) -> int:
        """Bytes of an element of scratch memory."""
        return self.target.acc_bytes

    @property
    def io_bytes(self) -> int:
        """Bytes of an element of the layer's tensors."""
        return self.target.io_bytes

    @property
    def directions(self) -> int:
        return len(self.reverse)

    @property
    def aux(self) -> int:
        return len(self.definition.states) - 1

    @property
    def gate_columns(self) -> int:
        return self.definition.gates * self.hidden

    @property
    def recurrent_columns(self) -> int:
        return self.definition.recurrent * self.hidden

    @property
    def panel_blocks(self) -> int:
        """Blocks of the widest panel; workers share the units at the ends of such."""
        return max(widest_panel(self.definition.gates), widest_panel(max(1, self.definition.recurrent)))

    @property
    def work(self) -> int:
        """Multiplications of the forward pass."""
        return self.rows * self.directions * work_per_row(self.definition, self.inputs, self.hidden, self.width)


def panel_cuts(blocks: int, widest: int, parts: int) -> tuple[int, ...]:
    """Bounds that cut `blocks` into at most `parts`, at the ends of panels of `widest` blocks."""
    groups = -(-blocks // widest)
    return tuple(min(blocks, cut * widest) for cut in even_cuts(groups, min(groups, parts)))


def zeros(size: int) -> int:
    """The address of so many zero bytes, which stay for as long as the process lives."""
    return at_least_zeros(1 << max(1, size).bit_length())


@functools.cache
def at_least_zeros(size: int) -> int:
    """The same for few sizes."""
    ZEROS.append(np.zeros(size, np.uint8))
    return ZEROS[-1].__array_interface__["data"][0]


def panel_bytes(chosen: Target, columns: int, depth: int) -> int:
    """Memory of a matrix [depth, columns], packed."""
    return chosen.padded(columns) * (chosen.head + chosen.lines(depth)) * chosen.acc_bytes


def operands(recipe: Recipe, chosen: Target, rows: int, depth: int) -> Ref | int:
    """Scratch for rows of so many terms in the form of operands, where there are any of another form."""
    if chosen.terms == 1 and chosen.io == chosen.dtype:
        return 0
    row = chosen.padded(chosen.lines(depth)) * chosen.operand_elements * chosen.acc_bytes + chosen.operand_head
    aux = 15 if chosen.dot == "amx" else 0  # rows that are read beside fewer than 16
    return recipe.buffer(8 * rows + chosen.vector + (rows + aux) * row)


def pack(recipe: Recipe, shape: Shape, kind: int, weight: Ref, units: int, depth: int, bias: Ref | int = 0):
    """Add the records that pack a weight, and return them and the panels' address."""
    gates = {products.GATE_COLUMNS: shape.definition.gates, products.RECURRENT_COLUMNS: shape.definition.recurrent}.get(
        kind, 1
    )
    panels = recipe.buffer(panel_bytes(shape.target, units, depth) * gates)
    parts = threads_for(units * depth * gates * 8, shape.threads)
    cuts = panel_cuts(-(-units // shape.target.lanes), widest_panel(gates), parts)
    fields = {"kind": kind, "weight": weight, "weight_row": units * shape.io_bytes, "bias": bias, "units": units}
    records = [
        recipe.record(
            products.PACK,
            **fields,
            depth=depth,
            panels=panels,
            first=first,
            last=last,
            row_pointers=recipe.buffer(8 * depth) if kind == products.PLAIN_ROWS else 0,
        )
        for first, last in pairwise(cuts)
    ]
    return records, panels


def pack_all(recipe: Recipe, shape: Shape, weights: Sequence[tuple]) -> list[Ref]:
    """Add the phase that packs weights, and return the addresses of their panels."""
    packed = [pack(recipe, shape, *weight) for weight in weights]
    jobs = [record for records, _ in packed for record in records]
    recipe.phase(tasks.PACK_WEIGHT, jobs, shared=True, prepares=True)
    return [panels for _, panels in packed]


def slice_fields(shape: Shape, direction: int, first: int, last: int) -> dict[str, int | Ref]:
    """Fields of a `LAYER` record that say which rows and steps a job has, and where its inputs are."""
    item = shape.io_bytes
    offset = direction * shape.batch + first
    return {
        "steps": shape.steps,
        "batch": shape.batch,
        "first_row": first,
        "rows": last - first,
        "reverse": int(shape.reverse[direction]),
        "sizes": Ref("sizes"),
        "starts": Ref("starts"),
        "resets": Ref("resets"),
        "inputs": shape.inputs,
        "hidden": shape.hidden,
        "width": shape.width,
        "x": Ref("x", direction // shape.sharing * shape.inputs * item),
        "x_row": shape.x_row,
        "x_step": shape.x_step,
        "h_first": Ref("h_first", offset * shape.width * item),
        "h_first_row": shape.width * item,
        "aux_first": Ref("aux_first", offset * shape.hidden * item),
        "aux_first_row": shape.hidden * item,
        "aux_first_step": shape.directions * shape.batch * shape.hidden * item,
        "aux_final_step": shape.directions * shape.batch * shape.hidden * item,
        "daux_final_step": shape.directions * shape.batch * shape.hidden * item,
        "daux_first_step": shape.directions * shape.batch * shape.hidden * item,
        "parameters": Ref(f"parameters{direction}") if shape.definition.parameters else 0,
    }


def state_fields(shape: Shape, direction: int, kept: Sequence[str]) -> dict[str, int | Ref]:
    """Fields for what the forward loop leaves for every step; `kept` names those that there are beside h."""
    item, hidden = shape.io_bytes, shape.hidden * shape.io_bytes
    fields = {
        "h": Ref("h", direction * shape.width * item),
        "h_row": shape.directions * shape.width * item,
    }
    if "aux" in kept:
        fields |= {
            "aux": Ref("aux", direction * hidden),
            "aux_row": shape.directions * hidden,
            "aux_step": shape.rows * shape.directions * hidden,
        }
    if "unprojected" in kept:
        fields |= {"unprojected": Ref("unprojected", direction * hidden), "unprojected_row": shape.directions * hidden}
    if "gates" in kept:
        hidden = shape.hidden * shape.acc_bytes
        row = shape.definition.kept * hidden
        fields |= {
            "gates": Ref("gates", direction * row),
            "gates_row": shape.directions * row,
            "gate_step": hidden,
            "keep": 1,
        }
    return fields


def signal_fields(recipe: Recipe, shape: Shape) -> dict[str, int | Ref]:
    """Add a record for each signal, whose strides are bases like its address, and return the fields that name them."""
    records = [
        recipe.record(
            SIGNAL,
            address=Ref(f"signal{n}"),
            step=Ref(f"signal{n}_step"),
            row=Ref(f"signal{n}_row"),
            unit=Ref(f"signal{n}_unit"),
        )
        for n in range(len(shape.definition.signals))
    ]
    return {"signals": records[0]} if records else {}


def state_work(recipe: Recipe, shape: Shape, rows: int) -> dict[str, int | Ref]:
    """Scratch of a time loop for the states, or their gradients, between two steps."""
    hidden = shape.target.padded(shape.hidden) * shape.acc_bytes
    width = shape.target.padded(shape.width) * shape.acc_bytes
    return {
        "h_work": recipe.buffer(2 * rows * width + hidden),
        "aux_work": recipe.buffer(shape.aux * rows * hidden),
        "unprojected_work": recipe.buffer(rows * hidden) if shape.projected else 0,
    }


def loop_jobs(
    recipe: Recipe, shape: Shape, fields: dict, rows: int, chunk: int, depth: int, widest: int
) -> list[list[Ref]]:
    """The jobs of one slice's time loop, one for each worker, and, if there are several, the one that replaces them.

    depth: terms of its longest sums.
    """

    def job(first: int, last: int, **part: "int | Ref") -> Ref:
        private = {
            "tile": recipe.buffer(shape.target.tile_bytes(shape.definition.gates)),
            "row_pointers": recipe.buffer(8 * rows * chunk),
            "out_pointers": recipe.buffer(8 * rows * chunk),
            "operands": operands(recipe, shape.target, rows * chunk, depth),
        }
        return recipe.record(steps.LAYER, **fields, **private, first_block=first, last_block=last, **part)

    blocks = -(-shape.hidden // shape.target.lanes)
    cuts = panel_cuts(blocks, widest, shape.workers)
    workers = len(cuts) - 1
    alone = job(0, blocks, workers=1)
    if workers == 1:
        return [[alone], []]
    finished, *claimed = [recipe.counter() for _ in range(1 + workers)]
    shared = {"workers": workers, "parts": recipe.next_record(), "finished": finished}
    shared |= {"sched_yield": Ref("sched_yield")}
    pairs = zip(pairwise(cuts), claimed, strict=True)
    return [[job(first, last, claimed=each, **shared) for (first, last), each in pairs], [alone]]


def final_fields(shape: Shape, direction: int, first: int, names: Sequence[str]) -> dict[str, Ref]:
    """Places of a slice's rows in tensors [D, B, P or H], which are named by `names`, h's first."""
    offset = (direction * shape.batch + first) * shape.io_bytes
    widths = (shape.width, shape.hidden)
    return {name: Ref(name, offset * width) for name, width in zip(names, widths, strict=False)}


def loop_phase(recipe: Recipe, task: int, jobs: Sequence[list[list[Ref]]]) -> None:
    """Add the phase of a time loop."""
    together, serial = (list(itertools.chain.from_iterable(parts)) for parts in zip(*jobs, strict=True))
    recipe.phase(task, together, shared=True, serial=serial)
