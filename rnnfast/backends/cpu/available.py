"""Whether the Numba backend can run a case, what keeps it from that, and what it runs on."""

import functools
from importlib.util import find_spec

import torch
from rnnfast_kernels.cells import CELLS
from rnnfast_kernels.cpu.runtime import pool
from rnnfast_kernels.cpu.target import has_float16, processor, target

from rnnfast.spec import cell_named, shown

DTYPE_NAMES = {
    torch.float32: "float32",
    torch.float64: "float64",
    torch.bfloat16: "bfloat16",
    torch.float16: "float16",
}
# The dtype of sums and of what kernels keep for themselves, where it is not that of the layer.
WIDER = {torch.bfloat16: torch.float32, torch.float16: torch.float32}
# Values of that many gates are in registers at once, and code grows with them.
MOST_GATES = 24


def unsupported(cell: str, device: torch.device, dtype: torch.dtype) -> str | None:
    """Say why this backend cannot run the case, or None where it can."""
    if cell not in CELLS:
        return f"the numba backend has no kernel for the cell {shown(cell)}"
    if device.type != "cpu":
        return f"the numba backend runs on the CPU, not on {device.type}"
    if dtype not in DTYPE_NAMES:
        return f"the numba backend computes float32, float64, bfloat16 and float16, not {dtype}"
    if dtype == torch.float16 and not has_float16():
        return "the processor cannot convert float16"
    gates = cell_named(cell).gates
    if gates == 0:
        return "the numba backend has no kernels for cells without gates"
    if gates > MOST_GATES:
        return f"the numba backend has no kernels for cells of more than {MOST_GATES} gates, got {gates}"
    if cell_named(cell).sets_numbers:
        return "the numba backend has no kernels for cells with a state that is a number"
    return broken(cell, dtype)


failures: dict[tuple[str, torch.dtype, int], str] = {}
obtained: set[tuple[str, torch.dtype, int]] = set()


def broken(cell: str, dtype: torch.dtype) -> str | None:
    """Say what keeps this installation from running kernels, as far as is known without compiling one."""
    if cell not in CELLS or dtype not in DTYPE_NAMES:
        return None
    known = failures.get((cell, dtype, 1))
    if known is not None or (cell, dtype, 1) in obtained:
        return known
    return obstacle(cell, dtype)


@functools.cache
def obstacle(cell: str, dtype: torch.dtype) -> str | None:
    """Say why there can be no machine code, or None where it is kept or can be compiled."""
    try:
        from rnnfast_kernels.cpu.runtime.compiled import is_kept, lock

        if is_kept(cell, DTYPE_NAMES[dtype]):
            return None
    except OSError as error:
        return f"the sources of the kernels cannot be read ({error})"
    except Exception as error:
        return f"kept kernels cannot be looked up ({error_text(error)})"
    try:
        if find_spec("numba") is None:
            return "numba is not installed"
        with lock:  # a child that was forked in the midst of this import would wait for its end
            from numba import config
    except Exception as error:
        return f"numba cannot be imported ({error_text(error)})"
    return "NUMBA_DISABLE_JIT is set, and no kernels are kept on disk" if config.DISABLE_JIT else None  # type: ignore[attr-defined]


def obtain(cell: str, dtype: torch.dtype, derivatives: int = 1) -> str | None:
    """Load or compile the kernels of a cell and a dtype, once; say why that failed, or None.

    derivatives: 2 for those of second derivatives.
    """
    if derivatives == 2:
        if len(cell_named(cell).states) > 2:
            return "there are no kernels for second derivatives of cells of more than two states"
        dtype = WIDER.get(dtype, dtype)
    wanted = cell, dtype, derivatives
    if wanted in obtained:
        return None
    if wanted not in failures:
        from rnnfast_kernels.cpu.runtime.compiled import kernel

        try:
            kernel(cell, DTYPE_NAMES[dtype], derivatives)
        except Exception as error:
            failures[wanted] = f"the kernel cannot be compiled or loaded ({error_text(error)})"
        else:
            obtained.add(wanted)
    return failures.get(wanted)


def error_text(error: Exception) -> str:
    """Name an exception and the first line of its message."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


def describe(cell: str, hidden: int, projection: int, device: torch.device, dtype: torch.dtype) -> str:
    """Name the kernel that runs a layer of this size, for `rnnfast.explain`."""
    chosen = target(DTYPE_NAMES[dtype])
    products = " with products of bfloat16" if chosen.terms == 2 else ""
    code = "" if has_numba() else ", kept machine code without numba"
    lanes = f"{chosen.lanes} lanes on {processor().name}"
    return f"whole-layer {shown(cell)} kernel in {chosen.dtype}{products}, {lanes}, {team_name()}{code}"


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
