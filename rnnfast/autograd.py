"""One autograd Function for every cell, and one more for its second derivative.

`LayerFunction` runs the operators of `rnnfast.ops`. Its backward is itself a Function, whose own backward
differentiates the reference loop: first derivatives come from the kernels, higher ones from plain torch.

Functions take flat positional arguments: first the constants that describe the layer, then its tensors
(x, the initial states, the weights), in the order of the operators.
"""

from functools import partial
from typing import NamedTuple

import torch
from rnnfast_kernels.cells import CELLS
from torch import Tensor

from rnnfast import batching, ops, reference


below_autograd = torch._C._AutoDispatchBelowAutograd


class Spec(NamedTuple):
    """The constants of a layer: the first arguments of both Functions."""

    cell: str
    backend: str
    reverse: tuple[bool, ...]
    all_states: bool

    @property
    def states(self) -> int:
        """Return the number of state tensors, S."""
        return len(CELLS[self.cell].states)


def layer(spec: Spec, x, hx, weights, batch_sizes, resets) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """Run one layer under autograd and return its states and final states.

    States beyond the first are usable only with `spec.all_states`.
    """
    tensors = (x, *hx, *weights)
    if not torch.compiler.is_compiling() and torch.is_grad_enabled() and any(t.requires_grad for t in tensors):
        results = LayerFunction.apply(*spec, batch_sizes, resets, *tensors)
    else:
        results = torch.ops.rnnfast.layer(
            spec.cell, spec.backend, spec.reverse, False, spec.all_states, x, hx, weights, batch_sizes, resets
        )
    return tuple(results[: spec.states]), tuple(results[spec.states : 2 * spec.states])


def layer_kernel(cell, backend, reverse, save, all_states, x, hx, weights, batch_sizes, resets) -> list[Tensor]:
    """What autograd does on meeting the operator `layer` itself: in a traced graph, where Functions would be slow."""
    if not (torch.is_grad_enabled() and torch._C._any_requires_grad(x, hx, weights)):
        with below_autograd():
            return torch.ops.rnnfast.layer(
                cell, backend, reverse, save, all_states, x, hx, weights, batch_sizes, resets
            )
    results = apply(LayerFunction, cell, backend, reverse, True, batch_sizes, resets, x, *hx, *weights)
    count = len(hx)
    hidden = () if save or all_states else results[1:count]
    shown = results if save else results[: 2 * count]
    return [x.new_empty(0) if 1 <= n <= len(hidden) else result for n, result in enumerate(shown)]


def backward_kernel(
    cell, backend, reverse, need_x, need_hx, need_weights, groups, x, hx, weights, batch_sizes, resets,
    states, saved, dstates, dfinals,
) -> list[Tensor]:  # fmt: skip
    """What autograd does on meeting the operator `layer_backward` itself."""
    counts = (1 + len(hx) + len(weights), len(saved))
    constants = (cell, backend, reverse, need_x, need_hx, need_weights, groups, *counts)
    tensors = (batch_sizes, resets, x, *hx, *weights, *states, *saved, *dstates, *dfinals)
    if torch.is_grad_enabled() and torch._C._any_requires_grad(*tensors):
        return list(apply(LayerBackward, *constants, *tensors))
    return list(LayerBackward.forward(*constants, *tensors))


def apply(function: type[torch.autograd.Function], *args) -> tuple[Tensor, ...]:
    """Apply a Function at the current level of torch.func's transforms, where a dispatched kernel already stands."""
    return super(torch.autograd.Function, function).apply(*args)


class LayerFunction(torch.autograd.Function):
    """A layer with what backward needs: returns the states, the finals and the saved tensors."""

    @staticmethod
    def forward(cell, backend, reverse, all_states, batch_sizes, resets, x, *tensors):
        count = len(CELLS[cell].states)
        with below_autograd():
            results = torch.ops.rnnfast.layer(
                cell, backend, reverse, True, all_states, x, tensors[:count], tensors[count:], batch_sizes, resets
            )
        return tuple(results)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.spec = Spec(*inputs[:4])
        count = ctx.spec.states
        states, saved = output[:count], output[2 * count :]
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(*saved)
        ctx.counts = (len(inputs) - 6, len(saved))
        ctx.save_for_backward(*inputs[4:], *states, *saved)

    @staticmethod
    def backward(ctx, *grads):
        count = ctx.spec.states
        needs = ctx.needs_input_grad[6:]
        flags = (needs[0], any(needs[1 : 1 + count]), any(needs[1 + count :]))
        # The second Function is there for `create_graph=True`; Dynamo traces without it and cannot follow one there.
        function = LayerBackward.apply if torch.is_grad_enabled() else LayerBackward.forward
        results = function(*ctx.spec[:3], *flags, 1, *ctx.counts, *ctx.saved_tensors, *grads[: 2 * count])
        grads = (g if need else None for g, need in zip(results, needs, strict=True))
        return (None,) * 6 + tuple(grads)

    @staticmethod
    def vmap(info, in_dims, *inputs):
        states = len(CELLS[inputs[0]].states)
        apply = partial(LayerFunction.apply, *inputs[:4])
        return batching.map_layer(apply, info.batch_size, inputs[4:], in_dims[4:], states)


