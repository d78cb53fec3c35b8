"""The Triton backend: allocates, does the large matrix products with torch, and launches the time loops.

Dimensions: T steps, B batch rows, I input width, H hidden units, P projection width, G gates, S states, D directions,
R rows of all steps together (T * B where the input is not packed).

A projection never enters the time loop. `W_hh (W_hr m)` is `(W_hh W_hr) m`, so the loop runs over the unprojected output
m with the product of the two weights, and the projected states are one large matrix product behind it. The initial
state, which is given in projected form, joins the input part of each row's first step.
"""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor
from triton import knobs

from rnnfast.backends import Gradients, Layer, Needs, Result, Weights
from rnnfast_kernels.cells import CELLS
from rnnfast_kernels.gpu import launch, plan
from rnnfast_kernels.gpu.arguments import BackwardTensors, ForwardTensors
from rnnfast_kernels.gpu.barrier import COUNTER_STRIDE
from rnnfast_kernels.gpu.launch import Extent
from rnnfast_kernels.gpu.streamed import BackwardCarry, ForwardCarry, ShiftTensors

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def unsupported(cell: str, device: torch.device, dtype: torch.dtype) -> str | None:
    """Say why this backend cannot run the case, or None where it can."""
    if device.type != "cuda" and not knobs.runtime.interpret:
        return f"it needs a CUDA or ROCm device (or TRITON_INTERPRET=1 for its interpreter), not {device.type!r}"
    if dtype not in DTYPES:
        return f"it computes in float32, float64, bfloat16 and float16, not {dtype}"
    return None if cell in CELLS else f"it has no cell {cell!r}"


def saved_like(layer: Layer) -> tuple[tuple[tuple[int, ...], torch.dtype], ...]:
    """Shapes of what `forward` saves: the activated gates, what a cell saves beyond them, the unprojected output."""
    cell, lead, dtype = CELLS[layer.cell], layer.x.shape[:-1], layer.x.dtype
    D, H = len(layer.reverse), layer.weights[0].w_ih.shape[0] // cell.gates
    shapes = []
    if cell.saved:
        shapes.append((*lead, D, cell.gates, H))
    if cell.saved > cell.gates:
        shapes.append((*lead, D, cell.saved - cell.gates, H))
    if layer.weights[0].w_hr is not None:
        shapes.append((*lead, D, H))
    return tuple((shape, dtype) for shape in shapes)


@dataclass(frozen=True)
class Rows:
    """Where the rows of each step are, on the layer's device; None for dense input, where it is computed."""

    count: Tensor | None  # int64 [T]
    first: Tensor | None  # int64 [T]
    total: int
    padded: bool


def find_rows(layer: Layer) -> Rows:
    """Lay out the rows of each step, without waiting for the device."""
    sizes, x = layer.batch_sizes, layer.x
    if sizes is None:
        return Rows(None, None, x.shape[0] * x.shape[1], False)
    if x.dim() == 3:
        steps = torch.arange(x.shape[0], device=x.device) * x.shape[1]
        return Rows(sizes.to(x.device), steps, x.shape[0] * x.shape[1], True)
    both = torch.stack((sizes, sizes.cumsum(0) - sizes)).to(x.device, non_blocking=True)
    return Rows(both[0], both[1], x.shape[0], False)
