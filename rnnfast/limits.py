"""The share of the machine's limit that a layer's call reaches, measured here and now: not on a busy machine."""

import time
from collections.abc import Callable, Iterable
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

# Rows and columns of the product whose rate is the limit; seconds that a measurement takes, and calls at most.
LARGE, SECONDS, MOST = 1024, 0.2, 100


def measured(
    call: Callable[[], Any], input: Any, weights: Iterable[Any], lengths: Tensor | None
) -> tuple[float, float]:
    """Return a call's time in milliseconds without gradients, and the least that the machine needs over it.

    That is the time of the call's products at the rate of a large one, or that of a copy of as many bytes as its
    weights, input and results have, whichever is more. weights: tensors, or what has their shapes and dtype.
    """
    x: Tensor = input.data if isinstance(input, PackedSequence) else input
    weights = list(weights)
    with torch.no_grad():
        results = call()
        seconds = fastest(call, x.device)
        rows = x.shape[:-1].numel() if lengths is None else int(lengths.sum())
        matrices = sum(each.shape.numel() for each in weights if len(each.shape) == 2)
        moved = sum(each.shape.numel() * each.dtype.itemsize for each in (*weights, x, *tensors(results)))
        threads = torch.get_num_threads()
        product = 2 * rows * matrices / product_rate(x.device, weights[0].dtype, threads)
        copied = moved / copy_rate(x.device, 1 << max(moved - 1, 1).bit_length(), threads)
    return 1e3 * seconds, max(product, copied) / seconds


def tensors(results: Any) -> Iterable[Tensor]:
    """Return the tensors among results."""
    if isinstance(results, Tensor):
        yield results
    elif isinstance(results, (tuple, list)):
        for each in results:
            yield from tensors(each)


def fastest(call: Callable[[], Any], device: torch.device) -> float:
    """Return the seconds of the fastest of several calls."""
    found: list[float] = []
    end = time.perf_counter() + SECONDS
    while len(found) < 10 or (len(found) < MOST and time.perf_counter() < end):
        synchronize(device)
        start = time.perf_counter()
        call()
        synchronize(device)
        found.append(time.perf_counter() - start)
    return min(found)


def synchronize(device: torch.device) -> None:
    """Wait for what runs on a GPU."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@lru_cache(maxsize=64)
def product_rate(device: torch.device, dtype: torch.dtype, threads: int) -> float:
    """Return the operations a second of a large product."""
    a = torch.ones(LARGE, LARGE, dtype=dtype, device=device)
    out = torch.empty_like(a)
    return 2 * LARGE**3 / fastest(lambda: torch.mm(a, a, out=out), device)


@lru_cache(maxsize=64)
def copy_rate(device: torch.device, size: int, threads: int) -> float:
    """Return the bytes a second that a copy reads and writes, of `size` in all."""
    # Half of the bytes are read and half written. torch copies few elements, however wide, on one thread.
    a = torch.ones(max(size // 16, 1), dtype=torch.float64, device=device)
    out = torch.empty_like(a)
    return 2 * a.nbytes / fastest(lambda: out.copy_(a), device)
