"""Small calls made quick where derivatives are wanted: layers prepared once per kind of call (see `rnnfast.quick`).

What is prepared is the plain first derivative. Whatever else is asked of the graph afterwards, derivatives of
derivatives, maps over incoming gradients, tracing, is given to `autograd.LayerBackward` like any other layer.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from rnnfast import autograd
from rnnfast.backends import Needs
from rnnfast.stacking import through_layers


def sees_hooks() -> bool:
    """Say whether this torch tells which hooks there are on tensors that are saved for backward."""
    return hasattr(torch._C._autograd, "_top_saved_tensors_default_hooks")


def can_prepare(options, x: Tensor) -> bool:
    """Say whether a call through which a derivative may be taken can be made quick.

    Hooks on saved tensors, those of checkpoints among them, count what is saved, call by call.
    """
    return (
        x.dim() == 3
        and not options.recompute
        and sees_hooks()
        and torch._C._autograd._top_saved_tensors_default_hooks(True) is None
    )


class QuickLayer(torch.autograd.Function):
    """A prepared layer: the output [T, B, D*P] and the final states of x, the initial states if given, and weights."""

    @staticmethod
    def forward(ctx, layer, x, *tensors):
        output, finals, kept = layer.forward(x, *tensors)
        ctx.layer = layer
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x, *tensors, output, *kept)
        return output, *finals

    @staticmethod
    def backward(ctx, *grads):
        layer, (_, need_x, *need_tensors) = ctx.layer, ctx.needs_input_grad
        given = [grad for grad in grads if grad is not None]
        if not given:
            return (None,) * (2 + len(need_tensors))
        saved = ctx.saved_tensors
        count = len(layer.initial)
        needs = Needs(need_x, any(need_tensors[:count]), any(need_tensors[count:]))
        if not torch.is_grad_enabled() and autograd.is_plain((*saved, *given)) and layer.fits(saved):
            return None, *layer.backward(saved, grads, needs)
        found = by_operators(layer, saved, grads, needs)
        return None, *(grad if need else None for grad, need in zip(found, (need_x, *need_tensors), strict=True))


# Past the look at the signature, and at transforms, which are not there, that `Function.apply` takes first.
apply = super(torch.autograd.Function, QuickLayer).apply


def by_operators(layer, saved: Sequence[Tensor], grads: Sequence[Tensor | None], needs: Needs) -> list[Tensor]:
    """Do what `layer.backward` does as the operator that is differentiable, mapped and traced."""
    sizes, given = layer.sizes, len(layer.initial)
    x, *tensors = saved[: 1 + given + len(layer.weights)]
    output, *kept = saved[1 + len(tensors) :]
    hx = tensors[:given] or [x.new_zeros(size) for size in sizes.finals]
    inputs = (x, *hx, *tensors[given:])
    doutput, *dfinals = (grad if grad is None else grad.contiguous() for grad in grads)
    dh = None if doutput is None else doutput.unflatten(-1, (sizes.directions, -1))
    h = output.unflatten(-1, (sizes.directions, -1))
    results = autograd.apply(
        autograd.LayerBackward,
        sizes.cell, "numba", (False, True)[: sizes.directions], *needs, 1, len(inputs), len(kept) - len(hx) + 1,
        None, None, *inputs, h, *kept, dh, *(None,) * (len(hx) - 1), *dfinals,
    )  # fmt: skip
    return [results[0], *results[1 + len(hx) - given :]]


class Training:
    """A call of one kind."""

    def __init__(self, options, layers: Sequence):
        self.options, self.layers = options, layers

    def __call__(self, x: Tensor, states: Sequence[Tensor], weights: Sequence[Tensor]):
        """Return the output and the final states, as a module does."""
        options = self.options
        if options.batch_first:
            x = x.transpose(0, 1)
        output, finals = through_layers(options, x, states, weights, self.run)
        return output.transpose(0, 1) if options.batch_first else output, finals if len(finals) > 1 else finals[0]

    def run(self, n: int, x: Tensor, hx: Sequence[Tensor], weights: Sequence[Tensor]):
        """Run layer number n."""
        output, *finals = apply(self.layers[n], x, *hx, *weights)
        return output, finals
