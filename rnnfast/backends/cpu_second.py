"""Second derivatives as calls of the Numba kernels, which know float32 and float64; halves are converted.

The names are those of the fields and bases in `rnnfast_kernels.cpu.plan_second`.
"""

from dataclasses import replace
from itertools import chain
from typing import Any

import torch
from rnnfast_kernels.cpu import plan_second
from rnnfast_kernels.cpu.recipe import Recipe
from torch import Tensor

from rnnfast.backends import Changes, Gradients, Layer, Needs, Pushed
from rnnfast.backends.cpu_jobs import NO_WEIGHTS, WIDER, Call, empty_weights, room, weight_names


class SecondCall(Call):
    """A layer's tensors, what its forward pass left, and the changes, by the names of their bases.

    moves_x, moves_weights: whether x changes, and whether the weights do. kept: names of what forward left beside h.
    """

    derivatives = 2

    def __init__(self, layer: Layer, states: tuple[Tensor, ...], saved: tuple[Tensor, ...], changes: Changes):
        super().__init__(layer)
        shape, x = self.shape, self.x
        left = dict(zip(("h", "extra") if shape.extra else ("h",), states, strict=True))
        left |= zip(("gates",) * bool(self.cell.saved) + ("unprojected",) * self.projected, saved, strict=True)
        self.tensors |= {name: tensor.contiguous() for name, tensor in left.items()}
        self.kept = tuple(left)[1:]
        given = list(chain.from_iterable(changes.weights))
        self.moves_weights = any(change is not None for change in given)
        # The kernels want one of the two.
        self.moves_x = changes.x is not None or not self.moves_weights
        if self.moves_x:
            self.change("x", changes.x, x)
        for name, change, initial in zip(("h_first", "extra_first"), changes.hx, self.hx, strict=False):
            self.change(name, change, initial)
        if self.moves_weights:
            for name, change in zip(chain.from_iterable(weight_names(len(layer.weights))), given, strict=True):
                self.change(name, change, self.tensors[name])
        self.pushed = tuple(room(x, *self.lead, size) for size in (shape.width, shape.hidden)[: len(states)])
        self.finals = tuple(torch.empty_like(initial) for initial in self.hx)
        found = dict(zip(("h", "extra"), self.pushed, strict=False))
        found |= {name: room(x, *left[name].shape) for name in self.kept if name != "extra"}
        found |= zip(("h_final", "extra_final"), self.finals, strict=False)
        self.tensors |= {f"{name}_dot": tensor for name, tensor in found.items()}

    def change(self, name: str, change: Tensor | None, like: Tensor | None) -> None:
        """Take the change of a tensor that there is; None for no change."""
        if like is not None:
            given = (
                torch.zeros_like(like, memory_format=torch.contiguous_format) if change is None else change.contiguous()
            )
            self.tensors[f"{name}_dot"] = given

    def run_second(self, recipe: Recipe) -> Pushed:
        """Run a recipe over all of them."""
        self.run(recipe, {})
        return Pushed(self.pushed, self.finals)


def in_dtype(tensors: Any, dtype: torch.dtype) -> Any:
    """Convert all tensors of a structure."""
    if isinstance(tensors, Tensor):
        return tensors.to(dtype)
    if not isinstance(tensors, tuple | list):
        return tensors
    parts = [in_dtype(each, dtype) for each in tensors]
    return type(tensors)(*parts) if hasattr(tensors, "_fields") else type(tensors)(parts)


def convert(layer: Layer, dtype: torch.dtype) -> Layer:
    """Return the layer with its tensors in `dtype`."""
    x, hx, weights = in_dtype((layer.x, layer.hx, layer.weights), dtype)
    return replace(layer, x=x, hx=hx, weights=weights)


def run_push(layer: Layer, states: tuple[Tensor, ...], saved: tuple[Tensor, ...], changes: Changes) -> Pushed:
    dtype = layer.x.dtype
    if dtype in WIDER:
        wider = WIDER[dtype]
        return in_dtype(run_push(convert(layer, wider), *in_dtype((states, saved, changes), wider)), dtype)
    call = SecondCall(layer, states, saved, changes)
    return call.run_second(plan_second.push(call.shape, call.kept, call.moves_x, call.moves_weights, call.biased))


def run_bend(
    layer: Layer,
    states: tuple[Tensor, ...],
    saved: tuple[Tensor, ...],
    dstates: tuple[Tensor | None, ...],
    dfinals: tuple[Tensor | None, ...],
    changes: Changes,
    needs: Needs,
) -> tuple[Gradients, Pushed]:
    dtype = layer.x.dtype
    if dtype in WIDER:
        wider = WIDER[dtype]
        given = in_dtype((states, saved, dstates, dfinals, changes, needs), wider)
        return in_dtype(run_bend(convert(layer, wider), *given), dtype)
    call = SecondCall(layer, states, saved, changes)
    incoming = zip(("dh", "dextra"), dstates, strict=False), zip(("dh_final", "dextra_final"), dfinals, strict=False)
    given = {name: gradient.contiguous() for name, gradient in chain(*incoming) if gradient is not None}
    dx = room(call.x, *call.x.shape) if needs.x else None
    dhx = tuple(torch.empty_like(initial) for initial in call.hx)
    dweights = tuple(empty_weights(call, weights, 1) if needs.weights else NO_WEIGHTS for weights in layer.weights)
    call.tensors |= {**given, "dx": dx, **dict(zip(("dh_first", "dextra_first"), dhx, strict=False))}
    call.tensors |= zip(chain.from_iterable(weight_names(len(dweights), "d")), chain(*dweights), strict=True)
    recipe = plan_second.bend(
        call.shape, call.kept, tuple(given), call.moves_x, call.moves_weights, needs.x, needs.weights, call.biased
    )
    pushed = call.run_second(recipe)
    return Gradients(dx, dhx if needs.hx else (None,) * len(dhx), dweights), pushed
