"""Kernels as machine code: kept on disk, loaded without Numba.

Compiling takes seconds and needs Numba; loading takes milliseconds and needs LLVM alone. A file holds one cell's
kernels for one dtype and one processor. Its name is a hash of all that its code depends on, and it begins with a hash
of its content. Files appear whole, under their final name, or not at all, so that any number of processes may write at
once. Where no folder can be written, every process compiles for itself, with one warning.
"""

import ctypes
import functools
import hashlib
import logging
import os
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import llvmlite
from llvmlite import binding

from rnnfast_kernels.cells import CELLS
from rnnfast_kernels.cpu.job import JOB, RUN, SHARE, START
from rnnfast_kernels.cpu.target import Target, processor, target
from rnnfast_kernels.equations.cell import Cell
from rnnfast_kernels.warn import warn_user

log = logging.getLogger("rnnfast")
lock = threading.RLock()
if hasattr(os, "register_at_fork"):  # not on Windows, where nothing forks
    # A fork waits for what another thread compiles or loads: the child could not unlock this, nor Numba's and LLVM's.
    os.register_at_fork(before=lock.acquire, after_in_parent=lock.release, after_in_child=lock.release)
engines: list[binding.ExecutionEngine] = []

DIGEST_BYTES = 32


class Kernel(NamedTuple):
    """A cell's entry points for a dtype (see `schedule`). They take an address and release the interpreter's lock."""

    start: Callable[[int], None]
    run: Callable[[int], None]
    share: Callable[[int], None]


kernels: dict[tuple[str, str, int, str], Kernel] = {}


def kernel(cell_name: str, dtype: str, derivatives: int = 1, weights: str = "") -> Kernel:
    """The machine code of a cell and a dtype: of a layer and its gradients, or, with 2, of its second derivatives.

    With 0, of the forward pass alone, over panels of the format `weights`.
    """
    wanted = cell_name, dtype, derivatives, weights
    found = kernels.get(wanted)
    if found is not None:
        return found
    with lock:
        if wanted not in kernels:
            name = file_name(*wanted)
            code = read(name)
            if code is None:
                log.info("compiling %s, for this machine and once", name)
                start = time.perf_counter()
                code = compile_code(CELLS[cell_name], target(dtype, weights), derivatives)
                log.info("compiled %s in %.1f s", name, time.perf_counter() - start)
                if sources_on_disk() != sources():
                    raise RuntimeError("the sources of the kernels have changed on disk; start Python again")
                write(name, code)
            kernels[wanted] = load(code)
        return kernels[wanted]


def file_name(cell_name: str, dtype: str, derivatives: int, weights: str = "") -> str:
    """The name of the file that keeps a kernel."""
    order = "" if derivatives == 1 else f"-{weights or derivatives}"
    return f"{cell_name}-{dtype}{order}-{key(CELLS[cell_name], target(dtype, weights), derivatives)}.bin"


def is_kept(cell_name: str, dtype: str, derivatives: int = 1, weights: str = "") -> bool:
    """Whether machine code is loaded or kept on disk, so that nothing has to be compiled."""
    wanted = cell_name, dtype, derivatives, weights
    return wanted in kernels or read(file_name(*wanted)) is not None


def key(cell: Cell, chosen: Target, derivatives: int) -> str:
    """A hash of the sources, the cell's derived functions, the compiler and the processor.

    Of the compiler only the version of llvmlite, since kept kernels are found where Numba is not installed, too. Numba
    releases that share an llvmlite share kernels.
    """
    everything = f"{sources()}\0{cell.sources(derivatives)}\0{chosen}\0{processor()}\0{llvmlite.__version__}"
    return hashlib.sha256(everything.encode()).hexdigest()[:24]


@functools.cache
def sources() -> str:
    """The sources that this process has loaded, whatever has been installed in their place since then."""
    return sources_on_disk()


def sources_on_disk() -> str:
    """What machine code depends on beside the cell."""
    cpu = Path(__file__).parent.parent
    files = {*cpu.glob("*.py"), *cpu.glob("ir/*.py"), *cpu.glob("loops/*.py"), cpu.parent / "bind.py"}
    files |= {cpu / "runtime" / name for name in ("build.py", "compiled.py", "schedule.py")}
    return "".join(path.read_text(encoding="utf-8") for path in sorted(files))


