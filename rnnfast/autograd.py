"""One autograd Function for every cell, `LayerFunction`, and who runs a layer under autograd.

`LayerFunction` runs the operator `rnnfast::layer`. Its backward is itself a Function, that of `rnnfast.gradients`.
"""

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

from rnnfast import _torch, operators, reference, second_order
from rnnfast import onnx as onnx_export
from rnnfast.backends.dispatch import differentiates_twice, load, setting
from rnnfast.changes import unpack, versions
from rnnfast.context import create_graph, enabled_below, is_differentiated, needed_by_engine, no_more_derivatives
from rnnfast.gradients import Spec, below_autograd, gradients_of, tangents_of
from rnnfast.spec import Form, Layer, OutputTangents, States, flatten, form_of, restore, shown
from rnnfast.vmap import map_layer, takes_batched_gradients


def layer(layer: Layer, backend: str, all_states: bool) -> tuple[States, States]:
    """Run one layer under autograd and return its states and final states.

    States beyond the first are usable only with `all_states`.
    """
    form, tensors = flatten(layer)
    compiling = torch.compiler.is_compiling()
    if compiling and operators.in_onnx_export():
        return onnx_export.layer(layer, all_states)
    if compiling:
        results = torch.ops.rnnfast.layer(backend, *form.arguments(), False, all_states, tensors, operators.version())
    elif not is_differentiated(tensors) and (layer.definition.standard or _torch.innermost_transform() is None):
        results = below_autograd("layer", tensors, backend, *form.arguments(), False, all_states, tensors)
    elif not layer.definition.standard and (_torch.innermost_transform() is not None or _torch.in_dual_level()):
        return by_plain_loop(layer)
    elif _torch.forward_nesting() > 1:
        return reference.run(layer)
    elif _torch.is_functionalized():
        results = torch.ops.rnnfast.layer(backend, *form.arguments(), False, all_states, tensors, operators.version())
    else:
        results = _torch.apply(LayerFunction, Spec(backend, form, all_states), *tensors)
    count = len(layer.hx)
    return tuple(results[:count]), tuple(results[count : 2 * count])


def by_plain_loop(layer: Layer) -> tuple[States, States]:
    """Run the plain loop: transforms and forward mode of a cell for which kernels have only the gradient.

    Raises:
        RuntimeError: kernels were asked for by name.
    """
    if setting() in ("numba", "triton"):
        raise RuntimeError(
            f"the {setting()!r} backend cannot run this: it has no kernels for forward mode and torch.func transforms "
            f"of cells of other forms than torch's, such as {shown(layer.cell)}"
        )
    return reference.run(layer)


def layer_kernel(backend, cell, reverse, present, save, all_states, tensors, version="") -> list[Tensor]:
    """What autograd does on meeting the operator `layer` itself: in a traced graph, where Functions would be slow."""
    form = form_of(cell, reverse, present)
    if not is_differentiated(tensors):
        return below_autograd("layer", tensors, backend, *form.arguments(), save, all_states, tensors, version)
    if _torch.forward_nesting() > 1:
        raise RuntimeError(
            "rnnfast: torch.compile cannot trace nested forward-mode transforms (jvp of jvp, jacfwd of jacfwd); "
            "call them outside of torch.compile, or nest jacfwd over jacrev as torch.func.hessian does"
        )
    results = _torch.apply_here(LayerFunction, Spec(backend, form, True), *tensors)
    count = form.states
    hidden = () if save or all_states else results[1:count]
    shown = results if save else results[: 2 * count]
    return [tensors[0].new_empty(0) if 1 <= n <= len(hidden) else result for n, result in enumerate(shown)]


