"""The Numba backend: allocates tensors and scratch, cuts the work into jobs, and runs kernels over raw addresses.

What the kernels compute is in `rnnfast_kernels.cpu`. `saved` is, in this order, what of it there is:

    gates  [*L, D, kept * H]    what the cell wants back, gate by gate (LSTM and GRU), in float32 at least
    unprojected [*L, D, H]           the cell's output before its projection (with `proj_size`)
"""

import functools
from importlib.util import find_spec

import torch
from rnnfast_kernels.cells import CELLS
from rnnfast_kernels.cpu import pool
from rnnfast_kernels.cpu.target import has_float16, processor, target
from torch import Tensor

from rnnfast.backends import Changes, Gradients, Layer, Needs, Pushed, Result
from rnnfast.backends.cpu_jobs import DTYPE_NAMES, WIDER, run_backward, run_forward
from rnnfast.backends.cpu_layer import PreparedLayer
from rnnfast.backends.cpu_second import run_bend, run_push
from rnnfast.backends.cpu_stack import Sizes, Stack

__all__ = [
    "PreparedLayer",
    "Sizes",
    "Stack",
    "backward",
    "bend",
    "broken",
    "describe",
    "forward",
    "obtain",
    "push",
    "saved_like",
    "unsupported",
    "warmup",
]

TAKES_ENSEMBLES = True


def unsupported(cell: str, device: torch.device, dtype: torch.dtype) -> str | None:
    """Say why this backend cannot run the case, or None where it can."""
    if cell not in CELLS:
        return f"the numba backend has no kernel for the cell {cell}"
    if device.type == "cpu" and len(CELLS[cell].states) > 2:
        return f"the numba backend has no kernels for cells of more than two states, such as {cell}"
    return unsupported_case(device, dtype) or broken(cell, dtype)


def unsupported_case(device: torch.device, dtype: torch.dtype) -> str | None:
    """Say why this backend cannot run any cell on a device and in a dtype, or None where it can."""
    if device.type != "cpu":
        return f"the numba backend runs on the CPU, not on {device.type}"
    if dtype not in DTYPE_NAMES:
        return f"the numba backend computes float32, float64, bfloat16 and float16, not {dtype}"
    if dtype == torch.float16 and not has_float16():
        return "the processor cannot convert float16"
    return None


failures: dict[tuple[str, torch.dtype, int], str] = {}
obtained: set[tuple[str, torch.dtype, int]] = set()


def broken(cell: str, dtype: torch.dtype) -> str | None:
    """Say what keeps this installation from running kernels, as far as is known without compiling one."""
    known = failures.get((cell, dtype, 1))
    if known is not None or (cell, dtype, 1) in obtained:
        return known
    return obstacle(cell, dtype)


@functools.cache
def obstacle(cell: str, dtype: torch.dtype) -> str | None:
    """Say why there can be no machine code, or None where it is kept or can be compiled."""
    try:
        from rnnfast_kernels.cpu.compiled import is_kept

        if is_kept(cell, DTYPE_NAMES[dtype]):
            return None
    except OSError as error:
        return f"the sources of the kernels cannot be read ({error})"
    except Exception as error:
        return f"kept kernels cannot be looked up ({described(error)})"
    if find_spec("numba") is None:
        return "numba is not installed"
    try:
        from numba import config
    except Exception as error:
        return f"numba cannot be imported ({described(error)})"
    return "NUMBA_DISABLE_JIT is set, and no kernels are kept on disk" if config.DISABLE_JIT else None  # type: ignore[attr-defined]


def obtain(cell: str, dtype: torch.dtype, derivatives: int = 1) -> str | None:
    """Load or compile the kernels of a cell and a dtype, once; say why that failed, or None.

    derivatives: 2 for those of second derivatives.
    """
    if derivatives == 2:
        dtype = WIDER.get(dtype, dtype)
    wanted = cell, dtype, derivatives
    if wanted in obtained:
        return None
    if wanted not in failures:
        from rnnfast_kernels.cpu.compiled import kernel

        try:
            kernel(cell, DTYPE_NAMES[dtype], derivatives)
        except Exception as error:
            failures[wanted] = f"the kernel cannot be compiled or loaded ({described(error)})"
        else:
            obtained.add(wanted)
    return failures.get(wanted)


def described(error: Exception) -> str:
    """Name an exception and the first line of its message."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


def forward(layer: Layer, *, save: bool, all_states: bool) -> Result:
    """Run the layer. `save` asks for everything that `backward` needs, `all_states` for every entry of `states`."""
    return run_forward(layer, save=save, keep_extra=save or all_states)


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
    return run_backward(layer, states, saved, dstates, dfinals, needs, groups)


def push(layer: Layer, states: tuple[Tensor, ...], saved: tuple[Tensor, ...], changes: Changes) -> Pushed:
    """Return what changes of a layer's tensors do to its states."""
    return run_push(layer, states, saved, changes)


def bend(
    layer: Layer,
    states: tuple[Tensor, ...],
    saved: tuple[Tensor, ...],
    dstates: tuple[Tensor | None, ...],
    dfinals: tuple[Tensor | None, ...],
    changes: Changes,
    needs: Needs,
) -> tuple[Gradients, Pushed]:
    """Return what changes of a layer's tensors do to the results of `backward`, and to the states."""
    return run_bend(layer, states, saved, dstates, dfinals, changes, needs)


def describe(cell: str, hidden: int, projection: int, device: torch.device, dtype: torch.dtype) -> str:
    """Name the kernel that runs a layer of this size, for `rnnfast.explain`."""
    chosen = target(DTYPE_NAMES[dtype])
    products = " with products of bfloat16" if chosen.terms == 2 else ""
    code = "" if has_numba() else ", kept machine code without numba"
    lanes = f"{chosen.lanes} lanes on {processor().name}"
    return f"whole-layer {cell} kernel in {chosen.dtype}{products}, {lanes}, {team_name()}{code}"


@functools.cache
def has_numba() -> bool:
    """Say whether Numba can be imported, by importing it."""
    try:
        import numba  # noqa: F401
    except Exception:  # whatever it raises that does not like what else is installed
        return False
    return True


def machine() -> str:
    """Name the vectors and the threads of this machine, for `python -m rnnfast`."""
    chosen = target("float32")
    return f"vectors of {8 * chosen.vector} bits on {processor().name}, {team_name()}"


def team_name() -> str:
    """Name the threads that share a call."""
    if torch.get_num_threads() == 1:
        return "one thread"
    return "OpenMP threads of torch" if pool.team().start else "Python threads"


def saved_like(layer: Layer) -> tuple[tuple[tuple[int, ...], torch.dtype], ...]:
    """Shape and dtype of each tensor that `forward(layer, save=True)` puts into `saved`."""
    cell = CELLS[layer.cell]
    lead = (*layer.x.shape[:-1], len(layer.reverse))
    hidden = layer.weights[0].w_hh.shape[0] // cell.gates
    dtype = layer.x.dtype
    shapes: list[tuple[tuple[int, ...], torch.dtype]] = []
    if cell.saved:
        shapes.append(((*lead, cell.kept * hidden), WIDER.get(dtype, dtype)))
    if layer.weights[0].w_hr is not None:
        shapes.append(((*lead, hidden), dtype))
    return tuple(shapes)


def warmup(cell: str, dtype: torch.dtype) -> None:
    """Compile the kernels of a cell and a dtype, or load them from the disk cache."""
    from rnnfast_kernels.cpu.compiled import kernel

    kernel(cell, DTYPE_NAMES[dtype])
