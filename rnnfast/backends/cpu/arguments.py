"""From a layer's tensors to a signature, names and addresses."""

from collections.abc import Sequence

import numpy as np
import torch
from rnnfast_kernels.cpu.runtime import pool
from torch import Tensor

from rnnfast.backends import NoMemoryError
from rnnfast.backends.cpu.executable import tensor_names
from rnnfast.spec import Layer, Signature, flatten


def described(layer: Layer) -> tuple[Signature, dict[str, Tensor]]:
    """Return a layer's signature, and its tensors by name, contiguous where kernels want them so."""
    form, tensors = flatten(layer)
    x, *others = tensors
    x = x if x.shape[-1] == 1 or x.stride(-1) == 1 else x.contiguous()
    end = form.states + form.signals
    hx = [each.contiguous() for each in others[: form.states]]
    signals = [as_signal(each) for each in others[form.states : end]]
    rest = [each.contiguous() for each in others[end:]]
    if form.present.batch_sizes:
        sizes = rest[-1 - form.present.resets]
        rest += [] if x.dim() == 3 else [sizes.cumsum(0) - sizes]
    threads, cuts = pool.usable(torch.get_num_threads()), None
    if form.present.batch_sizes and threads > 1:
        cuts = row_cuts(sizes, hx[0].shape[1], -(-threads // len(form.reverse)))
    signature = Signature(
        form, x.dtype, tuple(x.shape), x.stride(), layer.steps, hx[0].shape[1], layer.hidden, hx[0].shape[2],
        layer.inputs, False, threads, tuple(map(strides_of, signals)), cuts,
    )  # fmt: skip
    given = (x, hx[0], *present(together(hx[1:], hx[1:])), *signals, *rest)
    return signature, dict(zip(tensor_names(signature), given, strict=True))


def present(tensor: Tensor | None) -> tuple[Tensor, ...]:
    """Return what there is."""
    return () if tensor is None else (tensor,)


def as_signal(signal: Tensor) -> Tensor:
    """Return a signal as kernels read it: by any strides of steps and rows, and by units that follow one another."""
    return signal if signal.shape[-1] == 1 or signal.stride(-1) in (0, 1) else signal.contiguous()


def strides_of(signal: Tensor) -> tuple[int, ...]:
    """Return a signal's strides in bytes, 0 along dimensions of size 1."""
    pairs = zip(signal.shape, signal.stride(), strict=True)
    return tuple(stride * signal.element_size() if size > 1 else 0 for size, stride in pairs)


def row_cuts(sizes: Tensor, batch: int, slices: int) -> tuple[int, ...]:
    """Return bounds of slices of the batch with about as many valid rows each, over all steps."""
    slices = max(1, min(batch, slices))
    lengths = (sizes.numpy()[:, None] > np.arange(batch)).sum(0)
    done = np.concatenate([[0], np.cumsum(lengths)])
    cuts = np.searchsorted(done, done[-1] * np.arange(1, slices) / slices)
    return (0, *cuts.tolist(), batch)


def together(parts: Sequence[Tensor | None], like: Sequence[Tensor]) -> Tensor | None:
    """Return the states beside h as kernels take them: in one tensor, [S-1, *], if there are several."""
    if all(each is None for each in parts):
        return None
    there = [torch.zeros_like(own) if each is None else each for each, own in zip(parts, like, strict=True)]
    return torch.stack(there) if len(there) > 1 else there[0].contiguous()


def apart(stacked: Tensor | None, count: int, like: Tensor | None = None) -> list:
    """Undo `together`, in tensors of their own; empty ones, or None, where there is nothing."""
    if stacked is None:
        return [None if like is None else like.new_empty(0) for _ in range(count)]
    return [each.clone() for each in stacked] if count > 1 else [stacked][:count]


def addresses_of(tensors: Sequence[Tensor]) -> list[int]:
    """Return where the memory of tensors begins.

    Raises:
        NoMemoryError: one has none. Zeros that torch made without memory are such, and wrappers of torch.func that
            have outlived their transform.
    """
    try:
        addresses = [*map(Tensor.data_ptr, tensors)]
    except RuntimeError:  # what such a wrapper answers
        addresses = [0]
    if 0 in addresses:
        raise NoMemoryError("rnnfast: a tensor has no memory: its storage has size 0")
    return addresses
