"""What runs, and why: `explain` for a call of a layer or a model, `environment` for a machine."""

import importlib.metadata
import os
import platform
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any, overload

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from rnnfast.backends.dispatch import BACKENDS, load, setting, unsupported
from rnnfast.cell_modules import RNNCellBase
from rnnfast.explanations import Explanation, ModelExplanation, explain_layer, explain_model, is_ours, with_limit
from rnnfast.frozen import Frozen
from rnnfast.modules import RNNBase
from rnnfast.recurrent import Recurrent


@overload
def explain(
    module: RNNBase | RNNCellBase | Recurrent | Frozen, input: Tensor | PackedSequence, *,
    lengths: Tensor | None = None, resets: Tensor | None = None, all_states: bool = False, measure: bool = False,
) -> Explanation: ...  # fmt: skip
@overload
def explain(module: nn.Module, input: Any, *, measure: bool = False) -> ModelExplanation: ...


def explain(
    module: nn.Module,
    input: Any,
    *,
    lengths: Tensor | None = None,
    resets: Tensor | None = None,
    all_states: bool = False,
    measure: bool = False,
) -> Explanation | ModelExplanation:
    """Say which backend and kernel would run `module(input, ...)` here and now, and why.

    Of a layer or a cell nothing is run. A model is called once, in its present mode; its buffers and torch's random
    state are put back; with frozen layers, without gradients. The setting of `torch.no_grad` matters, as where torch
    was measured faster in training alone. A kernel that was not compiled yet is taken to compile: where that fails,
    the call runs on torch and warns, and `explain` says so from then on.

    Args:
        module: a layer or cell of rnnfast, or a frozen layer; or any model that has recurrent layers.
        input: what it would be called with. Of a layer's input only sizes, dtype and device are read. For a model, a
            tuple holds its arguments, and a dict those by name.
        lengths, resets, all_states: as given to the call of a layer. torch's operators have neither of the last two,
            and calls with lengths were not measured against them.
        measure: whether to time each layer's call as well, without gradients, and say what share of the machine's
            limit it reaches; on a busy machine that means little. Takes about a second for each layer. Default False.

    Returns:
        An `Explanation`; for a model a tuple of one `LayerExplanation` for each layer and cell that `survey` lists, of
        its first call. Both print as lines.

    Raises:
        TypeError: `module` is no module of rnnfast, and has no recurrent layer.
        RuntimeError: the backend asked for by name cannot run the case.
    """
    if is_ours(module):
        if not isinstance(input, (Tensor, PackedSequence)):
            raise TypeError(f"explain: expected a tensor or a PackedSequence, got {type(input).__name__}")
        explanation = explain_layer(module, input, lengths, resets, all_states)
        asked = {"lengths": lengths, "resets": resets, "all_states": all_states or None}
        keywords = {name: value for name, value in asked.items() if value is not None}
        return with_limit(module, explanation, (input,), keywords) if measure else explanation
    if not isinstance(module, nn.Module):
        raise TypeError(f"explain: expected a torch.nn.Module, got {type(module).__name__}")
    if lengths is not None or resets is not None or all_states:
        raise TypeError("explain: lengths, resets and all_states go with a layer of rnnfast, not with a model")
    if isinstance(input, dict):
        found = explain_model(module, (), input, measure)
    else:
        alone = not isinstance(input, tuple) or isinstance(input, PackedSequence)
        found = explain_model(module, (input,) if alone else input, {}, measure)
    if not found:
        raise TypeError(
            f"explain: expected an rnnfast RNN, LSTM, GRU or a cell of them, got {type(module).__name__}, "
            "which has no recurrent layer"
        )
    return found


def environment() -> str:
    """Describe versions, devices, backends and cache folders, one fact a line."""
    facts = {
        "rnnfast": f"{sys.modules['rnnfast'].__version__} in {Path(__file__).parent}",
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
        sizes = sizes_in(folder)
        there = next((each for each in (folder, *folder.parents) if os.path.exists(each)), folder)
        writable = "writable" if os.path.isdir(there) and os.access(there, os.W_OK) else "not writable"
        told.append(f"{folder} ({len(sizes)} kernels, {sum(sizes) / 1e6:.1f} MB, {writable})")
    return ", then ".join(told)


def sizes_in(folder: Path) -> list[int]:
    """Return the sizes of the kernels in a folder, none where it cannot be read."""
    found = []
    with suppress(OSError), os.scandir(folder) as entries:
        for entry in entries:
            with suppress(FileNotFoundError):  # deleted in the meantime
                found += [entry.stat().st_size] if entry.name.endswith(".bin") else []
    return found


def cpu_kernels() -> str:
    """Name the processor's vectors and the threads that share a call."""
    try:
        return load("numba").machine()
    except Exception as error:  # whatever a library raises that cannot be loaded
        return f"not available ({type(error).__name__}: {error})"
