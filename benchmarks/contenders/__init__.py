"""Who takes part: the table of contenders. Each is one small module, loaded only where it runs.

A contender's module has two functions and says, in its first lines, how it is called and why that is its best setting:

    unsupported(case, **options)  -> why it cannot run the case, or None
    prepare(work, **options)      -> a Call over the workload's weights and inputs
"""

import importlib
import importlib.util
import os
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

BASELINE = "torch"
OURS = "rnnfast"
BACKENDS = ("auto", "triton", "numba", "reference", "torch")


@dataclass(frozen=True)
class Contender:
    """A row of the table.

    packages: import names without which it is skipped. follows_processor: whether RNNFAST_CPU limits its instructions.
    """

    name: str
    module: str
    packages: tuple[str, ...] = ()
    devices: tuple[str, ...] = ("cpu", "cuda")
    options: dict[str, str] = field(default_factory=dict)
    follows_processor: bool = True

    def missing(self, device: str) -> str | None:
        """Say why it cannot take part on this machine, or None."""
        if device not in self.devices:
            return f"runs on {' and '.join(self.devices)} only"
        if not self.follows_processor and os.environ.get("RNNFAST_CPU"):
            return "cannot be held to a processor's instructions"
        absent = [package for package in self.packages if importlib.util.find_spec(package) is None]
        return f"not installed: {', '.join(absent)}" if absent else None

    def load(self) -> ModuleType:
        return importlib.import_module(self.module)


@dataclass(frozen=True)
class Call:
    """A contender ready to run one case.

    run: what is timed. read: turns what `run` returned into float64 CPU tensors by name, as the oracle's.
    context: entered around many runs, outside the time taken. note: how the contender chose to run the case.
    """

    run: Callable[[], Any]
    read: Callable[[Any], dict]
    context: Callable[[], AbstractContextManager] = nullcontext
    note: str = ""


PEERS = {
    contender.name: contender
    for contender in (
        Contender("torch", "benchmarks.contenders.torch_nn"),
        Contender("torch-compile", "benchmarks.contenders.torch_loop"),
        Contender(
            "onnxruntime",
            "benchmarks.contenders.onnx_runtime",
            ("onnx", "onnxruntime"),
            ("cpu",),
            follows_processor=False,
        ),
        Contender("jax", "benchmarks.contenders.jax_scan", ("jax",), ("cpu",)),
        Contender("numpy", "benchmarks.contenders.numpy_loop", (), ("cpu",)),
        Contender("torch-int8", "benchmarks.contenders.torch_int8", (), ("cpu",)),
    )
}


def by_backend(backend: str) -> Contender:
    """This library by backend; `auto` goes under the library's plain name."""
    name = OURS if backend == "auto" else f"{OURS}:{backend}"
    return Contender(name, "benchmarks.contenders.ours", ("rnnfast",), options={"backend": backend})


def by_plan(plan: str) -> Contender:
    """The Triton backend by a plan, see `benchmarks.contenders.ours`; under the plan's own text."""
    options = {"backend": "triton", "plan": plan}
    return Contender(f"{OURS}:{plan}", "benchmarks.contenders.ours", ("rnnfast", "triton"), options=options)
