"""What a training call keeps and needs: bytes saved for backward, and peak memory above what stood there before."""

import ctypes
import sys
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import Parameter

from benchmarks.contenders import Call

STATUS = Path("/proc/self/status")
CLEAR_REFS = Path("/proc/self/clear_refs")


def saved_bytes(call: Call) -> int | None:
    """Bytes of the distinct storages that autograd keeps from forward to backward, parameters left out.

    None where nothing passes through torch's autograd.
    """
    storages: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if not isinstance(tensor, Parameter):
            storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    with call.context(), torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        call.run()
    return sum(storages.values()) or None


def peak_bytes(call: Call, device: str) -> int | None:
    """Most memory one run holds above what was held before it; None where the system does not tell."""
    if device != "cpu":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        with call.context():
            call.run()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    if not CLEAR_REFS.exists():
        return None
    give_back_free_memory()
    CLEAR_REFS.write_text("5")
    before = resident("VmRSS")
    with call.context():
        call.run()
    return max(0, resident("VmHWM") - before)


def resident(field: str) -> int:
    """A field of this process's status, in bytes."""
    line = next(line for line in STATUS.read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) * 1024


def give_back_free_memory() -> None:
    """Have the C library return what it keeps after a free, which would hide the next run's use of it."""
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        if trim is not None:
            trim(0)
