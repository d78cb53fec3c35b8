"""Kernels as they are compiled for a GPU, run without one: right results, nothing out of bounds, no race, no deadlock.

What the interpreter cannot see is what the compiler adds: layouts, copies through shared memory with the barriers they
need, vector accesses that want alignment, instructions of our own. All of test_gpu_numerics.py runs like this with
`pytest tests/gpu/test_gpu_numerics.py --compiled-for sm_90`; here is a part of it, groups of programs as large as on
the device, and the proof that the machine finds what is wrong.
"""

from dataclasses import replace
from functools import update_wrapper
from types import FunctionType

import pytest
import torch
from conftest import INTERPRETED
from gpu_layers import Case, check, make, run
from ptx.banks import turns
from ptx.machine import Deadlock
from ptx.memory import Fault, Region

if INTERPRETED or torch.cuda.is_available():
    pytest.skip("compiles for GPUs that are not there", allow_module_level=True)
pytest.importorskip("triton", minversion="3.5")

import triton
import triton.language as tl
from compiled_kernels import compiled_for
from gpu_plans import ALONE, TOGETHER
from rnnfast_kernels.gpu import launch, plan
from rnnfast_kernels.gpu.barrier import wait

from rnnfast.backends import gpu, gpu_launch, gpu_products
from rnnfast.backends.gpu_launch import make_problem

CPU = torch.device("cpu")
TARGETS = pytest.mark.parametrize("target", ["sm_80", "sm_90", "sm_120"])


def named(*cases):
    return pytest.mark.parametrize("case", cases, ids=str)


@pytest.fixture(autouse=True)
def strict(monkeypatch):
    """Float32 products as exact as they come."""
    monkeypatch.setattr(gpu_products, "tf32_wanted", lambda: False)


@named(
    Case("rnn_tanh", T=3, B=3, H=130, dtype=torch.bfloat16, layout="padded", resets=True),
    Case("rnn_relu", T=2, B=18, H=33, layout="packed"),
    Case("lstm", T=3, B=3, H=130, dtype=torch.float16, reverse=(True,)),
    Case("gru", T=3, B=3, H=65, layout="packed", resets=True, reverse=(False,)),
)
@TARGETS
def test_by_the_plan_of_the_device(case, target):
    with compiled_for(target):
        check(gpu, make(case, CPU))


# What several programs do, and what a program does that has a group to itself.
LOOPS = {
    **{name: ("gru", TOGETHER[name]) for name in ("split", "grid")},
    **{name: ("lstm", TOGETHER[name]) for name in ("wide", "grid of two lines")},
    **{name: ("lstm", ALONE[name]) for name in ("resident", "streamed")},
}


@pytest.mark.parametrize(("cell", "loop"), LOOPS.values(), ids=LOOPS)
def test_every_loop(cell, loop):
    layer = make(Case(cell, T=3, B=3, H=33, dtype=torch.bfloat16, layout="padded", resets=True), CPU)
    with plan.override(loop), compiled_for("sm_90"):
        check(gpu, layer)


def test_streamed_steps_read_before_they_write():
    """Of a tile with fewer elements than threads several threads have each, and gates are overwritten."""
    with plan.override(plan.streamed), compiled_for("sm_90"):
        check(gpu, make(Case("lstm", T=2, B=1, H=5, reverse=(False,)), CPU))


def tf32(*args):
    return replace(make_problem(*args), precision="tf32")


@named(Case("lstm", T=2, B=3, H=33, reverse=(False,)))
@TARGETS
def test_tf32(case, target, monkeypatch):
    """Operands have 11 bits."""
    monkeypatch.setattr(gpu_launch, "make_problem", tf32)
    with compiled_for(target):
        check(gpu, make(case, CPU), tolerance=1e-3)
        with pytest.raises(AssertionError, match="relative error"):
            check(gpu, make(case, CPU))


@named(Case("lstm", T=3, B=2, H=33, dtype=torch.bfloat16, reverse=(False,)))
def test_every_order_gives_the_same(case):
    layer = make(case, CPU)
    results = []
    for seed in range(3):
        with plan.override(TOGETHER["wide"]), compiled_for("sm_90", seed):
            results.append(run(gpu, layer))
    assert all(torch.equal(results[0][name], other[name]) for other in results[1:] for name in other)


@named(
    Case("lstm", T=2, B=16, H=128, dtype=torch.bfloat16, reverse=(False,)),
    Case("rnn_tanh", T=2, B=16, H=128, reverse=(False,)),
)
def test_threads_meet_in_no_bank(case, monkeypatch):
    """Each product reads all of its operands from shared memory, in every step."""
    counts = []

    def watch(region, *access):
        if region.name == "shared memory":
            counts.append(turns(*access))

    monkeypatch.setattr(Region, "watch", watch)
    with compiled_for("sm_90"):
        run(gpu, make(case, CPU))
    taken, least = map(sum, zip(*counts, strict=True))
    assert taken < 1.3 * least


