"""How a layer's work is cut into jobs: slices of the batch, chunks of steps, scratch memory, phases.

Nothing here changes a result: every element's sum runs in the same order whatever the plan.
"""

import functools
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

import numpy as np

from rnnfast_kernels.cells import CELLS, Cell
from rnnfast_kernels.cpu import gradients, loops, products, tasks
from rnnfast_kernels.cpu.recipe import NOWHERE, Recipe, Ref
from rnnfast_kernels.cpu.target import Target, target, widest_panel

# Bytes of gates that a worker computes ahead of the recurrence, and the rows that make that product worth its panels.
CHUNK_BYTES = 1 << 17
CHUNK_ROWS = 64
# Bytes of a product's left operand that should stay in the second-level cache.
PRODUCT_BYTES = 1 << 19
# Rows whose outer products are summed before the sum is added to the gradient of a weight.
OUTER_BLOCK = 256
ZEROS: list[np.ndarray] = []
WEIGHTS = ("w_ih", "w_hh", "b_ih", "b_hh", "w_hr")
# Multiplications below which another thread costs more than it brings.
SERIAL_WORK = 1 << 20
# Multiplications of one step that make a worker worth its part in a meeting of all, and the rows from which on slices
# of the batch are the better way to share.
STEP_WORK = 1 << 15
MEETING_ROWS = 4


@dataclass(frozen=True, eq=False)
class Shape:
    """All that a plan depends on. Plans are cached by a shape's identity, which is quick to look up.

    rows: of all steps together. sharing: successive directions that read the same input; where that is not all of them,
    their inputs stand side by side in x, each `inputs` wide. cuts: bounds of the slices of the batch. workers: threads
    that share a slice's hidden units. raw: whether the forward pass uses its weights too seldom to be worth packing
    them. x_row, x_step: strides in bytes.
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
    raw: bool

    @property
    def row(self) -> Cell:
        """The cell's row of the table."""
        return CELLS[self.cell]

    @functools.cached_property
    def target(self) -> Target:
        return target(self.dtype)

    @property
    def item(self) -> int:
        return self.target.item

    @property
    def directions(self) -> int:
        return len(self.reverse)

    @property
    def extra(self) -> int:
        return len(self.row.states) - 1

    @property
    def gate_columns(self) -> int:
        return self.row.gates * self.hidden

    @property
    def work(self) -> int:
        """Multiplications of the forward pass."""
        return self.rows * self.directions * work_per_row(self.row, self.inputs, self.hidden, self.width)


def work_per_row(cell: Cell, inputs: int, hidden: int, width: int) -> int:
    """Multiplications of one row in one step."""
    projection = width * hidden if width != hidden else 0
    return cell.gates * hidden * (inputs + width) + projection