class LayerBackward(torch.autograd.Function):
    """The gradient of a layer by x, hx and weights, as a function of these and of the incoming gradients.

    The states and saved tensors are results of x, hx and weights; they enter as constants because the second
    derivative is taken through the reference loop, which computes them anew.
    """

    @staticmethod
    def forward(cell, backend, reverse, need_x, need_hx, need_weights, groups, tensor_count, saved_count, *args):
        layer_args, states, saved, dstates, dfinals = split(cell, tensor_count, saved_count, args)
        x, hx, weights, batch_sizes, resets = layer_args
        with below_autograd():
            results = torch.ops.rnnfast.layer_backward(
                cell, backend, reverse, need_x, need_hx, need_weights, groups, x, hx, weights, batch_sizes, resets,
                states, saved, dstates, dfinals,
            )  # fmt: skip
        return tuple(results)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.set_materialize_grads(False)
        ctx.constants = inputs[:9]
        ctx.save_for_backward(*inputs[9:])

    @staticmethod
    def backward(ctx, *grads):
        cell, _, reverse, _, _, _, _, tensor_count, saved_count = ctx.constants
        layer_args, states, _, dstates, dfinals = split(cell, tensor_count, saved_count, ctx.saved_tensors)
        x, hx, weights, batch_sizes, resets = layer_args
        tensors = (x, *hx, *weights)
        incoming = (*dstates, *dfinals)
        needs = ctx.needs_input_grad[9:]
        found = differentiate_twice(cell, reverse, batch_sizes, resets, tensors, incoming, grads)
        by_tensor, by_incoming = found[: len(tensors)], found[len(tensors) :]
        constants = (None,) * (len(states) + saved_count)
        return (None,) * 9 + tuple(
            g if need else None
            for g, need in zip((None, None, *by_tensor, *constants, *by_incoming), needs, strict=True)
        )

    @staticmethod
    def vmap(info, in_dims, *inputs):
        states, saved = len(CELLS[inputs[0]].states), inputs[8]

        def apply(groups, *args):
            return LayerBackward.apply(*inputs[:6], groups, *inputs[7:9], *args)

        return batching.map_backward(apply, info.batch_size, inputs[9:], in_dims[9:], states, saved, inputs[3:6])


def split(cell: str, tensor_count: int, saved_count: int, args):
    """Undo the flattening of `LayerBackward`'s tensors."""
    count = len(CELLS[cell].states)
    batch_sizes, resets, x = args[:3]
    end = 2 + tensor_count
    hx, weights = args[3 : 3 + count], args[3 + count : end]
    states, saved = args[end : end + count], args[end + count : end + count + saved_count]
    dstates, dfinals = args[-2 * count : -count], args[-count:]
    return (x, hx, weights, batch_sizes, resets), states, saved, dstates, dfinals


def differentiate_twice(cell, reverse, batch_sizes, resets, tensors, incoming, grads) -> tuple[Tensor | None, ...]:
    """Pull `grads`, gradients by a layer's gradients, back to its tensors and to its incoming gradients.

    tensors: x, hx, weights. incoming: gradients by the states and finals, None for zero. grads: one per tensor.
    Under `create_graph=True` the result is differentiable in its turn.
    """
    count = len(CELLS[cell].states)
    again = torch.is_grad_enabled()
    with torch.enable_grad():
        inputs = [variable(t, again) for t in tensors]
        seeds = [None if g is None else variable(g, again) for g in incoming]
        x, hx, weights = inputs[0], inputs[1 : 1 + count], inputs[1 + count :]
        states, finals = reference.run(ops.make_layer(cell, reverse, x, hx, weights, batch_sizes, resets))
        pairs = zip((*states, *finals), seeds, strict=True)
        pairs = [(out, seed) for out, seed in pairs if seed is not None and out.requires_grad]
        if not pairs:
            return (None,) * (len(tensors) + len(incoming))
        outputs, given = zip(*pairs, strict=True)
        first = torch.autograd.grad(outputs, inputs, given, create_graph=True, allow_unused=True)
        chosen = [(f, g) for f, g in zip(first, grads, strict=True) if f is not None and g is not None]
        if not chosen:
            return (None,) * (len(tensors) + len(incoming))
        by_first, by_grads = zip(*chosen, strict=True)
        wanted = [*inputs, *(seed for seed in seeds if seed is not None)]
        found = iter(torch.autograd.grad(by_first, wanted, by_grads, create_graph=again, allow_unused=True))
    by_tensor = [next(found) for _ in inputs]
    return (*by_tensor, *(None if seed is None else next(found) for seed in seeds))


def variable(tensor: Tensor, connected: bool) -> Tensor:
    """Return something to differentiate by: a view of `tensor` where its own graph goes on, else a fresh leaf."""
    if connected and tensor.requires_grad:
        return tensor.view_as(tensor)
    return tensor.detach().requires_grad_()


ops.library.impl("layer", layer_kernel, "Autograd")
ops.library.impl("layer_backward", backward_kernel, "Autograd")
