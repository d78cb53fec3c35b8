"""What the operators check themselves: a graph may call them with other tensors than those that it was traced with.

Kernels take addresses and sizes, so what is let through here is read and written as if it did fit.
"""

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

from rnnfast.backends.dispatch import load
from rnnfast.spec import Layer, cell_named, shown


def check_layer(layer: Layer) -> None:
    """Raise RuntimeError where the tensors of a layer do not fit together."""
    cell, x, first = layer.definition, layer.x, layer.weights[0]
    directions, packed = len(layer.reverse), x.dim() == 2
    inputs, hidden = first.w_ih.shape[-1], layer.hidden
    width = hidden if first.w_hh is None else first.w_hh.shape[-1]
    if x.dim() not in (2, 3) or not fits(x.shape[-1], inputs, directions):
        raise RuntimeError(f"rnnfast: expected x of shape [T, B, {inputs}] or [rows, {inputs}], got {list(x.shape)}")
    batch = layer.hx[0].shape[1] if packed and layer.hx[0].dim() > 1 else x.shape[-2]
    gates, recurrent = (cell.gates * hidden,), (cell.recurrent * hidden,)
    own = (len(cell.parameters), hidden)
    wanted = ((*gates, inputs), (*recurrent, width), gates, recurrent, (width, hidden), own)
    for n, weights in enumerate(layer.weights):
        for name, weight, shape in zip(weights._fields, weights, wanted, strict=True):
            if weight is not None:
                expect(f"{name} of direction {n}", weight, shape, x)
    for n, state in enumerate(layer.hx):
        expect(f"hx[{n}]", state, (directions, batch, width if n == 0 else hidden), x)
    steps = check_rows(x, layer.batch_sizes, batch)
    if layer.resets is not None:
        expect("resets", layer.resets, (steps, batch), None, torch.bool)
    check_signals(layer.cell, layer.signals, (steps, batch, hidden), x)


def fits(columns: int, inputs: int, directions: int) -> bool:
    """Say whether x has as many columns as weights of a width take: one input, or some that directions share evenly."""
    if columns == inputs:
        return True
    return inputs > 0 and columns > 0 and columns % inputs == 0 and directions % (columns // inputs) == 0


def check_rows(x: Tensor, batch_sizes: Tensor | None, batch: int) -> int:
    """Raise RuntimeError where batch_sizes are not those of x, padded or packed (`rnnfast.spec`); return T.

    On a GPU their values are not looked at, so as not to wait for it.
    """
    packed = x.dim() == 2
    if batch_sizes is None:
        if packed:
            raise RuntimeError("rnnfast: expected batch_sizes with an x of shape [rows, I], got None")
        return x.shape[0]
    steps = batch_sizes.shape[:1].numel() if packed else x.shape[0]
    expect("batch_sizes", batch_sizes, (steps,), None, torch.int64)
    if x.device.type == "cpu":
        sizes = batch_sizes.tolist()
        if (packed and sum(sizes) != len(x)) or any(a < b for a, b in pairwise([batch, *sizes, 0])):
            rows = f"{len(x)} rows of {batch} sequences" if packed else f"{batch} sequences"
            raise RuntimeError(f"rnnfast: expected batch_sizes for {rows}, which never grow, got {sizes}")
    return steps


def check_signals(cell: str, signals: Sequence[Tensor], full: tuple[int, int, int], x: Tensor) -> None:
    """Raise RuntimeError where signals are not those of a cell, broadcastable to [T, B, H]."""
    names = cell_named(cell).signals
    if len(signals) != len(names):
        raise RuntimeError(f"rnnfast: expected {len(names)} signals of {shown(cell)}, got {len(signals)}")
    for name, signal in zip(names, signals, strict=True):
        if signal.dim() != 3 or any(a not in (1, b) for a, b in zip(signal.shape, full, strict=True)):
            raise RuntimeError(
                f"rnnfast: expected the signal {name} to be broadcastable to {list(full)}, got {list(signal.shape)}"
            )
        expect(f"the signal {name}", signal, signal.shape, x)


def expect(
    name: str, tensor: Tensor, shape: Sequence[int], like: Tensor | None, dtype: torch.dtype | None = None
) -> None:
    """Raise RuntimeError where a tensor is of another shape, or of another dtype or device than `like`."""
    dtype = dtype if like is None else like.dtype
    if tensor.shape != shape or tensor.dtype != dtype or (like is not None and tensor.device != like.device):
        where = "" if like is None else f" on {like.device}"
        raise RuntimeError(
            f"rnnfast: expected {name} of shape {list(shape)}, {dtype}{where}, "
            f"got {list(tensor.shape)}, {tensor.dtype} on {tensor.device}"
        )


def check_memory(tensors: Sequence[Tensor]) -> None:
    """Raise RuntimeError where the memory of a tensor was given back (`untyped_storage().resize_(0)`)."""
    for tensor in tensors:
        if tensor.data_ptr() == 0 and tensor.numel():
            raise RuntimeError(f"rnnfast: a tensor of shape {list(tensor.shape)} has no memory: its storage has size 0")


def check_backward(layer: Layer, backend: str, states, saved, gradients) -> None:
    """Raise RuntimeError where what forward left, or a gradient, does not fit the layer."""
    lead, count = (*layer.x.shape[:-1], len(layer.reverse)), len(layer.hx)
    if len(states) != count or len(gradients) != 2 * count:
        raise RuntimeError(
            f"rnnfast: expected {count} states and {2 * count} gradients, got {len(states)} and {len(gradients)}"
        )
    for n, (state, initial) in enumerate(zip(states, layer.hx, strict=True)):
        shape = (*lead, initial.shape[-1])
        expect(f"states[{n}]", state, shape, layer.x)
        for name, gradient, own in (("dstates", gradients[n], shape), ("dfinals", gradients[count + n], initial.shape)):
            if gradient is not None:
                expect(f"{name}[{n}]", gradient, own, layer.x)
    for n, (tensor, (shape, dtype)) in enumerate(zip(saved, load(backend).saved_like(layer), strict=True)):
        expect(f"saved[{n}]", tensor, shape, None, dtype)
