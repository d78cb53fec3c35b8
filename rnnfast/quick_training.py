"""Small calls made quick where derivatives are wanted: layers prepared once per kind of call (see `rnnfast.quick`).

What is prepared is the plain first derivative. Whatever else is asked of the graph afterwards, derivatives of
derivatives, maps over incoming gradients, tracing, is given to `autograd.LayerBackward` like any other layer.
"""

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from rnnfast import _torch, autograd
from rnnfast.backends import NoMemoryError
from rnnfast.batching import takes_batched_gradients
from rnnfast.changes import unpack, versions
from rnnfast.stacking import through_layers


def can_prepare(options, x: Tensor) -> bool:
    """Say whether a call through which a derivative may be taken can be made quick.

    Hooks on saved tensors, those of checkpoints among them, count what is saved, call by call.
    """
    return x.dim() == 3 and not options.recompute and _torch.saving_hooks(True) is None


class QuickLayer(torch.autograd.Function):
    """A prepared layer: the output [T, B, D*P] and the final states of x, the initial states if given, and weights."""

    @staticmethod
    def forward(ctx, layer, x, *tensors):
        output, finals, kept = layer.forward(x, *tensors)
        ctx.layer = layer
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x, *tensors, output, *kept)
        ctx.versions = versions((x, *tensors))
        return output, *finals

    @staticmethod
    @takes_batched_gradients
    def backward(ctx, *grads):
        given = [grad for grad in grads if grad is not None]
        if not given:
            return (None,) * len(ctx.needs_input_grad)
        layer = ctx.layer
        try:
            saved = ctx.saved_tensors
        except RuntimeError:
            saved = unpack(ctx, ctx.versions, partial(repair, layer, ctx.needs_input_grad[1]))
        if autograd.create_graph():
            return None, *by_operators(layer, saved, grads, autograd.needed_by_engine(ctx)[1:])
        tracing = torch.compiler.is_dynamo_compiling()
        if tracing or not autograd.is_plain(given, saved) or not layer.fits(saved):
            return None, *by_operators(layer, saved, grads, ctx.needs_input_grad[1:])
        return None, *layer.backward(saved, grads, ctx.needs_input_grad[1:])


def repair(layer, need_x: bool, saved: list, changed: Sequence[int]) -> list | None:
    """Return what a layer saved, of which some were changed in place: see `rnnfast.changes.unpack`."""
    first = 1 + len(layer.initial) + len(layer.weights)  # of the results
    if changed[-1] < first:
        names = [layer.saved[n] for n in changed]
        unused = ("b_ih", "b_hh") if need_x else ("b_ih", "b_hh", "w_ih")
        return saved if not autograd.create_graph() and all(name.startswith(unused) for name in names) else None
    if changed[0] < first or not layer.fits(saved):
        return None
    with torch.no_grad():
        output, _, kept = layer.forward(*saved[:first])
    return [*saved[:first], output, *kept]


# Past the look at the signature, and at transforms, which are not there, that `Function.apply` takes first.
apply = super(torch.autograd.Function, QuickLayer).apply


def by_operators(
    layer, saved: Sequence[Tensor], grads: Sequence[Tensor | None], wanted: Sequence[bool]
) -> list[Tensor | None]:
    """Do what `layer.backward` does by the operator that is differentiable, mapped and traced."""
    sizes, given = layer.sizes, len(layer.initial)
    x, *tensors = saved[: 1 + given + len(layer.weights)]
    output, *kept = saved[1 + len(tensors) :]
    hx = tensors[:given] or [x.new_zeros(size) for size in sizes.finals]
    inputs = (x, *hx, *tensors[given:])
    h, dh = (each if each is None else each.unflatten(-1, (sizes.directions, -1)) for each in (output, grads[0]))
    function = autograd.backward_function()
    results = function(
        sizes.cell, "numba", (False, True)[: sizes.directions], *layer.needs(wanted), 1,
        len(inputs), len(kept) - len(hx) + 1,
        None, None, *inputs, h, *kept, dh, *(None,) * (len(hx) - 1), *grads[1:],
    )  # fmt: skip
    found = (results[0], *results[1 + len(hx) - given :])
    return [grad if want else None for grad, want in zip(found, wanted, strict=True)]


class Training:
    """A call of one kind."""

    def __init__(self, options, layers: Sequence):
        self.options, self.layers = options, layers

    def __call__(self, x: Tensor, states: Sequence[Tensor], weights: Sequence[Tensor]):
        """Return the output and the final states, as a module does, or None where a tensor has no memory."""
        options = self.options
        if options.batch_first:
            x = x.transpose(0, 1)
        try:
            output, finals, _ = through_layers(options, x, states, weights, self.run)
        except NoMemoryError:
            return None
        if options.batch_first:
            output = output.transpose(0, 1)
        return output, finals if len(finals) > 1 else finals[0]

    def run(self, n: int, x: Tensor, hx: Sequence[Tensor], weights: Sequence[Tensor]):
        """Run layer number n."""
        output, *finals = apply(self.layers[n], x, *hx, *weights)
        return output, finals, ()