def folders() -> Iterator[Path]:
    """Where kernels may be kept: NUMBA_CACHE_DIR if it is set, else beside the sources, else the user's cache."""
    chosen = os.environ.get("NUMBA_CACHE_DIR")
    if chosen:
        yield Path(chosen) / "rnnfast"
        return
    yield Path(__file__).parent / "__pycache__"
    caches = os.environ.get("XDG_CACHE_HOME")
    try:
        yield (Path(caches) if caches else Path.home() / ".cache") / "rnnfast"
    except RuntimeError:
        return  # a user without a home directory


def read(name: str) -> bytes | None:
    """Return the machine code of a file that is there and whole."""
    return next(filter(None, (content_of(folder / name) for folder in folders())), None)


def content_of(path: Path) -> bytes | None:
    """Return the machine code of a file, None if it is not there, not to be read, or damaged."""
    try:
        if not path.is_file():  # to open a FIFO waits for who writes to it, and a device may never end
            return None
        content = path.read_bytes()
    except OSError:
        return None
    code = content[DIGEST_BYTES:]
    return code if hashlib.sha256(code).digest() == content[:DIGEST_BYTES] else None


def write(name: str, code: bytes) -> None:
    """Keep machine code in the first folder that takes it."""
    reasons = []
    for folder in folders():
        reason = write_whole(folder / name, hashlib.sha256(code).digest() + code)
        if reason is None:
            return
        reasons.append(reason)
    warn_uncached("; ".join(reasons))


@functools.cache
def warn_uncached(reason: str) -> None:
    warn_user(
        f"rnnfast cannot keep compiled kernels on disk, so every process compiles them again ({reason}); "
        "set NUMBA_CACHE_DIR to a folder that can be written"
    )


def write_whole(path: Path, content: bytes) -> str | None:
    """Write a file at once; return why that failed, or None."""
    temporary = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=path.name)
        with open(descriptor, "wb") as file:
            file.write(content)
        # Closed before it is moved: Windows moves no file that is open.
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
        temporary = None
    except OSError as error:
        # Windows replaces no file that another process reads, and such a file is whole.
        return None if content_of(path) else f"{path.parent}: {error.strerror or error}"
    finally:
        if temporary is not None:
            with suppress(OSError):
                os.unlink(temporary)
    return None


@functools.cache
def prepare_llvm() -> None:
    binding.initialize_native_target()
    binding.initialize_native_asmprinter()


def target_machine() -> binding.TargetMachine:
    """A code generator for `processor()`."""
    prepare_llvm()
    host = processor()
    reloc = "static" if host.triple.startswith("x86") else "default"
    return binding.Target.from_triple(host.triple).create_target_machine(
        cpu=host.name, features=host.features, opt=3, reloc=reloc, codemodel="jitdefault", jit=True
    )


def compile_code(cell: Cell, chosen: Target, derivatives: int) -> bytes:
    """Compile a cell's kernels to an object file, whose entry points are `START`, `RUN` and `SHARE`."""
    from rnnfast_kernels.cpu.runtime.build import llvm_ir

    (main, *others), entry = llvm_ir(cell, chosen, derivatives)
    module = binding.parse_assembly(main.replace(f"@{entry}(", f"@{JOB}("))
    for other in others:
        module.link_in(binding.parse_assembly(other))
    return target_machine().emit_object(module)


def load(code: bytes) -> Kernel:
    """Place an object file in memory, for as long as the process lives, and return its entry points."""
    engine = binding.create_mcjit_compiler(binding.parse_assembly(""), target_machine())
    engine.add_object_file(binding.ObjectFileRef.from_data(code))
    engine.finalize_object()
    engines.append(engine)

    kind = ctypes.CFUNCTYPE(None, ctypes.c_int64)
    return Kernel(*(kind(engine.get_function_address(name)) for name in (START, RUN, SHARE)))
