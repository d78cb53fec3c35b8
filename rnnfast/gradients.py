"""The gradient of a layer as a function that can be differentiated: the Function `LayerBackward`.

It runs the operator `rnnfast::layer_backward`. Its own backward and forward-mode derivatives are those of
`rnnfast.second_order`, or of a backend that has kernels for them.

Functions take constants that describe the layer, then its tensors as `rnnfast.spec.flatten` lists them.
"""

from collections.abc import Sequence
from functools import partial
from itertools import accumulate, pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from rnnfast import _torch, flops, operators, reference, second_order
from rnnfast.backends.dispatch import differentiates_twice, load
from rnnfast.context import (
    create_graph,
    enabled_below,
    is_differentiated,
    is_plain,
    needed_by_engine,
    no_more_derivatives,
)
from rnnfast.operator_checks import check_backward, check_layer, check_memory
from rnnfast.spec import Form, Needs, OutputTangents, Tangents, cell_named, form_of, restore
from rnnfast.vmap import map_backward, takes_batched_gradients


class Spec(NamedTuple):
    """The constants of a layer."""

    backend: str
    form: Form
    all_states: bool


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
    elif not cell_named(form.cell).standard:
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


def tangents_of(form: Form, tangents: Sequence[Tensor | None]) -> Tangents:
    """Name the tangents of a layer's differentiable tensors."""
    found = restore(form, tangents)
    return Tangents(found.x, found.hx, found.weights)


class LayerBackward(torch.autograd.Function):
    """The gradient of a layer by x, hx, signals and weights, as a function of these and of the incoming gradients.

    The derivatives of this function are total: the part through the states is added to that of x, hx and weights, and
    the states are constants.
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
        # `weight.data = other` may have come after the first derivative.
        check_layer(layer)
        check_memory(tensors)
        check_backward(layer, spec.backend, states, saved, gradients)
        with torch.no_grad():
            args = (layer, states, saved, dstates, dfinals, along, form.needs(wanted))
            found, of_states = load(spec.backend).hvp(*args)
        return operators.listed(form, found), of_states

    def backward(dstates):
        args = (*tensors, *states, *saved, *dstates, *(None,) * form.states)
        return LayerBackward.apply(spec, Needs(True, True, True), 1, *args)

    curved, of_states = second_order.hvp(layer, states, dstates, dfinals, along, backward)
    return [*curved], of_states


def backward_kernel(backend, cell, reverse, present, needs, groups, tensors, states, saved, gradients) -> list[Tensor]:
    """What autograd does on meeting the operator `layer_backward` itself."""
    form = form_of(cell, reverse, present)
    args = (*tensors, *states, *saved, *gradients)
    spec = Spec(backend, form, True)
    if is_differentiated(args):
        return list(_torch.apply_here(LayerBackward, spec, Needs(*needs), groups, *args))
    return list(LayerBackward.forward(spec, Needs(*needs), groups, *args))


operators.library.impl("layer_backward", backward_kernel, "Autograd")
