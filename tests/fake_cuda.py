"""Triton's own driver for NVIDIA and its launcher over a libcuda that is ours (libcuda.c): an H200 that is not there.

CPU tensors stand for those of the device. A launch does nothing, or what a test says, which sees what it passes.
"""

import ctypes
import hashlib
import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

import triton
from compiled_kernels import flatten, parsed
from rnnfast_kernels.gpu import aot, launch
from torch import Tensor
from triton.compiler import CompiledKernel
from triton.runtime.cache import get_cache_manager

from rnnfast.backends import gpu_launch

SOURCE = Path(__file__).parent / "libcuda.c"
STREAM = 7
LISTENER = ctypes.CFUNCTYPE(
    ctypes.c_int, ctypes.c_ssize_t, ctypes.POINTER(ctypes.c_uint), ctypes.c_ssize_t, ctypes.POINTER(ctypes.c_void_p)
)
# How the launcher stores a value of a Triton type.
STORED = {"i1": ctypes.c_int32, "i32": ctypes.c_int32, "i64": ctypes.c_int64}


def compiler() -> str | None:
    """The C compiler that Triton would take for its launcher."""
    return os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")


@cache
def library() -> ctypes.CDLL:
    """Our libcuda, compiled once and kept where Triton keeps what it compiles; loaded first, it is the libcuda."""
    include = Path(triton.__file__).parent / "backends/nvidia/include"
    text = SOURCE.read_bytes()
    kept = get_cache_manager(hashlib.sha256(text + triton.__version__.encode()).hexdigest())
    path = kept.get_file("libcuda.so.1")
    if path is None:
        with tempfile.TemporaryDirectory() as folder:
            built = Path(folder) / "libcuda.so.1"
            flags = ("-shared", "-fPIC", "-O1", "-w", "-Wl,-soname,libcuda.so.1", f"-I{include}")
            subprocess.run([compiler(), *flags, SOURCE, "-o", built], check=True)
            path = kept.put(built.read_bytes(), "libcuda.so.1", binary=True)
    os.environ["TRITON_LIBCUDA_PATH"] = str(Path(path).parent)
    try:
        return ctypes.CDLL(path, mode=ctypes.RTLD_GLOBAL)
    finally:
        triton_driver()
        del os.environ["TRITON_LIBCUDA_PATH"]


@cache
def triton_driver() -> Any:
    from triton.backends.nvidia.driver import CudaDriver

    driver = CudaDriver()
    driver.get_current_device = lambda: 0
    driver.get_current_stream = lambda device: STREAM
    driver.get_device_capability = lambda device: (9, 0)
    return driver


class Launched(NamedTuple):
    """What a launch passed. values: of the kernel's arguments, by name, and behind them of its scratch buffers."""

    compiled: CompiledKernel
    grid: tuple[int, int, int]
    threads: int
    shared: int
    cooperative: bool
    stream: int
    values: dict[str, int]

    @property
    def name(self) -> str:
        return self.compiled.metadata.name


def types(signature: Any, name: str) -> Iterator[tuple[str, str]]:
    """The types of the arguments that a compiled kernel takes, in order, by name; parts of a tuple are numbered."""
    if isinstance(signature, tuple):
        for at, kind in enumerate(signature):
            yield from types(kind, f"{name}.{at}")
    elif signature != "constexpr":
        yield name, signature


def read(compiled: CompiledKernel, parameters: Any) -> dict[str, int]:
    """The values behind the parameters' addresses, as the types of the compiled kernel have them."""
    kinds = [pair for name, kind in compiled.src.signature.items() for pair in types(kind, name)]
    kinds += [(f"scratch{n}", "*i8") for n in range(len(parsed(compiled.asm["ptx"]).parameters) - len(kinds))]
    found = {}
    for at, (name, kind) in enumerate(kinds):
        stored = ctypes.c_uint64 if kind.startswith("*") else STORED[kind]
        found[name] = stored.from_address(parameters[at]).value
    return found


def asked(described: launch.Launch, compiled: CompiledKernel) -> list[int]:
    """The values that a launch has for the arguments that its compiled kernel takes, in order."""
    signature = compiled.src.signature
    entries = [
        flatten(kind, value, name) for (name, kind), value in zip(signature.items(), described.args, strict=True)
    ]
    values = (value for each in entries for _, value in each)
    return [value.data_ptr() if isinstance(value, Tensor) else int(value) for value in values]


@contextmanager
def fake_cuda(answer: Callable[[Launched], int | None] | None = lambda launched: None) -> Iterator[list[Launched]]:
    """Run the backend on CPU tensors as on an H200; `answer` is asked at every launch for an error of CUDA, or None.

    The list has every launch, but none where nobody is asked. An exception in `answer` is raised where the `with` ends.
    """
    functions: dict[int, CompiledKernel] = {}
    launches: list[Launched] = []
    raised: list[BaseException] = []
    prepare = CompiledKernel._init_handles

    def prepare_and_note(kernel):
        prepare(kernel)
        functions[kernel.function] = kernel

    @LISTENER
    def told(function, sizes, stream, parameters):
        try:
            compiled = functions[function]
            grid, (threads, shared, cooperative) = tuple(sizes[:3]), sizes[3:6]
            values = read(compiled, parameters)
            launches.append(Launched(compiled, grid, threads, shared, bool(cooperative), stream, values))
            return answer(launches[-1]) or 0
        except BaseException as error:
            raised.append(error)
            return 0

    library().stub_listen(LISTENER() if answer is None else told)
    try:
        with (
            patch.object(triton.runtime.driver, "_active", triton_driver()),
            patch.object(gpu_launch, "device_properties", lambda _: aot.TARGETS["sm_90"][1]),
            patch.object(CompiledKernel, "_init_handles", prepare_and_note),
        ):
            yield launches
    finally:
        library().stub_listen(LISTENER())
        if raised:
            raise raised[0]
