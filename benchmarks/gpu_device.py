"""The device of `benchmarks.gpu_stages`: a GPU, or one that is not there, whose kernels are compiled but never run.

$STANDS_IN is empty on a machine with a GPU. `tiny` goes through every stage, with sizes of no interest, to find
mistakes in them; `fill` compiles what the stages will want. Then Triton's own driver runs over a libcuda of the tests.
"""

import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from unittest.mock import patch

import torch

STANDS_IN = os.environ.get("STANDS_IN", "")
DEVICE = "cpu" if STANDS_IN else "cuda"


def synchronize() -> None:
    if DEVICE == "cuda":
        torch.cuda.synchronize()


def elapsed(run: Callable[[], object]) -> float:
    """The milliseconds that a run takes on the device."""
    if DEVICE == "cpu":
        start = time.perf_counter()
        run()
        return 1e3 * (time.perf_counter() - start)
    start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    run()
    stop.record()
    stop.synchronize()
    return start.elapsed_time(stop)


@contextmanager
def standing_in() -> Iterator[None]:
    """Run the Triton backend on CPU tensors by the plans of an H200 and with the kernels that it gets there.

    What kernels would write stays as it was allocated, and products between their steps, which the CPU has not, are
    left out.
    """
    sys.path.append(str(Path(__file__).parent.parent / "tests"))
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
