"""The backward pass of a layer as a recipe: the time loop, then the products that follow it."""

from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

from rnnfast_kernels.cpu.loops import gradients, products, steps, tasks
from rnnfast_kernels.cpu.plan.policy import even_cuts, threads_for
from rnnfast_kernels.cpu.plan.recipe import Recipe, Ref
from rnnfast_kernels.cpu.plan.shape import (
    Shape,
    final_fields,
    loop_jobs,
    loop_phase,
    operands,
    pack_all,
    panel_bytes,
    signal_fields,
    slice_fields,
    state_fields,
    state_work,
    zeros,
)
from rnnfast_kernels.cpu.target import widest_panel

# Bytes of a product's left operand that should stay in the second-level cache, and the fewest rows worth a pass over
# its panels.
PRODUCT_BYTES = 1 << 19
PRODUCT_ROWS = 48
# Rows whose outer products are summed before the sum is added to the gradient of a weight.
OUTER_BLOCK = 256


def backward(
    shape: Shape,
    kept: tuple[str, ...],
    given: tuple[str, ...],
    need_x: bool,
    need_hx: bool,
    need_weights: bool,
    groups: int,
    biased: bool,
    names: tuple[str, ...] = (),
) -> Recipe:
    """The backward pass. `given` names the gradients that are not zero; `names` are bases that come first, in order."""
    recipe = Recipe(shape.threads, names)
    panels = pack_backward(recipe, shape, need_hx or shape.steps > 1)
    work = gradient_work(recipe, shape)
    jobs, whole, signals = [], [], signal_fields(recipe, shape)
    for d in range(shape.directions):
        shared = state_fields(shape, d, kept) | gradient_fields(shape, d, given, work) | panels[d] | signals
        whole.append(recipe.record(steps.LAYER, **shared, **slice_fields(shape, d, 0, shape.batch)))
        finals = tuple(name for name in ("dh_final", "daux_final") if name in given)
        for first, last in pairwise(shape.cuts):
            rows = last - first
            fields = shared | slice_fields(shape, d, first, last) | state_work(recipe, shape, rows)
            addresses = final_fields(shape, d, first, ("dh_final", "daux_final"))
            fields |= {name: addresses[name] for name in finals}
            if need_hx:
                fields |= final_fields(shape, d, first, ("dh_first", "daux_first")[: 1 + shape.aux])
            jobs.append(loop_jobs(recipe, shape, fields, rows, 1, shape.recurrent_columns, widest_panel(1)))
    loop_phase(recipe, tasks.BACKWARD, jobs)
    if need_x:
        input_gradient(recipe, shape, work)
    if need_weights:
        weight_gradients(recipe, shape, work, whole, groups, biased)
    return recipe.finish()


def pack_backward(recipe: Recipe, shape: Shape, recurrent: bool = True) -> list[dict[str, Ref]]:
    """Have the weights packed that the backward loop needs, the `recurrent` ones if so: fields for every direction."""
    sizes = {}
    if recurrent and shape.definition.recurrent:
        sizes["w_hh"] = shape.width, shape.recurrent_columns
    if shape.projected:
        sizes["w_hr"] = shape.hidden, shape.width
    weights = [
        (products.PLAIN_ROWS, Ref(f"{name}{d}"), *size) for d in range(shape.directions) for name, size in sizes.items()
    ]
    panels = pack_all(recipe, shape, weights)
    each = len(panels) // shape.directions
    return [dict(zip(sizes, panels[d * each : (d + 1) * each], strict=True)) for d in range(shape.directions)]


class GradientWork(NamedTuple):
    """Scratch for gradients with a row for every step, [rows, D, *]: by the gates, by a projected h, by parameters."""

    dx_gates: Ref
    du_gates: Ref
    dh_total: Ref | int
    dparameters: Ref


def gradient_work(recipe: Recipe, shape: Shape) -> GradientWork:
    """Reserve it."""
    row = shape.rows * shape.directions * shape.acc_bytes
    dx_gates = recipe.buffer(row * shape.gate_columns)
    du_gates = dx_gates if shape.definition.one_gradient else recipe.buffer(row * shape.recurrent_columns)
    dh_total = recipe.buffer(row * shape.width) if shape.projected else 0
    return GradientWork(
        dx_gates, du_gates, dh_total, recipe.buffer(row * len(shape.definition.parameters) * shape.hidden)
    )


