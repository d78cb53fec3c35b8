"""The Numba backend: allocates tensors and scratch, cuts the work into jobs, and runs kernels over raw addresses.

What the kernels compute is in `rnnfast_kernels.cpu`. `saved` is, in this order, what of it there is:

    gates  [*L, D, saved * H]   what the cell wants back, gate by gate (LSTM and GRU)
    full   [*L, D, H]           the cell's output before its projection (with `proj_size`)
    states [*L, D, P or H]      every state in float32 (where the layer's dtype is a half precision)
"""

import functools
from dataclasses import replace
from importlib.util import find_spec

import torch
from rnnfast_kernels.cells import CELLS
from rnnfast_kernels.cpu.target import processor, target
from torch import Tensor

from rnnfast.backends import Gradients, Layer, Needs, Result, Weights
from rnnfast.backends.cpu_jobs import run_backward, run_forward
from rnnfast.backends.cpu_stack import Sizes, Stack

__all__ = ["Sizes", "Stack", "backward", "can_stack", "describe", "forward", "saved_like", "unsupported", "warmup"]

TAKES_ENSEMBLES = True
NATIVE = {torch.float32: "float32", torch.float64: "float64"}
HALF = (torch.bfloat16, torch.float16)


def unsupported(cell: str, device: torch.device, dtype: torch.dtype) -> str | None:
    """Say why this backend cannot run the case, or None where it can."""
    if device.type != "cpu":
        return f"the numba backend runs on the CPU, not on {device.type}"
    if cell not in CELLS:
        return f"the numba backend has no kernel for the cell {cell}"
    if dtype not in NATIVE and dtype not in HALF:
        return f"the numba backend computes float32, float64, bfloat16 and float16, not {dtype}"
    return None if has_compiler() else "numba is not installed"


@functools.cache
def has_compiler() -> bool:
    """Whether Numba is there; it is not imported, since kept machine code runs without it."""
    return find_spec("numba") is not None


def forward(layer: Layer, *, save: bool, all_states: bool) -> Result:
    """Run the layer. `save` asks for everything that `backward` needs, `all_states` for every entry of `states`."""
    if layer.x.dtype in HALF:
        return forward_half(layer, save=save, all_states=all_states)
    return run_forward(layer, save=save, keep_extra=save or all_states)


def forward_half(layer: Layer, *, save: bool, all_states: bool) -> Result:
    """Run a layer of half precision in float32; what the caller sees is rounded, what backward sees is not."""
    states, finals, saved = forward(convert(layer, torch.float32), save=save, all_states=all_states)
    dtype = layer.x.dtype
    rounded = tuple(state.to(dtype) for state in states)
    return Result(rounded, tuple(final.to(dtype) for final in finals), saved + states if save else ())


def convert(layer: Layer, dtype: torch.dtype) -> Layer:
    """Return the layer with all of its floating tensors in `dtype`."""
    weights = tuple(Weights._make(each if each is None else each.to(dtype) for each in w) for w in layer.weights)
    return replace(layer, x=layer.x.to(dtype), hx=tuple(each.to(dtype) for each in layer.hx), weights=weights)


def backward(
    layer: Layer,
    states: tuple[Tensor, ...],
    saved: tuple[Tensor, ...],
    dstates: tuple[Tensor | None, ...],
    dfinals: tuple[Tensor | None, ...],
    needs: Needs,
    groups: int = 1,
) -> Gradients:
    """Differentiate the layer. `states` and `saved` are `forward`'s; a gradient of None is zero."""
    if layer.x.dtype not in HALF:
        return run_backward(layer, states, saved, dstates, dfinals, needs, groups)
    exact = len(layer.hx)
    gradients = run_backward(
        convert(layer, torch.float32),
        saved[-exact:],
        saved[:-exact],
        tuple(each if each is None else each.float() for each in dstates),
        tuple(each if each is None else each.float() for each in dfinals),
        needs,
        groups,
    )
    return round_gradients(gradients, layer.x.dtype)


def can_stack(dtype: torch.dtype) -> bool:
    """Whether `Stack` runs a dtype; halves need conversions."""
    return dtype in NATIVE


def describe(cell: str, hidden: int, projection: int, device: torch.device, dtype: torch.dtype) -> str:
    """Name the kernel that runs a layer of this size, for `rnnfast.explain`."""
    host, computed = processor(), NATIVE.get(dtype, "float32")
    kernel = f"whole-layer {cell} kernel in {computed}, {target(computed).lanes} lanes on {host.name}"
    if cell == "lstm" and dtype == torch.bfloat16 and "+avx512bf16" in host.features:
        kernel += "; torch's is faster here, by this processor's bfloat16 products: use_backend(\"torch\")"
    return kernel


def round_gradients(gradients: Gradients, dtype: torch.dtype) -> Gradients:
    def rounded(each: Tensor | None) -> Tensor | None:
        return each if each is None else each.to(dtype)

    weights = tuple(Weights._make(map(rounded, w)) for w in gradients.weights)
    return Gradients(rounded(gradients.x), tuple(map(rounded, gradients.hx)), weights)


def saved_like(layer: Layer) -> tuple[tuple[tuple[int, ...], torch.dtype], ...]:
    """Shape and dtype of each tensor that `forward(layer, save=True)` puts into `saved`."""
    cell = CELLS[layer.cell]
    lead = (*layer.x.shape[:-1], len(layer.reverse))
    hidden = layer.weights[0].w_hh.shape[0] // cell.gates
    half = layer.x.dtype in HALF
    dtype = torch.float32 if half else layer.x.dtype
    shapes = []
    if cell.saved:
        shapes.append((*lead, cell.saved * hidden))
    if layer.weights[0].w_hr is not None:
        shapes.append((*lead, hidden))
    if half:
        shapes += [(*lead, initial.shape[-1]) for initial in layer.hx]
    return tuple((shape, dtype) for shape in shapes)


def warmup(cell: str, dtype: torch.dtype) -> None:
    """Compile the kernels of a cell and a dtype, or load them from the disk cache."""
    from rnnfast_kernels.cpu.compiled import kernel

    kernel(cell, NATIVE.get(dtype, "float32"))
