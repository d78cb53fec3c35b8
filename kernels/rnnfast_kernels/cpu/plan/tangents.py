"""Tangents of a layer and of its gradients, as recipes: `loops.tangents`, then the products of the backward pass.

Every base `name` of the other recipes that a layer is given has a second one here, `name_dot`, which holds its tangent.
Records and panels of tangents are written as those of the layer itself, with the bases renamed.
"""

from dataclasses import replace
from itertools import pairwise

from rnnfast_kernels.cpu.loops import steps, tasks
from rnnfast_kernels.cpu.plan.backward import (
    gradient_fields,
    gradient_work,
    input_gradient,
    pack_backward,
    weight_gradients,
)
from rnnfast_kernels.cpu.plan.forward import gate_work, pack_forward
from rnnfast_kernels.cpu.plan.policy import chunk_steps
from rnnfast_kernels.cpu.plan.recipe import Recipe, Ref
from rnnfast_kernels.cpu.plan.shape import (
    WEIGHTS,
    Shape,
    final_fields,
    loop_jobs,
    loop_phase,
    slice_fields,
    state_fields,
    state_work,
    zeros,
)

WITH_TANGENTS = ("x", "h", "aux", "gates", "unprojected", "h_first", "aux_first", "h_final", "aux_final")


def jvp(
    shape: Shape, kept: tuple[str, ...], moves_x: bool, moves_weights: bool, biased: bool, names: tuple[str, ...] = ()
) -> Recipe:
    """Tangents of the states. moves_x, moves_weights: whether x has a tangent, and whether the weights have."""
    recipe = Recipe(shape.threads, names)
    write_jvp(recipe, replace(shape, workers=1), kept, moves_x, moves_weights, biased)
    return recipe.finish()


def hvp(
    shape: Shape,
    kept: tuple[str, ...],
    given: tuple[str, ...],
    moves_x: bool,
    moves_weights: bool,
    need_x: bool,
    need_weights: bool,
    biased: bool,
    names: tuple[str, ...] = (),
) -> Recipe:
    """Also tangents of the gradients. `given` names the incoming gradients that are not zero; they have no tangents."""
    recipe = Recipe(shape.threads, names)
    shape = replace(shape, workers=1)
    write_jvp(recipe, shape, kept, moves_x, moves_weights, biased)
    moved = tangent_names(shape)
    panels = pack_backward(recipe, shape)
    with recipe.renamed(moved):
        dot_panels = pack_backward(recipe, shape) if moves_weights else [{}] * shape.directions
    work, dot_work = gradient_work(recipe, shape), gradient_work(recipe, shape)
    jobs, whole, dot_whole = [], [], []
    for d in range(shape.directions):
        shared = state_fields(shape, d, kept) | gradient_fields(shape, d, given, work) | panels[d]
        dot_shared = state_fields(shape, d, kept) | gradient_fields(shape, d, (), dot_work) | dot_panels[d]
        whole.append(recipe.record(steps.LAYER, **shared, **slice_fields(shape, d, 0, shape.batch)))
        with recipe.renamed(moved):
            fields = slice_fields(shape, d, 0, shape.batch) | input_fields(shape, d, moves_x)
            dot_whole.append(recipe.record(steps.LAYER, **dot_shared, **fields))
        for first, last in pairwise(shape.cuts):
            rows = last - first
            where = slice_fields(shape, d, first, last)
            addresses = final_fields(shape, d, first, ("dh_final", "daux_final"))
            finals = {name: each for name, each in addresses.items() if name in given}
            around = where | shared | state_work(recipe, shape, rows) | finals | {"last_block": blocks(shape)}
            fields = dot_shared | where | state_work(recipe, shape, rows)
            fields |= {"around": recipe.record(steps.LAYER, **around)}
            fields |= final_fields(shape, d, first, ("dh_first", "daux_first")[: 1 + shape.aux])
            with recipe.renamed(moved):
                jobs.append(loop_jobs(recipe, shape, fields, 2 * rows, 1, 0, 1))
    loop_phase(recipe, tasks.HVP, jobs)
    if need_x:
        input_gradient(recipe, shape, dot_work)
        if moves_weights:
            with recipe.renamed(moved):
                input_gradient(recipe, shape, work, add=True)
    if need_weights:
        weight_gradients(recipe, shape, dot_work, whole, 1, biased)
        with recipe.renamed(moved):
            weight_gradients(recipe, shape, work, dot_whole, 1, False, inputs=moves_x, add=True)
    return recipe.finish()


def tangent_names(shape: Shape) -> dict[str, Ref]:
    """For the name of every base that may have a tangent, that of the tangent."""
    weights = (f"{name}{d}" for name in WEIGHTS for d in range(shape.directions))
    return {name: Ref(f"{name}_dot") for name in (*WITH_TANGENTS, *weights)}


def blocks(shape: Shape) -> int:
    """Vectors of hidden units."""
    return -(-shape.hidden // shape.target.lanes)


def input_fields(shape: Shape, direction: int, moves_x: bool) -> dict[str, int | Ref]:
    """Fields for the tangent of x, which is contiguous, or absent."""
    row = shape.directions // shape.sharing * shape.inputs * shape.acc_bytes
    offset = direction // shape.sharing * shape.inputs * shape.acc_bytes
    return {"x": Ref("x", offset) if moves_x else 0, "x_row": row, "x_step": shape.batch * row}


def write_jvp(
    recipe: Recipe, shape: Shape, kept: tuple[str, ...], moves_x: bool, moves_weights: bool, biased: bool
) -> None:
    """Add the recurrence of the tangents."""
    names = tangent_names(shape)
    panels = pack_forward(recipe, shape, False)
    with recipe.renamed(names):
        dot_panels = pack_forward(recipe, shape, biased) if moves_weights else [{}] * shape.directions
    jobs = []
    for d in range(shape.directions):
        for first, last in pairwise(shape.cuts):
            rows, chunk = last - first, chunk_steps(shape, last - first)
            where = slice_fields(shape, d, first, last) | state_fields(shape, d, kept)
            where |= {"zeros": zeros(shape.target.padded(max(shape.width, shape.hidden)) * shape.acc_bytes)}
            fields = where | dot_panels[d] | input_fields(shape, d, moves_x) | state_work(recipe, shape, rows)
            fields |= final_fields(shape, d, first, ("h_final", "aux_final")[: 1 + shape.aux])
            if "gates" not in kept:
                fields |= gate_work(recipe, shape, rows, chunk)
            u_row = shape.definition.gates * shape.target.padded(shape.hidden) * shape.acc_bytes
            fields |= {"u_work": recipe.buffer(rows * u_row), "u_row": u_row, "chunk": chunk}
            fields |= {"around": recipe.record(steps.LAYER, **where | panels[d])}
            with recipe.renamed(names):
                jobs.append(loop_jobs(recipe, shape, fields, rows, chunk, 0, 1))
    loop_phase(recipe, tasks.JVP, jobs)
