"""What the stages of `benchmarks.gpu.stages` measure and with what: the device, layers, runs, rows.

$STANDS_IN is empty on a machine with a GPU. `tiny` goes through every stage, with sizes of no interest, to find
mistakes in them; `fill` compiles what the stages will want. Then Triton's own driver runs over a libcuda of the tests.
"""

import faulthandler
import functools
import itertools
import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from unittest.mock import patch

import torch
import triton
from rnnfast_kernels.gpu import plan
from torch.utils._python_dispatch import TorchDispatchMode
from triton import knobs

import rnnfast
from benchmarks.gpu import cache
from benchmarks.gpu.processes import Progress
from benchmarks.machine import commit
from rnnfast.backends import gpu_launch, gpu_products

STANDS_IN = os.environ.get("STANDS_IN", "")
DEVICE = "cpu" if STANDS_IN else "cuda"
PINNED = cache.pin()
CELLS = {"lstm": ("LSTM", "lstm"), "gru": ("GRU", "gru"), "rnn": ("RNN", "rnn_tanh")}


@dataclass(frozen=True)
class Sizes:
    """What is measured, what matters most first."""

    hidden: tuple[int, ...] = (1024, 512, 256, 768, 128, 64)
    batch: tuple[int, ...] = (16, 64, 1)
    dtypes: tuple[str, ...] = ("bfloat16", "float16", "float32")
    T: int = 512
    lengths: tuple[int, ...] = (16, 64, 256, 1024, 4096, 8192)
    long: tuple[int, ...] = (1024, 256)
    planned: tuple[int, ...] = (1024, 512, 256, 128)
    slope: tuple[int, int] = (128, 640)
    probe: tuple[int, int] = (1000, 9000)
    members: int = 132


FULL = Sizes()
TINY = Sizes((32, 24), (2, 1), ("bfloat16", "float32"), 4, (3, 5), (32,), (32,), (2, 4), (2, 4), 16)
# Full sizes, but of three steps, where kernels are compiled for a device that is not there.
SIZES = {"": FULL, "fill": FULL, "tiny": TINY}[STANDS_IN]


# Seconds that a case may take, with what it compiles, and that the device may take to end what it was given.
CASE_SECONDS, DEVICE_SECONDS = 120, 15


def watch(seconds: float) -> None:
    """From now on, a process that still waits after so many seconds says where and ends."""
    if DEVICE == "cuda":
        faulthandler.dump_traceback_later(seconds, exit=True)


def synchronize() -> None:
    """Wait for the device; where it never ends, as behind a barrier that waits forever, the process ends."""
    if DEVICE == "cuda":
        watch(DEVICE_SECONDS)
        torch.cuda.synchronize()
        watch(CASE_SECONDS)


def leave_if_lost() -> None:
    """End the process where an error of the device stays: nothing runs in it any more, but in the next one."""
    try:
        synchronize()
    except Exception as trouble:
        raise SystemExit(f"TROUBLE the device runs nothing more for this process: {trouble}"[:300]) from None


def raise_clocks() -> None:
    """Keep the device busy for a moment: one that was idle runs slower at first."""
    if DEVICE == "cuda":
        a, until = torch.randn(4096, 4096, device=DEVICE), time.monotonic() + 0.5
        while time.monotonic() < until:
            torch.mm(a, a)
            torch.cuda.synchronize()


def elapsed(run: Callable[[], object], count: int = 1) -> list[float]:
    """The milliseconds that each of some runs takes on the device.

    One follows another as the steps of a training loop do: the host prepares the next meanwhile, so what a call takes
    on the host counts as far as it is longer.
    """
    if DEVICE == "cpu":
        times = [time.perf_counter()]
        for _ in range(count):
            run()
            times.append(time.perf_counter())
        return [1e3 * (stop - start) for start, stop in itertools.pairwise(times)]
    events = [torch.cuda.Event(enable_timing=True) for _ in range(count + 1)]
    events[0].record()
    for event in events[1:]:
        run()
        event.record()
    synchronize()
    return [start.elapsed_time(stop) for start, stop in itertools.pairwise(events)]


@contextmanager
def standing_in() -> Iterator[None]:
    """Run the Triton backend on CPU tensors by the plans of an H200 and with the kernels that it gets there.

    What kernels would write stays as it was allocated, and products between their steps, which the CPU has not, are
    left out.
    """
    sys.path.append(str(Path(__file__).parent.parent.parent / "tests"))
    from fake_cuda import fake_cuda

    from rnnfast.backends import gpu, gpu_launch, gpu_products

    describe = gpu_launch.make_problem

    def make_problem(recurrence, like, backward):
        tf32 = like.dtype == torch.float32 and gpu_products.tf32_wanted()
        return replace(describe(recurrence, like, backward), precision="tf32" if tf32 else "ieee")

    torch.set_num_threads(1)
    with (
        fake_cuda(None),
        patch.object(gpu, "unsupported", lambda *_: None),
        patch.object(gpu_launch, "make_problem", make_problem),
        patch.object(gpu_launch, "operand_dtype", lambda like: like.dtype),
        patch.object(gpu_launch, "multiply", lambda *_: None),
    ):
        yield


