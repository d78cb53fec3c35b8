"""FLOP formulas of both operators, for torch's FlopCounterMode: two for each multiplication and addition of a product.

Torch counts the products of its own layers like this, and nothing that is done element by element.
"""

import sys

import torch
from torch import Tensor

from rnnfast import _torch, ops


def known_sizes(batch_sizes: Tensor | None) -> Tensor | None:
    """Return the numbers of live rows at each step where they can be read."""
    return batch_sizes if type(batch_sizes) is Tensor and not batch_sizes.is_meta else None


def of_layer(cell, backend, reverse, save, all_states, x, hx, weights, batch_sizes, *others, **options) -> int:
    """Count what `rnnfast::layer` multiplies and adds. Padding is not computed, nor counted where it is known."""
    rows = count_rows(x, batch_sizes)
    matrices = (each for weight in ops.pack_weights(weights, len(reverse)) for each in weight if each is not None)
    return 2 * rows * sum(each.numel() for each in matrices if each.dim() == 2)


def of_backward(
    cell, backend, reverse, need_x, need_hx, need_weights, groups, x, hx, weights, batch_sizes, *others, **options
) -> int:
    """Count what `rnnfast::layer_backward` multiplies and adds: the way back in time, and the gradients asked for."""
    rows, sizes = count_rows(x, batch_sizes), known_sizes(batch_sizes)
    first = 0 if need_hx else hx[0].shape[1] if sizes is None else int(sizes[0])
    found = 0
    for each in ops.pack_weights(weights, len(reverse)):
        found += rows * (need_x + need_weights) * each.w_ih.numel()
        found += (rows * (1 + need_weights) - first) * each.w_hh.numel()
        found += rows * (1 + need_weights) * (0 if each.w_hr is None else each.w_hr.numel())
    return 2 * found


def count_rows(x: Tensor, batch_sizes: Tensor | None) -> int:
    """Return the number of steps that all rows have together."""
    sizes = known_sizes(batch_sizes)
    return x.shape[:-1].numel() if sizes is None or x.dim() == 2 else int(sizes.sum())


FORMULAS = {torch.ops.rnnfast.layer: of_layer, torch.ops.rnnfast.layer_backward: of_backward}


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
