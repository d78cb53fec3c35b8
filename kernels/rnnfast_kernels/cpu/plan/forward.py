"""The forward pass of a layer, and of layers on top of one another, as a recipe."""

import itertools
from itertools import pairwise

from rnnfast_kernels.cpu.loops import products, tasks
from rnnfast_kernels.cpu.plan import panels
from rnnfast_kernels.cpu.plan.policy import chunk_steps
from rnnfast_kernels.cpu.plan.recipe import NOWHERE, Recipe, Ref
from rnnfast_kernels.cpu.plan.shape import (
    WEIGHTS,
    Shape,
    final_fields,
    loop_jobs,
    loop_phase,
    pack_all,
    signal_fields,
    slice_fields,
    state_fields,
    state_work,
    zeros,
)


def forward(shape: Shape, biased: bool, kept: tuple[str, ...], names: tuple[str, ...] = ()) -> Recipe:
    """The forward pass. `names` are bases that come first, in this order."""
    recipe = Recipe(shape.threads, names)
    write_forward(recipe, shape, biased, kept)
    return recipe.finish()


def stack(shapes: tuple[Shape, ...], names: tuple[str, ...], biased: bool, zero: bool) -> Recipe:
    """The forward passes of layers on top of one another, with nothing kept between them.

    names: of the bases, in an order that the caller chooses. They are x, h (of the last layer), and h_first, h_final,
    aux_first and aux_final, whose leading dimension goes over all layers and directions; and `layer_name` of
    every weight, or `panels`, of all layers one after another. zero: the initial states are zero, and not given.
    """
    recipe = Recipe(shapes[0].threads, names)
    x, offset = Ref("x"), 0
    for n, shape in enumerate(shapes):
        rows = shape.directions * shape.batch * shape.io_bytes
        h = (
            Ref("h")
            if n == len(shapes) - 1
            else recipe.buffer(shape.rows * shape.directions * shape.width * shape.io_bytes)
        )
        bases = {"x": x, "h": h} | dict.fromkeys(("sizes", "starts", "resets"), Ref(NOWHERE))
        for name, width, is_there in (("h", shape.width, True), ("aux", shape.hidden, shape.aux > 0)):
            bases[f"{name}_final"] = Ref(f"{name}_final", n * rows * width)
            bases[f"{name}_first"] = Ref(f"{name}_first", n * rows * width)
            if zero or not is_there:
                bases[f"{name}_first"] = Ref(NOWHERE, zeros(rows * width) if zero else 0)
        for name, d in itertools.product(WEIGHTS, range(shape.directions)):
            bases[f"{name}{d}"] = Ref(layer_name(f"{name}{d}", n))
        if shape.weights:
            bases["panels"] = Ref("panels", offset)
            offset += panel_layout(shape).size
        with recipe.renamed(bases):
            write_forward(recipe, shape, biased, (), zero)
        x = h
    return recipe.finish()


def layer_name(weight: str, layer: int) -> str:
    """Name of the base that is a direction's weight of a layer of a stack."""
    return f"{weight}_l{layer}"


def pass_weights(shape: Shape, biased: bool) -> list[dict[str, int | Ref]]:
    """Fields for every direction's weights as they are."""
    names = WEIGHTS[:4] if biased else WEIGHTS[:2]
    return [{"unpacked": 1} | {name: Ref(f"{name}{d}") for name in names} for d in range(shape.directions)]


def held_weights(shape: Shape) -> list[dict[str, int | Ref]]:
    """Fields for every direction's panels, which the base `panels` holds."""
    weights: list[dict[str, int | Ref]] = [{} for _ in range(shape.directions)]
    layout = panel_layout(shape)
    for matrix in layout.matrices:
        weights[matrix.direction][matrix.name] = Ref("panels", matrix.offset)
    for direction, offset in enumerate(layout.parameters):
        weights[direction]["parameters"] = Ref("panels", offset)
    return weights


def panel_layout(shape: Shape) -> panels.Layout:
    """Where a layer's panels are that were packed beforehand."""
    sizes = shape.inputs, shape.hidden, shape.width, shape.projected, shape.directions
    return panels.layout(shape.target, shape.cell, *sizes)


def pack_forward(recipe: Recipe, shape: Shape, biased: bool) -> list[dict[str, int | Ref]]:
    """Have the weights packed that the forward loop needs: fields for every direction."""
    weights = []
    for d in range(shape.directions):
        bias_ih, bias_hh = (Ref(f"b_ih{d}"), Ref(f"b_hh{d}")) if biased else (0, 0)
        weights.append((products.GATE_COLUMNS, Ref(f"w_ih{d}"), shape.hidden, shape.inputs, bias_ih))
        if shape.definition.recurrent:
            weights.append((products.RECURRENT_COLUMNS, Ref(f"w_hh{d}"), shape.hidden, shape.width, bias_hh))
        if shape.projected:
            weights.append((products.PLAIN_COLUMNS, Ref(f"w_hr{d}"), shape.width, shape.hidden))
    panels = pack_all(recipe, shape, weights)
    each = len(panels) // shape.directions
    names = ("w_ih", "w_hh", "w_hr")[: 3 if shape.definition.recurrent else 1]
    return [dict(zip(names, panels[d * each : (d + 1) * each], strict=False)) for d in range(shape.directions)]


def write_forward(recipe: Recipe, shape: Shape, biased: bool, kept: tuple[str, ...], zero: bool = False) -> None:
    """Add a layer's forward pass. zero: whether the initial states are zero."""
    if shape.weights:
        weights = held_weights(shape)
    else:
        weights = pass_weights(shape, biased) if shape.unpacked else pack_forward(recipe, shape, biased)
    depth = max(shape.inputs, shape.width, shape.hidden)
    jobs, signals = [], signal_fields(recipe, shape)
    for d in range(shape.directions):
        shared = state_fields(shape, d, kept) | signals
        for first, last in pairwise(shape.cuts):
            rows, chunk = last - first, chunk_steps(shape, last - first)
            fields = shared | slice_fields(shape, d, first, last) | weights[d]
            # A weight that is a tensor may be infinite, and a product with zero then is NaN.
            fields |= state_work(recipe, shape, rows) | {
                "chunk": chunk,
                "zero_first": int(zero and shape.weights != ""),
            }
            fields |= final_fields(shape, d, first, ("h_final", "aux_final")[: 1 + shape.aux])
            if "gates" not in kept:
                fields |= gate_work(recipe, shape, rows, chunk)
            jobs.append(loop_jobs(recipe, shape, fields, rows, chunk, depth, shape.panel_blocks))
    loop_phase(recipe, tasks.FORWARD, jobs)


def gate_work(recipe: Recipe, shape: Shape, rows: int, chunk: int) -> dict[str, int | Ref]:
    """Scratch for the gates of a chunk of steps, where they are not kept."""
    gate = shape.target.padded(shape.hidden) * shape.acc_bytes
    row = shape.definition.gates * gate
    return {"gates": recipe.buffer(rows * chunk * row), "gates_row": row, "gate_step": gate}