def threads_for(work: int, threads: int) -> int:
    """Threads worth using for so many multiplications."""
    return max(1, min(threads, work // SERIAL_WORK))


def even_cuts(count: int, parts: int) -> tuple[int, ...]:
    """Bounds that cut `count` into `parts` as evenly as can be."""
    return tuple(count * part // parts for part in range(parts + 1))


def panel_cuts(blocks: int, widest: int, parts: int) -> tuple[int, ...]:
    """Bounds that cut `blocks` into at most `parts`, at the ends of panels of `widest` blocks."""
    groups = -(-blocks // widest)
    return tuple(min(blocks, cut * widest) for cut in even_cuts(groups, min(groups, parts)))


def workers_for(rows: int, work: int, step_work: int, directions: int, threads: int) -> int:
    """Threads that share the hidden units of one direction, where the batch has too few rows to share them."""
    if rows >= MEETING_ROWS * threads:
        return 1
    return max(1, min(threads_for(work, threads) // directions, step_work // STEP_WORK))


def slices_for(work: int, batch: int, directions: int, threads: int) -> int:
    """Slices of the batch; each slice of each direction is one job."""
    return max(1, min(batch, -(-threads_for(work, threads) // directions)))


@functools.cache
def zeros(size: int) -> int:
    """The address of so many zero bytes, which stay for as long as the process lives."""
    ZEROS.append(np.zeros(size, np.uint8))
    return ZEROS[-1].__array_interface__["data"][0]


def panel_bytes(chosen: Target, columns: int, depth: int) -> int:
    """Memory of a matrix [depth, columns], packed."""
    return chosen.padded(columns) * (1 + depth) * chosen.item


def chunk_steps(shape: Shape, rows: int) -> int:
    """Steps whose input products are computed together."""
    row_bytes = shape.row.gates * shape.target.padded(shape.hidden) * shape.item
    rows = max(1, rows)
    return max(1, min(shape.steps, max(CHUNK_BYTES // (rows * row_bytes), CHUNK_ROWS // rows)))


def pack(recipe: Recipe, shape: Shape, kind: int, weight: Ref, units: int, depth: int, bias: Ref | int = 0):
    """Add the records that pack a weight, and return them and the panels' place."""
    gates = shape.row.gates if kind == products.GATE_COLUMNS else 1
    panels = recipe.buffer(panel_bytes(shape.target, units, depth) * gates)
    parts = threads_for(units * depth * gates * 8, shape.threads)
    cuts = panel_cuts(-(-units // shape.target.lanes), widest_panel(gates), parts)
    fields = {"kind": kind, "weight": weight, "weight_row": units * shape.item, "bias": bias, "units": units}
    records = [
        recipe.record(
            products.PACK,
            **fields,
            depth=depth,
            panels=panels,
            first=first,
            last=last,
            places=recipe.buffer(8 * depth) if kind == products.PLAIN_ROWS else 0,
        )
        for first, last in pairwise(cuts)
    ]
    return records, panels


def pack_all(recipe: Recipe, shape: Shape, weights: Sequence[tuple]) -> list[Ref]:
    """Add the phase that packs weights, and return the places of their panels."""
    packed = [pack(recipe, shape, *weight) for weight in weights]
    jobs = [record for records, _ in packed for record in records]
    recipe.phase(tasks.PACK_WEIGHT, jobs, shared=True, prepares=True)
    return [panels for _, panels in packed]


def slice_fields(shape: Shape, direction: int, first: int, last: int) -> dict[str, int | Ref]:
    """Fields of a `LAYER` record that say which rows and steps a job has, and where its inputs are."""
    item = shape.item
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
        "extra_first": Ref("extra_first", offset * shape.hidden * item),
        "extra_first_row": shape.hidden * item,
    }


def state_fields(shape: Shape, direction: int, kept: Sequence[str]) -> dict[str, int | Ref]:
    """Fields for what the forward loop leaves for every step; `kept` names those that there are beside h."""
    item, hidden = shape.item, shape.hidden * shape.item
    fields = {
        "h": Ref("h", direction * shape.width * item),
        "h_row": shape.directions * shape.width * item,
    }
    if "extra" in kept:
        fields |= {"extra": Ref("extra", direction * hidden), "extra_row": shape.directions * hidden}
    if "full" in kept:
        fields |= {"full": Ref("full", direction * hidden), "full_row": shape.directions * hidden}
    if "gates" in kept:
        row = shape.row.saved * hidden
        fields |= {
            "gates": Ref("gates", direction * row),
            "gates_row": shape.directions * row,
            "gate_step": hidden,
            "keep": 1,
        }
    return fields


def state_work(recipe: Recipe, shape: Shape, rows: int) -> dict[str, int | Ref]:
    """Scratch of a time loop for the states, or their gradients, between two steps."""
    hidden = shape.target.padded(shape.hidden) * shape.item
    width = shape.target.padded(shape.width) * shape.item
    return {
        "h_work": recipe.buffer(2 * rows * width + hidden),
        "extra_work": recipe.buffer(shape.extra * rows * hidden),
        "full_work": recipe.buffer(rows * hidden) if shape.projected else 0,
    }


def loop_jobs(recipe: Recipe, shape: Shape, fields: dict, rows: int, chunk: int, widest: int) -> list[list[Ref]]:
    """The jobs of one slice's time loop, one for each worker, and, if there are several, the one that replaces them."""

    def job(first: int, last: int, workers: int, met: Ref | int) -> Ref:
        private = {
            "tile": recipe.buffer(shape.target.accumulators * shape.target.vector),
            "places": recipe.buffer(8 * rows * chunk),
            "goals": recipe.buffer(8 * rows * chunk),
        }
        part = {"first_block": first, "last_block": last, "workers": workers, "met": met}
        part |= {"sched_yield": Ref("sched_yield")}
        return recipe.record(loops.LAYER, **fields, **private, **part)

    blocks = -(-shape.hidden // shape.target.lanes)
    cuts = panel_cuts(blocks, widest, shape.workers)
    workers = len(cuts) - 1
    alone = job(0, blocks, 1, 0)
    if workers == 1:
        return [[alone], []]
    met = recipe.counter()
    return [[job(first, last, workers, met) for first, last in pairwise(cuts)], [alone]]


def gate_work(recipe: Recipe, shape: Shape, rows: int, chunk: int) -> dict[str, int | Ref]:
    """Scratch for the gates of a chunk of steps, where they are not kept."""
    gate = shape.target.padded(shape.hidden) * shape.item
    row = shape.row.gates * gate
    return {"gates": recipe.buffer(rows * chunk * row), "gates_row": row, "gate_step": gate}


def final_fields(shape: Shape, direction: int, first: int, names: Sequence[str]) -> dict[str, Ref]:
    """Places of a slice's rows in tensors [D, B, P or H], which are named by `names`, h's first."""
    offset = (direction * shape.batch + first) * shape.item
    widths = (shape.width, shape.hidden)
    return {name: Ref(name, offset * width) for name, width in zip(names, widths, strict=False)}


def loop_phase(recipe: Recipe, task: int, jobs: Sequence[list[list[Ref]]]) -> None:
    """Add the phase of a time loop."""
    together, spare = (list(itertools.chain.from_iterable(parts)) for parts in zip(*jobs, strict=True))
    recipe.phase(task, together, shared=True, spare=spare)


@functools.lru_cache(maxsize=1024)
def forward(shape: Shape, biased: bool, kept: tuple[str, ...]) -> Recipe:
    """The forward pass."""
    recipe = Recipe(shape.threads)
    write_forward(recipe, shape, biased, kept)
    return recipe.finish()


@functools.lru_cache(maxsize=1024)
def stack(shapes: tuple[Shape, ...], names: tuple[str, ...], biased: bool, zero: bool) -> Recipe:
    """The forward passes of layers on top of one another, with nothing kept between them.

    names: of the bases, in an order that the caller chooses. They are x, h (of the last layer), and h_first, h_final,
    extra_first and extra_final, whose leading dimension goes over all layers and directions; and `layer_name` of
    every weight. zero: the initial states are zero, and not given.
    """
    recipe = Recipe(shapes[0].threads, names)
    x = Ref("x")
    for n, shape in enumerate(shapes):
        rows = shape.directions * shape.batch * shape.item
        h = (
            Ref("h")
            if n == len(shapes) - 1
            else recipe.buffer(shape.rows * shape.directions * shape.width * shape.item)
        )
        bases = {"x": x, "h": h} | dict.fromkeys(("sizes", "starts", "resets"), Ref(NOWHERE))
        for name, width in (("h", shape.width), ("extra", shape.hidden)):
            bases[f"{name}_final"] = Ref(f"{name}_final", n * rows * width)
            bases[f"{name}_first"] = (
                Ref(NOWHERE, zeros(rows * width)) if zero else Ref(f"{name}_first", n * rows * width)
            )
        for name, d in itertools.product(WEIGHTS, range(shape.directions)):
            bases[f"{name}{d}"] = Ref(layer_name(name, d, n))
        with recipe.renamed(bases):
            write_forward(recipe, shape, biased, ())
        x = h
    return recipe.finish()


def layer_name(weight: str, direction: int, layer: int) -> str:
    """Name of the base that is a weight of a layer of a stack."""
    return f"{weight}{direction}_l{layer}"


def pass_weights(shape: Shape, biased: bool) -> list[dict[str, int | Ref]]:
    """Fields for every direction's weights as they are."""
    names = WEIGHTS[:4] if biased else WEIGHTS[:2]
    return [{"raw": 1} | {name: Ref(f"{name}{d}") for name in names} for d in range(shape.directions)]


def pack_forward(recipe: Recipe, shape: Shape, biased: bool) -> list[dict[str, int | Ref]]:
    """Have the weights packed that the forward loop needs: fields for every direction."""
    weights = []
    for d in range(shape.directions):
        bias_ih, bias_hh = (Ref(f"b_ih{d}"), Ref(f"b_hh{d}")) if biased else (0, 0)
        weights.append((products.GATE_COLUMNS, Ref(f"w_ih{d}"), shape.hidden, shape.inputs, bias_ih))
        weights.append((products.GATE_COLUMNS, Ref(f"w_hh{d}"), shape.hidden, shape.width, bias_hh))
        if shape.projected:
            weights.append((products.PLAIN_COLUMNS, Ref(f"w_hr{d}"), shape.width, shape.hidden))
    panels = pack_all(recipe, shape, weights)
    each = len(panels) // shape.directions
    names = ("w_ih", "w_hh", "w_hr")
    return [dict(zip(names, panels[d * each : (d + 1) * each], strict=False)) for d in range(shape.directions)]


def write_forward(recipe: Recipe, shape: Shape, biased: bool, kept: tuple[str, ...]) -> None:
    """Add a layer's forward pass."""
    weights = pass_weights(shape, biased) if shape.raw else pack_forward(recipe, shape, biased)
    jobs = []
    for d in range(shape.directions):
        shared = state_fields(shape, d, kept) | weights[d]
        for first, last in pairwise(shape.cuts):
            rows, chunk = last - first, chunk_steps(shape, last - first)
            fields = shared | slice_fields(shape, d, first, last) | state_work(recipe, shape, rows) | {"chunk": chunk}
            fields |= final_fields(shape, d, first, ("h_final", "extra_final")[: 1 + shape.extra])
            if "gates" not in kept:
                fields |= gate_work(recipe, shape, rows, chunk)
            jobs.append(loop_jobs(recipe, shape, fields, rows, chunk, widest_panel(shape.row.gates)))
    loop_phase(recipe, tasks.FORWARD, jobs)


@functools.lru_cache(maxsize=1024)
def backward(
    shape: Shape,
    kept: tuple[str, ...],
    given: tuple[str, ...],
    need_x: bool,
    need_weights: bool,
    groups: int,
    biased: bool,
) -> Recipe:
    """The backward pass. `given` names the gradients that are not zero."""
    recipe = Recipe(shape.threads)
    weights = []
    for d in range(shape.directions):
        weights.append((products.PLAIN_ROWS, Ref(f"w_hh{d}"), shape.width, shape.gate_columns))
        if shape.projected:
            weights.append((products.PLAIN_ROWS, Ref(f"w_hr{d}"), shape.hidden, shape.width))
    panels = pack_all(recipe, shape, weights)
    each = len(panels) // shape.directions
    work = gradient_work(recipe, shape)
    jobs, whole = [], []
    for d in range(shape.directions):
        shared = state_fields(shape, d, kept) | gradient_fields(shape, d, given, work)
        shared |= zip(("w_hh", "w_hr"), panels[d * each : (d + 1) * each], strict=False)
        whole.append(recipe.record(loops.LAYER, **shared, **slice_fields(shape, d, 0, shape.batch)))
        finals = tuple(name for name in ("dh_final", "dextra_final") if name in given)
        for first, last in pairwise(shape.cuts):
            rows = last - first
            fields = shared | slice_fields(shape, d, first, last) | state_work(recipe, shape, rows)
            places = final_fields(shape, d, first, ("dh_final", "dextra_final"))
            fields |= {name: places[name] for name in finals}
            fields |= final_fields(shape, d, first, ("dh_first", "dextra_first")[: 1 + shape.extra])
            jobs.append(loop_jobs(recipe, shape, fields, rows, 1, widest_panel(1)))
    loop_phase(recipe, tasks.BACKWARD, jobs)
    if need_x:
        input_gradient(recipe, shape, work)
    if need_weights:
        weight_gradients(recipe, shape, work, whole, groups, biased)
    return recipe.finish()


class GradientWork(NamedTuple):
    """Scratch for gradients with a row for every step: [rows, D, G*H] by the gates, [rows, D, P] by a projected h."""

    dx_gates: Ref
    du_gates: Ref
    dh_total: Ref | int


def gradient_work(recipe: Recipe, shape: Shape) -> GradientWork:
    """Reserve it."""
    row = shape.rows * shape.directions * shape.item
    dx_gates = recipe.buffer(row * shape.gate_columns)
    du_gates = dx_gates if shape.row.one_gradient else recipe.buffer(row * shape.gate_columns)
    return GradientWork(dx_gates, du_gates, recipe.buffer(row * shape.width) if shape.projected else 0)


def gradient_fields(shape: Shape, direction: int, given: Sequence[str], work: GradientWork) -> dict[str, int | Ref]:
    """Fields for the gradients of what has a row for every step."""
    width, hidden = shape.width * shape.item, shape.hidden * shape.item
    gates = shape.row.gates * hidden
    fields = {
        "dx_gates": work.dx_gates.at(direction * gates),
        "du_gates": work.du_gates.at(direction * gates),
        "dgates_row": shape.directions * gates,
        "dh_row": shape.directions * width,
        "dextra_row": shape.directions * hidden,
        "dh_total_row": shape.directions * width,
        "zeros": zeros(max(width, hidden) + shape.target.vector),
    }
    if "dh" in given:
        fields["dh"] = Ref("dh", direction * width)
    if "dextra" in given:
        fields["dextra"] = Ref("dextra", direction * hidden)
    if isinstance(work.dh_total, Ref):
        fields["dh_total"] = work.dh_total.at(direction * width)
    return fields


def input_gradient(recipe: Recipe, shape: Shape, work: GradientWork) -> None:
    """dx = the sum over the directions that share an input of dx_gates W_ih."""
    depth, item = shape.gate_columns, shape.item
    weights = [(products.PLAIN_ROWS, Ref(f"w_ih{d}"), shape.inputs, depth) for d in range(shape.directions)]
    panels = pack_all(recipe, shape, weights)
    chunk = max(2 * shape.target.accumulators, min(1024, PRODUCT_BYTES // (depth * item)))
    threads = threads_for(shape.rows * depth * shape.inputs * shape.directions, shape.threads)
    starts = range(0, shape.directions, shape.sharing)
    out_row = len(starts) * shape.inputs * item
    jobs = [
        recipe.record(
            gradients.PRODUCT,
            rows=last - first,
            depth=depth,
            units=shape.inputs,
            parts=shape.sharing,
            left=work.dx_gates.at((first * shape.directions + start) * depth * item),
            left_row=shape.directions * depth * item,
            left_part=depth * item,
            panels=panels[start],
            panels_part=panels[-1].offset - panels[-2].offset if shape.sharing > 1 else 0,
            out=Ref("dx", first * out_row + n * shape.inputs * item),
            out_row=out_row,
            tile=recipe.buffer(shape.target.accumulators * shape.target.vector),
            places=recipe.buffer(8 * chunk),
            goals=recipe.buffer(8 * chunk),
            chunk=chunk,
        )
        for n, start in enumerate(starts)
        for first, last in pairwise(even_cuts(shape.rows, -(-threads // len(starts))))
    ]
    recipe.phase(tasks.ROWS_PRODUCT, jobs, shared=True)


def weight_gradients(
    recipe: Recipe, shape: Shape, work: GradientWork, whole: Sequence[Ref], groups: int, biased: bool
) -> None:
    """Sums of outer products over all rows, group by group."""
    columns, item = shape.gate_columns, shape.item
    jobs = []
    for d, layer in enumerate(whole):
        dx_gates, du_gates = work.dx_gates.at(d * columns * item), work.du_gates.at(d * columns * item)
        biases = (f"db_ih{d}", f"db_hh{d}") if biased else ()
        first, second = (biases, ()) if shape.row.one_gradient else (biases[:1], biases[1:])
        parts = [
            (gradients.INPUTS, dx_gates, columns, shape.inputs, f"dw_ih{d}", first),
            (gradients.ENTERING, du_gates, columns, shape.width, f"dw_hh{d}", second),
        ]
        if isinstance(work.dh_total, Ref):
            total = work.dh_total.at(d * shape.width * item)
            parts.append((gradients.GIVEN, total, shape.width, shape.hidden, f"dw_hr{d}", ()))
        for part in parts:
            jobs += outer(recipe, shape, d, layer, groups, *part)
    recipe.phase(tasks.OUTER_PRODUCT, jobs, shared=threads_for(shape.work, shape.threads) > 1)


def outer(
    recipe: Recipe,
    shape: Shape,
    direction: int,
    layer: Ref,
    groups: int,
    right: int,
    left: Ref,
    columns: int,
    units: int,
    out: str,
    biases: Sequence[str],
) -> list[Ref]:
    """The jobs of one weight's gradient."""
    chosen, item = shape.target, shape.item
    blocks = -(-columns // chosen.lanes)
    parts = threads_for(shape.rows * columns * units, shape.threads)
    block = min(OUTER_BLOCK, max(1, shape.rows))
    jobs = []
    for group in range(groups):
        for first, last in pairwise(even_cuts(blocks, min(parts, blocks))):
            fields = {
                "layer": layer,
                "right": right,
                "group": group,
                "groups": groups,
                "left": left,
                "left_row": shape.directions * columns * item,
                "columns": columns,
                "first": first * chosen.lanes,
                "last": min(last * chosen.lanes, columns),
                "units": units,
                "out": Ref(out, group * columns * units * item),
                **dict(zip(("bias", "second_bias"), (Ref(b, group * columns * item) for b in biases), strict=False)),
                "block": OUTER_BLOCK,
                "tile": recipe.buffer(chosen.accumulators * chosen.vector),
                "places": recipe.buffer(16 * chosen.lanes),
                "left_places": recipe.buffer(8 * block),
                "right_places": recipe.buffer(8 * block),
                "panels": recipe.buffer(panel_bytes(chosen, units, block)),
                "strip": recipe.buffer(block * chosen.vector),
            }
            if right == gradients.GIVEN:
                fields |= {
                    "right_base": Ref("full", direction * units * item),
                    "right_row": shape.directions * units * item,
                }
            jobs.append(recipe.record(gradients.OUTER, **fields))
    return jobs