class LayerFunction(torch.autograd.Function):
    """A layer with what backward needs: returns the states, the finals and the saved tensors."""

    @staticmethod
    def forward(spec, *tensors):
        constants = (spec.backend, *spec.form.arguments(), True, spec.all_states)
        with enabled_below():
            return tuple(below_autograd("layer", tensors, *constants, tensors, operators.version()))

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.spec, *tensors = inputs
        count = ctx.spec.form.states
        states, saved = output[:count], output[2 * count :]
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(*saved)
        ctx.save_for_backward(*tensors, *states, *saved)
        traced = torch.compiler.is_dynamo_compiling() or _torch.innermost_transform() is not None
        ctx.versions = None if traced else versions(tensors)
        ctx.save_for_forward(*tensors, *states, *saved)

    @staticmethod
    @takes_batched_gradients
    def backward(ctx, *grads):
        if all(g is None for g in grads):
            return (None,) * len(ctx.needs_input_grad)
        form = ctx.spec.form
        wanted = (needed_by_engine(ctx) if create_graph() else ctx.needs_input_grad)[1:]
        if torch.compiler.is_dynamo_compiling():
            saved = ctx.saved_tensors
        else:
            saved = unpack(ctx, ctx.versions, partial(repair, ctx.spec, wanted[0]))
        left = (*saved[form.total :], *grads[: 2 * form.states])
        results = gradients_of(ctx.spec, saved[: form.total], left, wanted)
        results = (*results, *(None,) * (form.total - form.differentiable))
        return None, *(g if want else None for g, want in zip(results, wanted, strict=True))

    @staticmethod
    @takes_batched_gradients
    def jvp(ctx, *tangents):
        form = ctx.spec.form
        tensors = (*ctx.saved_tensors, *tangents[1:])
        if _torch.innermost_transform() is None:
            found = layer_jvp(ctx.spec, tensors)
        else:
            found = below_one_jvp(partial(layer_jvp, ctx.spec), tensors)
        return (*found.states, *found.finals, *(None,) * (len(ctx.saved_tensors) - form.total - form.states))

    @staticmethod
    def vmap(info, in_dims, spec, *tensors):
        def apply(form: Form, tensors):
            return LayerFunction.apply(spec._replace(form=form), *tensors)

        return map_layer(apply, spec.backend, spec.form, info.batch_size, tensors, in_dims[1:])


def repair(spec: Spec, need_x: bool, saved: list, changed: Sequence[int]) -> list | None:
    """Return what a layer saved, of which some were changed in place: see `rnnfast.changes.unpack`."""
    form = spec.form
    if changed[-1] < form.total:
        return saved if not create_graph() and unread_weights(form, need_x).issuperset(changed) else None
    if changed[0] < form.total:
        return None
    tensors = saved[: form.total]
    constants = (spec.backend, *form.arguments(), True, spec.all_states)
    with torch.no_grad():
        found = below_autograd("layer", tensors, *constants, tensors, operators.version())
    return [*tensors, *found[: form.states], *found[2 * form.states :]]


def unread_weights(form: Form, need_x: bool) -> set[int]:
    """Return the places, among a layer's tensors, of weights whose values backward does not read."""
    fields = ("b_ih", "b_hh") if need_x else ("b_ih", "b_hh", "w_ih")
    places = restore(form, range(form.total))  # type: ignore[arg-type]
    return {getattr(direction, field) for direction in places.weights for field in fields}


def layer_jvp(spec: Spec, tensors: Sequence) -> OutputTangents:
    """Return the tangents of a layer's states. tensors: what `LayerFunction` saved, and the tangents."""
    form = spec.form
    saved, tangents = tensors[: -form.total], tensors[-form.total :]
    layer, states = restore(form, saved), tuple(saved[form.total : form.total + form.states])
    along, kernels = tangents_of(form, tangents), load(spec.backend)
    if no_more_derivatives(tensors) and differentiates_twice(spec.backend, form.cell, layer.x.dtype):
        with torch.no_grad():
            return kernels.jvp(layer, states, saved[form.total + form.states :], along)
    return second_order.layer_jvp(layer, states, along)


def below_one_jvp(
    function: Callable[[Sequence[Tensor | None]], OutputTangents], tensors: Sequence[Tensor | None]
) -> OutputTangents:
    """Call a function on what lies below `torch.func.jvp`, if that is the only transform around.

    A derivative by forward mode is not itself differentiated in the same level.
    """
    interpreter = _torch.current_transform() if _torch.lowers else None
    if interpreter is None or not _torch.is_jvp(interpreter) or interpreter.level() > 1:
        return function(tensors)
    level, unwrap, wrap = interpreter.level(), _torch.unwrap_for_grad, _torch.wrap_for_grad
    with interpreter.lower():
        found = function([t if t is None else unwrap(t, level) for t in tensors])
    return OutputTangents(*(tuple(wrap(t, level) for t in each) for each in found))


operators.library.impl("layer", layer_kernel, "Autograd")
