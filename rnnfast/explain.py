"""What runs, and why: `explain` for one call, `environment` for a machine."""

import importlib.metadata
import os
import platform
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from rnnfast.backends import measured
from rnnfast.backends.dispatch import BACKENDS, Choice, choose, choose_step, load, setting, unsupported
from rnnfast.cell_modules import Cell
from rnnfast.frozen import Frozen
from rnnfast.functional import Call
from rnnfast.modules import Recurrent
from rnnfast.recurrent import Recurrent as OfDeclaredCell


@dataclass(frozen=True)
class Explanation:
    """Who runs a call. backend: its name. kernel: what it launches. reason: why this backend. Prints as one line."""

    backend: str
    kernel: str
    reason: str

    def __str__(self) -> str:
        return f"{self.backend}: {self.kernel} ({self.reason})"


def explain(
    module: Recurrent | Cell | OfDeclaredCell | Frozen,
    input: Tensor | PackedSequence,
    *,
    resets: Tensor | None = None,
    all_states: bool = False,
) -> Explanation:
    """Say which backend and kernel would run `module(input, ...)` here and now, and why. Runs nothing.

    Raises:
        TypeError: `module` is not one of rnnfast's.
        RuntimeError: the backend asked for by name cannot run the case.
    """
    data = input.data if isinstance(input, PackedSequence) else input
    if isinstance(module, Cell):
        cell, projection = module.equations, 0
        choice = choose_step(cell, data.device, data.dtype)
    elif isinstance(module, Frozen):
        return explain_frozen(module, data, resets is not None or all_states)
    elif isinstance(module, OfDeclaredCell):
        cell, projection = module.cell.identity, 0
        choice = choose(cell, data.device, data.dtype, resets is not None or all_states)
    elif isinstance(module, Recurrent):
        cell, projection = module.options().cell, module.proj_size
        needs_ours = resets is not None or all_states
        sizes = None if needs_ours or data is not input else sizes_of(module, input)
        choice = choose(cell, data.device, data.dtype, needs_ours, sizes)
    else:
        raise TypeError(f"explain: expected an rnnfast RNN, LSTM, GRU or a cell of them, got {type(module).__name__}")
    return Explanation(choice.backend, kernel_of(choice, cell, module.hidden_size, projection, data), choice.reason)


def sizes_of(module: Recurrent, input: Tensor) -> measured.Sizes | None:
    """Return the sizes of a call without initial states."""
    x = input if input.dim() == 3 else input[:, None]
    if module.batch_first and input.dim() == 3:
        x = x.transpose(0, 1)
    return measured.sizes_of_call(Call(module.options(), x, (), module.weights()))


def explain_frozen(module: Frozen, data: Tensor, needs_ours: bool) -> Explanation:
    """Explain a call of a frozen layer."""
    cell, reason = module.options().cell, module.reason_for_plain(data)
    if reason is None:
        kernel = f"{cell} loop over packed {module.weights_format} weights"
        return Explanation("numba", kernel, f"weights are frozen in {module.weights_format}")
    choice = choose(cell, data.device, torch.float32, needs_ours)
    kernel = kernel_of(choice, cell, module.hidden_size, module.proj_size, data)
    return Explanation(choice.backend, kernel, f"weights are made float32 again: {reason}")


def kernel_of(choice: Choice, cell: str, hidden: int, projection: int, data: Tensor) -> str:
    """Name what a backend launches."""
    if choice.backend == "torch":
        return f"torch.{cell}"
    if choice.backend == "reference":
        return f"plain loop over {cell}"
    return load(choice.backend).describe(cell, hidden, projection, data.device, data.dtype)


def environment() -> str:
    """Describe versions, devices, backends and cache folders, one fact a line."""
    facts = {
        "rnnfast": package_version("rnnfast"),
        "python": f"{platform.python_version()} on {platform.platform()}",
        **{name: package_version(name) for name in ("torch", "numba", "triton", "numpy")},
        "threads": str(torch.get_num_threads()),
        "cpu kernels": cpu_kernels(),
        "devices": ", ".join(["cpu", *(torch.cuda.get_device_name(n) for n in range(torch.cuda.device_count()))]),
        "backend asked for": setting(),
        **{f"backend {name}": availability(name) for name in BACKENDS if name != "auto"},
        **{f"cache of {name}": folder for name, folder in cache_folders().items()},
    }
    width = max(map(len, facts))
    return "\n".join(f"{name:<{width}}  {fact}" for name, fact in facts.items())


def package_version(name: str) -> str:
    """Return an installed package's version without importing it."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def availability(name: str) -> str:
    """Say whether a backend can run a float32 LSTM on the devices of this machine."""
    devices = [torch.device("cpu")] + [torch.device("cuda")] * torch.cuda.is_available()
    problems = {d.type: unsupported(name, "lstm", d, torch.float32, False) for d in devices}
    return "; ".join(f"{device}: {problem or 'available'}" for device, problem in problems.items())


def cache_folders() -> dict[str, str]:
    """Say where compiled kernels are kept from one process to the next."""
    triton = os.environ.get("TRITON_CACHE_DIR") or os.path.join(os.path.expanduser("~"), ".triton", "cache")
    return {"numba": numba_cache(), "triton": triton}


def numba_cache() -> str:
    """Say which folders may keep kernels, how many they hold, and whether more can be written."""
    try:
        from rnnfast_kernels.cpu.runtime.compiled import folders
    except Exception as error:  # whatever a library raises that cannot be loaded
        return f"not available ({type(error).__name__}: {error})"
    told = []
    for folder in folders():
        sizes = [path.stat().st_size for path in folder.glob("*.bin")]
        there = next((each for each in (folder, *folder.parents) if each.exists()), folder)
        writable = "writable" if there.is_dir() and os.access(there, os.W_OK) else "not writable"
        told.append(f"{folder} ({len(sizes)} kernels, {sum(sizes) / 1e6:.1f} MB, {writable})")
    return ", then ".join(told)


def cpu_kernels() -> str:
    """Name the processor's vectors and the threads that share a call."""
    try:
        return load("numba").machine()
    except Exception as error:  # whatever a library raises that cannot be loaded
        return f"not available ({type(error).__name__}: {error})"
