"""One autograd Function for every cell, and one more for its second derivative.

`LayerFunction` runs the operators of `rnnfast.operators`. Its backward is itself a Function, whose own backward and
forward-mode derivatives are those of `rnnfast.second_order`.

Functions take constants that describe the layer, then its tensors as `rnnfast.spec.flatten` lists them.
"""

from collections.abc import Callable, Sequence
from functools import partial
from itertools import accumulate, pairwise
from typing import NamedTuple

import torch
from rnnfast_kernels.cells import CELLS
from torch import Tensor

from rnnfast import _torch, flops, operators, reference, second_order
from rnnfast import onnx as onnx_export
from rnnfast.backends.dispatch import differentiates_twice, load, setting
from rnnfast.changes import unpack, versions
from rnnfast.context import (
    create_graph,
    enabled_below,
    is_differentiated,
    is_plain,
    needed_by_engine,
    no_more_derivatives,
)
from rnnfast.spec import Form, Layer, Needs, OutputTangents, States, Tangents, flatten, form_of, restore
from rnnfast.vmap import map_backward, map_layer, takes_batched_gradients


class Spec(NamedTuple):
    """The constants of a layer."""

    backend: str
    form: Form
    all_states: bool


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
    """Run a layer that transforms and forward mode take apart, of a cell of which kernels know the gradient alone.

    Raises:
        RuntimeError: kernels were asked for by name.
    """
    if setting() in ("numba", "triton"):
        raise RuntimeError(
            f"the {setting()!r} backend cannot run this: it has no kernels for forward mode and torch.func transforms "
            f"of cells of other forms than torch's, such as {layer.cell}"
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


def backward_kernel(backend, cell, reverse, present, needs, groups, tensors, states, saved, gradients) -> list[Tensor]:
    """What autograd does on meeting the operator `layer_backward` itself."""
    form = form_of(cell, reverse, present)
    args = (*tensors, *states, *saved, *gradients)
    spec = Spec(backend, form, True)
    if is_differentiated(args):
        return list(_torch.apply_here(LayerBackward, spec, Needs(*needs), groups, *args))
    return list(LayerBackward.forward(spec, Needs(*needs), groups, *args))


def below_autograd(name: str, tensors: Sequence[Tensor], *args) -> list[Tensor]:
    """Call an operator below autograd: through torch's dispatcher, unless nothing would happen there."""
    if torch.compiler.is_dynamo_compiling():
        return getattr(torch.ops.rnnfast, name)(*args)
    if is_plain(tensors):
        return getattr(operators, name)(*args)
    if _torch.count_dispatch_modes() > 0:
        flops.register()
    with _torch.below_autograd():
        return getattr(torch.ops.rnnfast, name)(*args)


def gradients_of(spec: Spec, tensors: Sequence, left: Sequence, wanted: Sequence[bool]) -> Sequence:
    """Return a layer's gradients. left: its states, what else it saved, and the gradients by states and final states.

    The second Function is there for `create_graph=True` and for forward mode over this; Dynamo traces without it and
    cannot follow one there.
    """
    form = spec.form
    if not create_graph():
        function = LayerBackward.forward
    elif not CELLS[form.cell].standard:
        return differentiated_loop(form, tensors, left[-2 * form.states :], wanted)
    else:
        function = by_operator if _torch.is_functionalized() else partial(_torch.apply, LayerBackward)
    return function(spec, form.needs(wanted), 1, *tensors, *left)


def by_operator(spec: Spec, needs: Needs, groups: int, *args) -> tuple[Tensor, ...]:
    """Compute a layer's gradients by the operator, which takes the arguments of `LayerBackward` in lists."""
    return tuple(
        torch.ops.rnnfast.layer_backward(
            spec.backend, *spec.form.arguments(), list(needs), groups, *split(spec.form, args)
        )
    )


def split(form: Form, args: Sequence) -> tuple[Sequence, Sequence, Sequence, Sequence]:
    """Take the arguments of `LayerBackward` apart: a layer's tensors, states, what else it saved, and gradients."""
    count, states = form.total, form.states
    sizes = (count, states, len(args) - count - 3 * states, 2 * states)
    return tuple(args[a:b] for a, b in pairwise([0, *accumulate(sizes)]))  # type: ignore[return-value]


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
        unused = positions(form, ("b_ih", "b_hh") if need_x else ("b_ih", "b_hh", "w_ih"))
        return saved if not create_graph() and unused.issuperset(changed) else None
    if changed[0] < form.total:
        return None
    tensors = saved[: form.total]
    constants = (spec.backend, *form.arguments(), True, spec.all_states)
    with torch.no_grad():
        found = below_autograd("layer", tensors, *constants, tensors, operators.version())
    return [*tensors, *found[: form.states], *found[2 * form.states :]]


def positions(form: Form, fields: Sequence[str]) -> set[int]:
    """Return the places of some of the weights among a layer's tensors."""
    places = restore(form, range(form.total))  # type: ignore[arg-type]
    return {getattr(direction, field) for direction in places.weights for field in fields}


def differentiated_loop(form: Form, tensors: Sequence[Tensor], grads, wanted: Sequence[bool]) -> list[Tensor | None]:
    """Differentiate the plain loop, in a way that can be differentiated again.

    By views of the tensors: these may depend on one another, be the same tensor, or have hooks.
    """
    with torch.enable_grad():
        tensors = [each.view_as(each) for each in tensors]
        states, finals = reference.run(restore(form, tensors))
    pairs = [(r, g) for r, g in zip((*states, *finals), grads, strict=True) if g is not None and r.requires_grad]
    if not pairs:  # no step ran, and the initial states want no gradient
        return [None] * form.differentiable
    results, seeds = zip(*pairs, strict=True)
    inputs = [tensor for tensor, want in zip(tensors, wanted, strict=True) if want]
    found = iter(torch.autograd.grad(results, inputs, seeds, create_graph=True, allow_unused=True))
    return [next(found) if want else None for want in wanted[: form.differentiable]]


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


def tangents_of(form: Form, tangents: Sequence[Tensor | None]) -> Tangents:
    """Name the tangents of a layer's differentiable tensors."""
    found = restore(form, tangents)
    return Tangents(found.x, found.hx, found.weights)


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


class LayerBackward(torch.autograd.Function):
    """The gradient of a layer by x, hx, signals and weights, as a function of these and of the incoming gradients.

    The states and saved tensors are results of x, hx and weights, and the derivatives of this function are total ones:
    what they owe to the states is counted under x, hx and weights, and the states themselves enter as constants.
    """

    @staticmethod
    def forward(spec, needs, groups, *args):
        lists = split(spec.form, args)
        with enabled_below():
            present = [each for each in args if each is not None]
            return tuple(
                below_autograd(
                    "layer_backward", present, spec.backend, *spec.form.arguments(), list(needs), groups, *lists
                )
            )

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.set_materialize_grads(False)
        ctx.constants = inputs[:3]
        ctx.save_for_backward(*inputs[3:])
        ctx.save_for_forward(*inputs[3:])

    @staticmethod
    @takes_batched_gradients
    def backward(ctx, *grads):
        spec, needs, _ = ctx.constants
        form, wanted = spec.form, needed_by_engine(ctx)[3:]
        tangents = [g if asked else None for g, asked in zip(grads, form.asked(needs), strict=True)]
        found, of_states = gradients_jvp(ctx, tangents, wanted[: form.differentiable])
        constants = (None,) * (len(wanted) - form.differentiable - 2 * form.states)
        results = (*found, *constants, *of_states.states, *of_states.finals)
        return (None,) * 3 + tuple(g if want else None for g, want in zip(results, wanted, strict=True))

    @staticmethod
    @takes_batched_gradients
    def jvp(ctx, *tangents):
        form = ctx.constants[0].form
        given, incoming = tangents[3 : 3 + form.differentiable], tangents[-2 * form.states :]
        curved, _ = gradients_jvp(ctx, given, (True,) * form.differentiable)
        along = LayerBackward.apply(*ctx.constants, *ctx.saved_tensors[: -2 * form.states], *incoming)
        return tuple(map(add_tangents, along, curved))

    @staticmethod
    def vmap(info, in_dims, spec, needs, groups, *args):
        def apply(form: Form, groups, tensors, states, saved, gradients):
            return LayerBackward.apply(
                spec._replace(form=form), needs, groups, *tensors, *states, *saved, *gradients
            )  # fmt: skip

        lists, dims = split(spec.form, args), split(spec.form, in_dims[3:])
        return map_backward(apply, spec.backend, spec.form, needs, groups, info.batch_size, lists, dims)


def add_tangents(along: Tensor, curved: Tensor | None) -> Tensor:
    """Add both parts of a gradient's tangent. A gradient that was not asked for has shape [0], and no tangent."""
    if curved is None or along.shape == (0,) != curved.shape:
        return along
    if along.shape != curved.shape:
        raise RuntimeError(
            f"rnnfast: parts of a gradient's tangent have shapes {[*along.shape]} and {[*curved.shape]}: "
            "gradients in groups have no forward derivative"
        )
    return along + curved


def gradients_jvp(ctx, tangents, wanted: Sequence[bool]) -> tuple[list[Tensor | None], OutputTangents]:
    """Differentiate the gradients that `LayerBackward` computes along tangents of x, hx and weights.

    wanted: which of the results will be used, in the order of the layer's differentiable tensors.
    """
    spec, _, groups = ctx.constants
    form = spec.form
    tensors, states, saved, gradients = map(tuple, split(form, ctx.saved_tensors))
    dstates, dfinals = gradients[: form.states], gradients[form.states :]
    layer = restore(form, tensors)
    along = tangents_of(form, [*tangents, *(None,) * (form.total - form.differentiable)])
    if groups > 1:
        raise RuntimeError("rnnfast: gradients in groups have no derivative")
    everything = (*ctx.saved_tensors, *tangents)
    if no_more_derivatives(everything) and differentiates_twice(spec.backend, form.cell, layer.x.dtype):
        with torch.no_grad():
            args = (layer, states, saved, dstates, dfinals, along, form.needs(wanted))
            found, of_states = load(spec.backend).hvp(*args)
        return operators.listed(form, found), of_states

    def backward(dstates):
        args = (*tensors, *states, *saved, *dstates, *(None,) * form.states)
        return LayerBackward.apply(spec, Needs(True, True, True), 1, *args)

    curved, of_states = second_order.hvp(layer, states, dstates, dfinals, along, backward)
    return [*curved], of_states


operators.library.impl("layer", layer_kernel, "Autograd")
operators.library.impl("layer_backward", backward_kernel, "Autograd")
