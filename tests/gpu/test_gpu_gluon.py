"""The Gluon loops as compiled for GPUs that are not there: right results by both exchanges, and no order too few.

The machine that runs them lets a relaxed load give any value that PTX's memory model allows (ptx/relaxed.py), so that
an exchange without one of its orders gives something wrong, or waits for ever.
"""

from dataclasses import replace
from functools import update_wrapper
from types import FunctionType

import pytest
import torch
from conftest import INTERPRETED
from gpu_layers import Case, check, make

if INTERPRETED or torch.cuda.is_available():
    pytest.skip("compiles for GPUs that are not there", allow_module_level=True)
pytest.importorskip("triton", minversion="3.6")

from compiled_kernels import compiled_for
from ptx.machine import Deadlock
from rnnfast_kernels.gpu import gluon_backward, gluon_exchange, gluon_forward, plan
from rnnfast_kernels.gpu.gluon_exchange import fence_text, publish_text, read_text
from rnnfast_kernels.gpu.vary import varied
from triton.experimental import gluon

from rnnfast.backends import gpu, gpu_products

CPU = torch.device("cpu")
COUNTER, POLLED = False, True


def by_gluon(polled, rows=16, units=8):
    """Gluon loops where there are such."""

    def choose(problem):
        if plan.can_gluon(problem):
            return plan.gluon(problem, rows, units, polled)
        return plan.streamed(problem)

    return choose


def small(cell, **changes):
    return Case(
        cell, **{"T": 4, "B": 3, "H": 33, "dtype": torch.bfloat16, "layout": "padded", "resets": True, **changes}
    )


@pytest.mark.parametrize(
    ("case", "polled", "target"),
    [
        (small("lstm", T=3, H=17, reverse=(True,)), POLLED, "sm_90"),
        (small("gru", T=3, H=17, layout="packed", dtype=torch.float16), COUNTER, "sm_80"),
        *(
            pytest.param(small(cell, dtype=dtype), polled, target, marks=pytest.mark.long)
            for cell in ("rnn_tanh", "rnn_relu", "lstm", "gru")
            for dtype in (torch.bfloat16, torch.float16)
            for polled, target in ((COUNTER, "sm_80"), (POLLED, "sm_80"), (COUNTER, "sm_90"), (POLLED, "sm_120"))
        ),
    ],
    ids=str,
)
def test_every_cell(case, polled, target):
    with plan.override(by_gluon(polled)), compiled_for(target):
        check(gpu, make(case, CPU))


