"""Layers of 2 inputs and 3 units in float64, and what tests of derivatives ask about them."""

import torch
from torch import Tensor

from rnnfast import operators
from rnnfast.functional import gru, lstm

F64 = {"dtype": torch.float64}
GATES = {gru: 3, lstm: 4}


def weights(cell, *members: int) -> list[Tensor]:
    """Return weights for 2 inputs and 3 units."""
    rows = 3 * GATES[cell]
    return [torch.randn(*members, *shape, **F64) for shape in ((rows, 2), (rows, 3), (rows,), (rows,))]


def each(function, size: int, *args):
    """Do what `vmap` does, in a loop over members."""
    found = [function(*(a[n] for a in args)) for n in range(size)]
    return tuple(map(torch.stack, zip(*found, strict=True))) if isinstance(found[0], tuple) else torch.stack(found)


def spied(monkeypatch, name: str) -> list[tuple]:
    """Return a list that grows by the arguments of every call of an operator."""
    calls, function = [], getattr(operators, name)
    monkeypatch.setattr(operators, name, lambda *args: calls.append(args) or function(*args))
    return calls
