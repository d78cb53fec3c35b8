"""Layers on top of one another: the one loop over layers, whatever runs each of them."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from rnnfast.spec import Options

Tensors = Sequence[Tensor]
# Runs layer number n over x, initial states and weights: its output [*L, D*P], its final states, and its states.
RunLayer = Callable[[int, Tensor, Tensors, Tensors], tuple[Tensor, Tensors, Tensors]]


def through_layers(
    options: Options, x: Tensor, hx: Tensors, weights: Tensors, run: RunLayer
) -> tuple[Tensor, tuple[Tensor, ...], Tensors]:
    """Run every layer, with dropout between them: output of the last, final states of all, states of the last."""
    layers, directions = options.num_layers, options.directions
    if layers == 1:
        output, finals, states = run(0, x, hx, weights)
        return output, tuple(finals), states
    count, found = len(weights) // layers, []
    for n in range(layers):
        initial = tuple(state[n * directions : (n + 1) * directions] for state in hx)
        x, finals, states = run(n, x, initial, weights[n * count : (n + 1) * count])
        found.append(finals)
        if options.dropout and options.training and n < layers - 1:
            x = torch.dropout(x, options.dropout, True)  # which refuses what is no probability
    return x, tuple(torch.cat(parts) for parts in zip(*found, strict=True)), states