@functools.cache
def facts() -> dict:
    """What every row says of where it was measured."""
    real = DEVICE == "cuda"
    return {
        "device": torch.cuda.get_device_name() if real else "none",
        "processors": gpu_launch.device_properties(torch.device(DEVICE)).processors,
        "torch": torch.__version__,
        "triton": triton.__version__,
        "cuda": torch.version.cuda,
        "cudnn_version": torch.backends.cudnn.version(),
        "commit": commit(),
        "pinned": PINNED,
    }


def note(stage: str, **row) -> dict:
    """Keep a row."""
    with Path(os.environ["OUT"], "rows.jsonl").open("a") as file:
        file.write(json.dumps({"stage": stage, **row, **facts()}) + "\n")
    return row


progress = Progress()


def in_time(cases) -> Iterator:
    """The cases, as far as the time goes, without those that a process before this one has begun."""
    until = float(os.environ.get("UNTIL", "inf"))
    for case in cases:
        if time.monotonic() > until:
            print("the time is over", flush=True)
            return
        if progress.begin(case):
            watch(CASE_SECONDS)
            yield case


def milliseconds(run: Callable[[], object], seconds: float = 0.04, most: int = 20) -> float:
    """The median of as many runs as fit, behind one that keeps the device busy while the host prepares the next."""
    (first,) = elapsed(run)
    count = int(min(most, max(3, 1e3 * seconds / max(first, 1e-3))))
    return statistics.median(elapsed(run, 1 + count)[1:])


def problem(cell: str, H: int, B: int, dtype: str, backward: bool) -> plan.Problem:
    device = gpu_launch.device_properties(torch.device(DEVICE))
    precision = "tf32" if dtype == "float32" and gpu_products.tf32_wanted() else "ieee"
    return plan.Problem(CELLS[cell][1], H, B, 1, dtype, precision, backward, device)


def random(*shape: int, dtype: str) -> torch.Tensor:
    return torch.randn(shape, device=DEVICE).to(getattr(torch, dtype))


def pair(cell: str, H: int, dtype: str) -> tuple[torch.nn.Module, torch.nn.Module]:
    """torch's layer, as wide as its input, and ours with the same weights."""
    options = {"dtype": getattr(torch, dtype), "device": DEVICE}
    theirs, ours = (getattr(library, CELLS[cell][0])(H, H, **options) for library in (torch.nn, rnnfast))
    ours.load_state_dict(theirs.state_dict())
    return theirs, ours


def forward_of(module: torch.nn.Module, x: torch.Tensor) -> Callable[[], tuple]:
    """As for inference: cuDNN keeps what backward needs unless the module is told so, also without gradients."""
    module.eval()

    def run() -> tuple:
        with torch.no_grad():
            return (module(x)[0],)

    return run


def training_of(module: torch.nn.Module, x: torch.Tensor, dy: torch.Tensor) -> Callable[[], tuple]:
    module.train()
    x = x.clone().requires_grad_()

    def run() -> tuple:
        for tensor in (x, *module.parameters()):
            tensor.grad = None
        module(x)[0].backward(dy)
        return x.grad, module.weight_hh_l0.grad

    return run


def error(got: tuple, expected: tuple) -> float:
    """The largest relative difference of two runs' results, in L2 norm."""
    synchronize()

    def one(a: torch.Tensor, b: torch.Tensor) -> float:
        b = b.detach().double()
        a = a.detach().to(b.device).double()
        return (torch.linalg.vector_norm(a - b) / torch.linalg.vector_norm(b)).item()

    return max(map(one, got, expected))


class Watch(TorchDispatchMode):
    """Sees which operators run."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.add(function.name())
        return function(*args, **(kwargs or {}))


def cudnn_runs(run: Callable[[], object]) -> bool:
    with Watch() as watch:
        run()
    return "aten::_cudnn_rnn" in watch.names


def plans_of(cell: str, H: int, B: int, dtype: str) -> dict:
    """The plan of each pass, and the model's microseconds of a step by it."""
    found = {}
    for way, backward in (("forward", False), ("backward", True)):
        asked = problem(cell, H, B, dtype, backward)
        chosen = plan.choose(asked)
        found[f"plan_{way}"] = {**asdict(chosen), "predicted": plan.step_time(asked, chosen)}
    return found


def attempt(what: tuple, run: Callable[[], object]) -> None:
    try:
        run()
    except Exception as trouble:
        print("TROUBLE", *what, f"{type(trouble).__name__}: {trouble}"[:200], flush=True)
        leave_if_lost()


@contextmanager
def counted() -> Iterator[None]:
    """Say in the end how many kernels were found, and how many compiled, in how much time."""
    found: list[tuple[bool, float]] = []

    def listen(cache_hit: bool, times, **_) -> None:
        found.append((cache_hit, times.total / 1e6))

    before, knobs.compilation.listener = knobs.compilation.listener, listen
    try:
        yield
    finally:
        knobs.compilation.listener = before
        compiled = [seconds for hit, seconds in found if not hit]
        print(
            f"kernels: {len(found) - len(compiled)} found, {len(compiled)} compiled {sum(compiled):.1f} s", flush=True
        )