def with_globals(kernel, **changes):
    """The same kernel with other functions behind some names."""
    function = FunctionType(kernel.fn.__code__, {**kernel.fn.__globals__, **changes})
    return triton.jit(update_wrapper(function, kernel.fn), do_not_specialize=kernel.do_not_specialize)


SEM, SCOPE = tl.constexpr("relaxed"), tl.constexpr("gpu")


@triton.jit
def arrive_in_order(p_counter):
    tl.debug_barrier()
    tl.atomic_add(p_counter, 1, sem=SEM, scope=SCOPE)


@triton.jit
def wait_in_order(p_counter, arrivals):
    while tl.atomic_add(p_counter, 0, sem=SEM, scope=SCOPE) < arrivals:
        pass
    tl.debug_barrier()


@triton.jit
def wait_for_fewer(p_counter, arrivals):
    wait(p_counter, arrivals - 1)


@triton.jit
def wait_for_more(p_counter, arrivals):
    wait(p_counter, arrivals + 1)


RACE = r"data race at byte \d+ of p.exchange: a (load|store) by block \d, thread \d+ is not ordered behind a "
HERE = {"SCOPE": tl.constexpr("cta")}
BROKEN = {
    "relaxed arrivals": ({"arrive": arrive_in_order}, Fault, RACE),
    "relaxed waits": ({"wait": wait_in_order}, Fault, RACE),
    "arrivals for one processor": (
        {"arrive": with_globals(arrive_in_order, **HERE, SEM=tl.constexpr("release"))},
        Fault,
        RACE,
    ),
    "waits for one processor": (
        {"wait": with_globals(wait_in_order, **HERE, SEM=tl.constexpr("acquire"))},
        Fault,
        RACE,
    ),
    "one arrival too few": ({"wait": wait_for_fewer}, Fault, RACE),
    "one arrival too many": ({"wait": wait_for_more}, Deadlock, "3 wait forever"),
}


@pytest.mark.parametrize("kernel", ["forward_loop", "backward_loop"])
@pytest.mark.parametrize(("changes", "error", "message"), BROKEN.values(), ids=BROKEN)
def test_a_broken_barrier_is_found(changes, error, message, kernel, monkeypatch):
    layer = make(Case("rnn_tanh", T=4, B=2, H=33, reverse=(False,)), CPU)
    monkeypatch.setattr(launch, kernel, with_globals(getattr(launch, kernel), **changes))
    with plan.override(TOGETHER["wide"]), compiled_for("sm_90"), pytest.raises(error, match=message):
        run(gpu, layer)


@triton.jit
def turn_round(p, result, SIZE: tl.constexpr, BARRIER: tl.constexpr):
    """Through memory, so that every thread reads what another one has written."""
    n = tl.arange(0, SIZE)
    tl.store(p + n, n)
    if BARRIER:
        tl.debug_barrier()
    tl.store(result + n, tl.load(p + SIZE - 1 - n))


@triton.jit
def increment(p, SIZE: tl.constexpr, BARRIER: tl.constexpr):
    """In place; of few numbers each is with several threads."""
    n = tl.arange(0, SIZE)
    value = tl.load(p + n) + 1
    if BARRIER:
        tl.debug_barrier()
    tl.store(p + n, value)


@triton.jit
def copy(p, result, start, SIZE: tl.constexpr):
    n = tl.arange(0, SIZE)
    tl.store(result + n, tl.load(p + start + n))


def zeros(size):
    return torch.zeros(size, dtype=torch.int32)


@TARGETS
def test_threads_need_a_barrier(target):
    with compiled_for(target):
        result, counts = zeros(256), zeros(8)
        turn_round[(1,)](zeros(256), result, 256, True)
        assert torch.equal(result, torch.arange(255, -1, -1, dtype=torch.int32))
        increment[(1,)](counts, 8, True)
        assert torch.equal(counts, torch.ones_like(counts))
        with pytest.raises(Fault, match=r"^test_gpu_compiled.py:\d+: data race at byte \d+ of p: a load by block 0"):
            turn_round[(1,)](zeros(256), result, 256, False)
        with pytest.raises(Fault, match="data race at byte 0 of p: a store by block 0, thread 0 is not ordered behind"):
            increment[(1,)](counts, 8, False)


@TARGETS
def test_accesses_stay_within_tensors(target):
    source, result = torch.arange(300, dtype=torch.int32), zeros(256)
    with compiled_for(target):
        copy[(1,)](source, result, 32, 256)
        assert torch.equal(result, source[32:288])