def gradient_fields(shape: Shape, direction: int, given: Sequence[str], work: GradientWork) -> dict[str, int | Ref]:
    """Fields for the gradients of what has a row for every step."""
    width, hidden = shape.width * shape.io_bytes, shape.hidden * shape.io_bytes
    gates, total = shape.gate_columns * shape.acc_bytes, shape.width * shape.acc_bytes
    recurrent = shape.recurrent_columns * shape.acc_bytes
    parameters, signals = (
        len(each) * shape.hidden * shape.acc_bytes for each in (shape.definition.parameters, shape.definition.signals)
    )
    fields = {
        "dx_gates": work.dx_gates.at(direction * gates),
        "du_gates": work.du_gates.at(direction * recurrent),
        "dgates_row": shape.directions * gates,
        "du_row": shape.directions * recurrent,
        "dparameters": work.dparameters.at(direction * parameters),
        "dparameters_row": shape.directions * parameters,
        "dh_row": shape.directions * width,
        "daux_row": shape.directions * hidden,
        "dh_total_row": shape.directions * total,
        "zeros": zeros(max(shape.width, shape.hidden) * shape.acc_bytes + shape.target.vector),
    }
    if "dh" in given:
        fields["dh"] = Ref("dh", direction * width)
    if "daux" in given:
        fields["daux"] = Ref("daux", direction * hidden)
        fields["daux_step"] = shape.rows * shape.directions * hidden
    if "dsignals" in given:
        fields |= {"dsignals": Ref("dsignals", direction * signals), "dsignals_row": shape.directions * signals}
    if isinstance(work.dh_total, Ref):
        fields["dh_total"] = work.dh_total.at(direction * total)
    return fields


def input_gradient(recipe: Recipe, shape: Shape, work: GradientWork, add: bool = False) -> None:
    """dx = the sum over the directions that share an input of dx_gates W_ih. add: to what dx is already."""
    depth, item = shape.gate_columns, shape.acc_bytes
    weights = [(products.PLAIN_ROWS, Ref(f"w_ih{d}"), shape.inputs, depth) for d in range(shape.directions)]
    panels = pack_all(recipe, shape, weights)
    chunk = max(PRODUCT_ROWS, min(1024, PRODUCT_BYTES // (depth * item)))
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
            tile=recipe.buffer(shape.target.tile_bytes(1)),
            row_pointers=recipe.buffer(8 * chunk),
            operands=operands(recipe, shape.target, chunk, depth),
            out_pointers=recipe.buffer(8 * chunk),
            chunk=chunk,
            add=int(add),
        )
        for n, start in enumerate(starts)
        for first, last in pairwise(even_cuts(shape.rows, -(-threads // len(starts))))
    ]
    recipe.phase(tasks.ROWS_PRODUCT, jobs, shared=True)


def weight_gradients(
    recipe: Recipe,
    shape: Shape,
    work: GradientWork,
    whole: Sequence[Ref],
    groups: int,
    biased: bool,
    inputs: bool = True,
    add: bool = False,
) -> None:
    """Sums of outer products over all rows, group by group. inputs: also those of x. add: to what there is already."""
    columns, recurrent, item = shape.gate_columns, shape.recurrent_columns, shape.acc_bytes
    jobs = []
    for d, layer in enumerate(whole):
        dx_gates, du_gates = work.dx_gates.at(d * columns * item), work.du_gates.at(d * recurrent * item)
        biases = (f"db_ih{d}", f"db_hh{d}") if biased else ()
        first, second = (biases, ()) if shape.definition.one_gradient else (biases[:1], biases[1:])
        parts = [
            (gradients.INPUTS, dx_gates, columns, shape.inputs, f"dw_ih{d}", first),
            (gradients.ENTERING, du_gates, recurrent, shape.width, f"dw_hh{d}", second),
        ][: 2 if recurrent else 1]
        if isinstance(work.dh_total, Ref):
            total = work.dh_total.at(d * shape.width * item)
            parts.append((gradients.OTHERS, total, shape.width, shape.hidden, f"dw_hr{d}", ()))
        if shape.definition.parameters:
            # Sums over all rows alone: a product of no columns, with its bias.
            count = len(shape.definition.parameters) * shape.hidden
            dparameters = work.dparameters.at(d * count * item)
            parts.append((gradients.INPUTS, dparameters, count, 0, f"dparameters{d}", (f"dparameters{d}",)))
        for part in parts if inputs else parts[1:]:
            jobs += outer(recipe, shape, d, layer, groups, add, *part)
    recipe.phase(tasks.OUTER_PRODUCT, jobs, shared=threads_for(shape.work, shape.threads) > 1)


def outer(
    recipe: Recipe,
    shape: Shape,
    direction: int,
    layer: Ref,
    groups: int,
    add: bool,
    right: int,
    left: Ref,
    columns: int,
    units: int,
    out: str,
    biases: Sequence[str],
) -> list[Ref]:
    """The jobs of one weight's gradient."""
    chosen, item = shape.target, shape.acc_bytes
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
                "add": int(add),
                "tile": recipe.buffer(chosen.tile_bytes(1)),
                "row_pointers": recipe.buffer(16 * chosen.lanes),
                "left_pointers": recipe.buffer(8 * block),
                "right_pointers": recipe.buffer(8 * block),
                "panels": recipe.buffer(panel_bytes(chosen, units, block)),
                "strip": recipe.buffer(block * chosen.vector),
            }
            if right == gradients.OTHERS:
                fields |= {
                    "right_base": Ref("unprojected", direction * units * shape.io_bytes),
                    "right_row": shape.directions * units * shape.io_bytes,
                }
            jobs.append(recipe.record(gradients.OUTER, **fields))
    return jobs
