"""Kernels compiled for a GPU that is not there, and run on CPU tensors wherever they are launched."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from random import Random
from unittest.mock import patch

import triton
from ptx.code import parse
from ptx.machine import Machine
from rnnfast_kernels.gpu import aot
from torch import Tensor
from triton.compiler import CompiledKernel
from triton.runtime.jit import JITFunction

from rnnfast.backends import gpu_launch

parsed = cache(parse)


def flatten(signature, value, name: str) -> Iterator[tuple[str, object]]:
    """The arguments that a compiled kernel takes, by name: those that are no constants, in order."""
    if isinstance(signature, tuple):
        fields = getattr(value, "_fields", range(len(signature)))
        for field, kind, part in zip(fields, signature, value, strict=True):
            yield from flatten(kind, part, f"{name}.{field}")
    elif signature != "constexpr":
        yield name, value


def run_compiled(compiled: CompiledKernel, grid: tuple[int, ...], args: tuple, random: Random) -> None:
    """Run a compiled kernel on CPU tensors."""
    signature = compiled.src.signature
    assert len(args) == len(signature), "arguments by name"
    found = [flatten(kind, value, name) for (name, kind), value in zip(signature.items(), args, strict=True)]
    arguments = {name: value for entries in found for name, value in entries}
    memory = {
        name: (value.data_ptr(), value.numel() * value.element_size(), value.element_size())
        for name, value in arguments.items()
        if isinstance(value, Tensor)
    }
    values = [value.data_ptr() if isinstance(value, Tensor) else int(value) for value in arguments.values()]
    code, metadata = parsed(compiled.asm["ptx"]), compiled.metadata
    # Behind the arguments come the addresses of scratch buffers, which these kernels do not use.
    values += [0] * (len(code.parameters) - len(values))
    Machine(code, grid, 32 * metadata.num_warps, metadata.shared, values, memory).run(random)


@contextmanager
def compiled_for(target: str, seed: int = 0) -> Iterator[None]:
    """Make launches on CPU tensors compile for a target of `aot` and run there, in an order that the seed decides."""
    gpu, device = aot.TARGETS[target]
    random, compile_or_run = Random(seed), JITFunction.run

    def run(kernel: JITFunction, *args, grid, warmup, **options):
        compiled = compile_or_run(kernel, *args, grid=grid, warmup=True, **options)
        if warmup:
            return compiled
        run_compiled(compiled.result() if hasattr(compiled, "result") else compiled, grid, args, random)

    with (
        patch.object(triton.runtime.driver, "_active", aot.Driver(gpu)),
        patch.object(gpu_launch, "device_properties", lambda _: device),
        patch.object(JITFunction, "run", run),
        # What launches of the backend ask for, and the default.
        patch.dict("os.environ", TRITON_DEFAULT_FP_FUSION="1"),
    ):
        yield