@pytest.mark.parametrize(
    ("case", "rows", "units"),
    [
        # Pieces of 16 and of 32, weights of one in shared memory; two tiles of rows; two elements to a thread.
        pytest.param(small("lstm", T=2, H=300, reverse=(True,), layout="dense"), 16, 16, marks=pytest.mark.long),
        pytest.param(small("gru", T=2, B=18, reverse=(False,)), 16, 8, marks=pytest.mark.long),
        pytest.param(small("lstm", T=2, B=35, reverse=(False,)), 32, 32, marks=pytest.mark.long),
    ],
    ids=str,
)
@pytest.mark.parametrize("polled", [COUNTER, POLLED])
def test_tiles_and_pieces(case, rows, units, polled):
    some = by_gluon(polled, rows, units)
    with plan.override(lambda problem: replace(some(problem), kept=some(problem).chunks // 2)), compiled_for("sm_90"):
        check(gpu, make(case, CPU))


@pytest.mark.parametrize("polled", [COUNTER, pytest.param(POLLED, marks=pytest.mark.long)])
def test_tf32(polled, monkeypatch):
    monkeypatch.setattr(gpu_products, "tf32_wanted", lambda: True)
    monkeypatch.setattr("rnnfast.backends.gpu_launch.make_problem", in_tf32)
    with plan.override(by_gluon(polled)), compiled_for("sm_90"):
        check(gpu, make(small("lstm", T=2, H=17, dtype=torch.float32, reverse=(False,)), CPU), tolerance=1e-3)


def in_tf32(recurrence, like, backward):
    cell, extent = recurrence.cell.name, recurrence.extent
    device = plan.Device("sm_90", 132, 232448)
    return plan.Problem(cell, recurrence.H, extent.B, extent.D, "float32", "tf32", backward, device)


@pytest.mark.long
@pytest.mark.parametrize("seed", range(4))
def test_every_order_of_programs(seed):
    with plan.override(by_gluon(POLLED)), compiled_for("sm_90", seed):
        check(gpu, make(small("rnn_tanh", T=9, reverse=(False,)), CPU))


def with_globals(function, **changes):
    """The same function with others behind some names."""
    plain = FunctionType(function.fn.__code__, {**function.fn.__globals__, **changes})
    return gluon.jit(update_wrapper(plain, function.fn), do_not_specialize=function.do_not_specialize)


@gluon.constexpr_function
def without_fence(count):
    return fence_text(count).replace("fence.acq_rel.gpu;\n", "")


@gluon.constexpr_function
def without_poison(count, owners, every, polled):
    return "\n".join(
        line for line in publish_text(count, owners, every, polled).split("\n") if "0xffffffff" not in line
    )


@gluon.constexpr_function
def poison_of_the_next(count, owners, every, polled):
    """Behind the value, in its own place."""
    text = publish_text(count, owners, every, polled)
    for n in range(count):
        text = text.replace(f"[${3 * count + n}], 0x", f"[${2 * count + n}], 0x")
    return text


@gluon.constexpr_function
def without_loop(count, polled):
    return read_text(count, False)


BROKEN = {
    "no fence": ({"fence_text": without_fence}, AssertionError, "relative error"),
    "no poison": ({"publish_text": without_poison}, AssertionError, "relative error"),
    "poison behind the value": ({"publish_text": poison_of_the_next}, Deadlock, "wait forever"),
    "no loop": ({"read_text": without_loop}, AssertionError, "relative error"),
}


LOOPS = {"forward": (gluon_forward, "forward_loop"), "backward": (gluon_backward, "backward_loop")}


@pytest.mark.parametrize(
    ("broken", "loop"),
    [
        pytest.param(broken, loop, marks=() if (loop == "forward") == (broken != "no fence") else pytest.mark.long)
        for broken in BROKEN
        for loop in LOOPS
    ],
)
def test_a_broken_exchange_is_found(broken, loop, monkeypatch):
    """By at least one of a few orders."""
    (changes, error, message), (module, kernel) = BROKEN[broken], LOOPS[loop]
    functions = {
        name: with_globals(getattr(gluon_exchange, name), **changes)
        for name in ("publish", "read_piece", "finish_step")
    }
    monkeypatch.setattr(module, kernel, with_globals(getattr(module, kernel), **functions))
    layer = make(small("rnn_tanh", T=12, B=2, H=16, layout="dense", resets=False, reverse=(False,)), CPU)
    with plan.override(by_gluon(POLLED)), pytest.raises(error, match=message):
        check_in_orders(layer, range(8))


def check_in_orders(layer, seeds):
    for seed in seeds:
        with compiled_for("sm_90", seed):
            check(gpu, layer)


def test_the_loops_are_named(monkeypatch):
    """Those of an older Triton too."""
    asked = ("lstm", 512, 0, CPU, torch.bfloat16)
    with compiled_for("sm_90"):
        assert "forward in Gluon, backward in Gluon" in gpu.describe(*asked)
        plan.best.cache_clear()
        monkeypatch.setattr(plan, "TRITON", (3, 5))
        assert "forward cooperative, backward cooperative" in gpu.describe(*asked)
    plan.best.cache_clear()


def test_a_choice_of_triton_loops():
    asked = plan.Problem("lstm", 1024, 16, 1, "bfloat16", "ieee", False, plan.Device("sm_90", 132, 232448))
    chosen = plan.best(asked)
    assert (chosen.gluon, chosen.polled, chosen.block_b, chosen.block_n) == (True, False, 16, 8)
    assert varied(asked, {"polled": 1}) == plan.gluon(asked, 16, 8, True)
    assert varied(asked, {"units": 16}) == plan.gluon(asked, 16, 16)
    assert varied(asked, {"gluon": 0}) == plan.best(asked, False)
    assert varied(replace(asked, H=256, B=1), {"polled": 1}).polled
    assert not varied(asked, {"warps": 8}).gluon
    with pytest.raises(ValueError, match="no Gluon loop takes lstm with 1024 units in float32"):
        varied(replace(asked, dtype="float32"), {"polled": 1})
