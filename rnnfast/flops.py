"""FLOP formulas of the operators, for torch's FlopCounterMode: two for each multiplication and addition of a product.

Torch counts the products of its own layers like this, and nothing that is done element by element.
"""

import sys

import torch
from torch import Tensor

from rnnfast import _torch, frozen_ops, operators
from rnnfast.spec import Needs, cell_named


def known_sizes(batch_sizes: Tensor | None) -> Tensor | None:
    """Return the numbers of live rows at each step where they can be read."""
    return batch_sizes if type(batch_sizes) is Tensor and not batch_sizes.is_meta else None


def of_layer(backend, cell, reverse, present, save, all_states, tensors, *others, **options) -> int:
    """Count what `rnnfast::layer` multiplies and adds. Padding is not computed, nor counted where it is known."""
    layer = operators.layer_of(cell, reverse, present, tensors)
    matrices = (each for weights in layer.weights for each in (weights.w_ih, weights.w_hh, weights.w_hr))
    return 2 * count_rows(layer.x, layer.batch_sizes) * sum(each.numel() for each in matrices if each is not None)


def of_backward(backend, cell, reverse, present, needs, groups, tensors, *others, **options) -> int:
    """Count what `rnnfast::layer_backward` multiplies and adds: the way back in time, and the gradients asked for."""
    layer, wanted = operators.layer_of(cell, reverse, present, tensors), Needs(*needs)
    rows, sizes = count_rows(layer.x, layer.batch_sizes), known_sizes(layer.batch_sizes)
    first = 0 if wanted.hx else layer.hx[0].shape[1] if sizes is None else int(sizes[0])
    found = 0
    for each in layer.weights:
        found += rows * (wanted.x + wanted.weights) * each.w_ih.numel()
        found += (rows * (1 + wanted.weights) - first) * (0 if each.w_hh is None else each.w_hh.numel())
        found += rows * (1 + wanted.weights) * (0 if each.w_hr is None else each.w_hr.numel())
    return 2 * found


def of_frozen(
    cell, weights, inputs, hidden, width, projected, biased, reverse, all_states, processor, x, hx, held, batch_sizes,
    *others, **options,
) -> int:  # fmt: skip
    """Count what `rnnfast::frozen_layer` multiplies and adds, in whatever format."""
    row = cell_named(cell)
    each = hidden * (row.gates * inputs + row.recurrent * width) + (width * hidden if projected else 0)
    return 2 * count_rows(x, batch_sizes) * len(reverse) * each


def count_rows(x: Tensor, batch_sizes: Tensor | None) -> int:
    """Return the number of steps that all rows have together."""
    sizes = known_sizes(batch_sizes)
    return x.shape[:-1].numel() if sizes is None or x.dim() == 2 else int(sizes.sum())


FORMULAS = {
    torch.ops.rnnfast.layer: of_layer,
    torch.ops.rnnfast.layer_backward: of_backward,
    getattr(torch.ops.rnnfast, frozen_ops.NAME): of_frozen,
}


def register() -> None:
    """Tell counters of the formulas: those to come, and those that are at work.

    Torch's module of counters imports Triton, which takes long; nobody counts before it is there.
    """
    module = sys.modules.get("torch.utils.flop_counter")
    if module is None:
        return
    counters = [getattr(mode, "counter", mode) for mode in _torch.dispatch_modes()]
    for registry in (module.flop_registry, *(getattr(each, "flop_registry", {}) for each in counters)):
        for operator, formula in FORMULAS.items():
            registry.setdefault(operator, formula)


register()
