"""The stages of `benchmarks.gpu` that run layers: each ends by itself in time, and keeps what it has after every row.

    python3 -m benchmarks.gpu.stages STAGE [N/ALL [PROGRESS]]

smoke   every cell, loop and dtype beside torch.nn in float64 on the CPU
probe   what the exchange between programs costs at least
warm    compile and load what the later stages run
grid    beside torch.nn: cells, dtypes, H, B, forward and training
sweep   beside torch.nn: T
plans   other plans than the model's: prediction beside measurement

Rows go to $OUT/rows.jsonl, each with the device, the versions, the plan and its prediction, and whether cuDNN ran.
$UNTIL is the time, of the machine's monotonic clock, at which the stage ends by itself. A process that the device has
failed, or that waits for it forever, ends; the next one goes on behind that case, by the file PROGRESS.
"""

import faulthandler
import itertools
import json
import os
import sys
import time
import warnings
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path

import torch
from rnnfast_kernels.gpu import plan, vary

import rnnfast
from benchmarks.gpu.layers import (
    CELLS,
    DEVICE,
    SIZES,
    STANDS_IN,
    attempt,
    counted,
    cudnn_runs,
    elapsed,
    error,
    forward_of,
    in_time,
    leave_if_lost,
    milliseconds,
    note,
    pair,
    plans_of,
    problem,
    progress,
    raise_clocks,
    random,
    standing_in,
    synchronize,
    training_of,
)
from benchmarks.gpu.probe import MEMBERS
from benchmarks.gpu.probe import probe as probe_exchange


def compare(stage: str, cell: str, H: int, B: int, T: int, dtype: str) -> None:
    """A row: ours beside torch.nn, forward and training."""
    row: dict = {"cell": cell, "H": H, "B": B, "T": T, "dtype": dtype}
    try:
        row |= plans_of(cell, H, B, dtype)
        theirs, ours = pair(cell, H, dtype)
        x, dy = random(T, B, H, dtype=dtype), random(T, B, H, dtype=dtype)
        row["cudnn"] = cudnn_runs(forward_of(theirs, x))
        for way, make in (("forward", lambda m: forward_of(m, x)), ("training", lambda m: training_of(m, x, dy))):
            mine, peer = make(ours), make(theirs)
            found = error(mine(), peer())
            row[way] = {"error": found, "ours": milliseconds(mine), "torch": milliseconds(peer)}
            row[way]["again"] = milliseconds(mine)
        row["us"] = 1e3 * row["forward"]["ours"] / T
    except Exception as trouble:
        row["trouble"] = f"{type(trouble).__name__}: {trouble}"[:300]
    say(note(stage, **row))
    if "trouble" in row:
        leave_if_lost()


def say(row: dict) -> None:
    what = f"{row['cell']:5} H={row['H']:<5} B={row['B']:<3} T={row['T']:<5} {row['dtype']:9}"
    if "trouble" in row:
        print("TROUBLE", what, row["trouble"], flush=True)
        return
    ratios = " ".join(f"{row[way]['torch'] / row[way]['ours']:5.2f}" for way in ("forward", "training"))
    errors = " ".join(f"{row[way]['error']:.0e}" for way in ("forward", "training"))
    chosen, peer = row["plan_forward"], "" if row["cudnn"] else " NO CUDNN"
    step = f"{row['us']:7.2f} us/step, model {chosen['predicted']:5.2f}"
    print(f"{what} {chosen['loop']:12} {step}; torch/ours {ratios}; differ {errors}{peer}", flush=True)


def of_share(cases, share: tuple[int, int]) -> list:
    n, parts = share
    return list(cases)[n::parts]


def polled(asked: plan.Problem) -> plan.Plan:
    """A Gluon loop whose programs poll values, where there is one."""
    return vary.varied(asked, {"polled": 1}) if plan.can_gluon(asked) else plan.best(asked)


LIMITS = {"float32": 1e-4, "float16": 2e-2, "bfloat16": 6e-2}
LOOPS = {
    "resident": (24, 3, lambda problem: plan.resident(problem, 16, 4)),
    "of the plan": (256, 3, plan.best),
    "largest": (1024, 16, plan.best),
    "polled": (256, 3, polled),
    "without Gluon": (256, 3, lambda problem: plan.best(problem, False)),
    "streamed": (40, 3, plan.streamed),
}


def smoke(share: tuple[int, int]) -> int:
    """Is anything wrong at all?"""
    torch.backends.cudnn.allow_tf32, wrong = False, 0
    for cell, loop, dtype in in_time(of_share(itertools.product(CELLS, LOOPS, LIMITS), share)):
        H, B, chooser = LOOPS[loop]
        H = min(H, max(SIZES.hidden))
        row: dict = {"cell": cell, "loop": loop, "H": H, "B": B, "dtype": dtype}
        torch.manual_seed(1)
        exact = getattr(torch.nn, CELLS[cell][0])(H, H, dtype=torch.float64)
        exact.load_state_dict({name: t.to(getattr(torch, dtype)).double() for name, t in exact.state_dict().items()})
        ours = getattr(rnnfast, CELLS[cell][0])(H, H, dtype=getattr(torch, dtype), device=DEVICE)
        ours.load_state_dict(exact.state_dict())
        x, dy = (torch.randn(5, B, H).to(getattr(torch, dtype)) for _ in range(2))
        try:
            with plan.override(chooser):
                row |= plans_of(cell, H, B, dtype)
                mine, coming = x.to(DEVICE), dy.to(DEVICE)
                got = (*forward_of(ours, mine)(), *training_of(ours, mine, coming)())
            wanted = (*forward_of(exact, x.double())(), *training_of(exact, x.double(), dy.double())())
            row["error"] = error(got, wanted)
            # Of kernels that never run nothing is right.
            row["ok"] = row["error"] < LIMITS[dtype] or bool(STANDS_IN)
        except Exception as trouble:
            row |= {"ok": False, "trouble": f"{type(trouble).__name__}: {trouble}"[:300]}
        note("smoke", **row)
        if not row["ok"]:
            wrong += 1
            print("WRONG", cell, loop, dtype, row.get("trouble", row.get("error")), flush=True)
        if "trouble" in row:
            leave_if_lost()
    print(f"smoke: {wrong} wrong", flush=True)
    return wrong


def probe(share: tuple[int, int]) -> None:
    for members in in_time(n for n in MEMBERS if n <= SIZES.members):
        row = probe_exchange(DEVICE, elapsed, SIZES.probe, members)
        note("probe", **row)
        print("us a step:", {name: round(value, 3) for name, value in row.items()}, flush=True)


def layers() -> Iterator[tuple[str, int, int, str]]:
    for B, H, dtype, cell in itertools.product(SIZES.batch, SIZES.hidden, SIZES.dtypes, CELLS):
        yield cell, H, B, dtype


def warm(share: tuple[int, int]) -> None:
    """Three steps of every layer and plan."""
    for cell, H, B, dtype in in_time(of_share(layers(), share)):
        ours = getattr(rnnfast, CELLS[cell][0])(H, H, dtype=getattr(torch, dtype), device=DEVICE)
        x, dy = random(3, B, H, dtype=dtype), random(3, B, H, dtype=dtype)
        for run in (forward_of(ours, x), training_of(ours, x, dy)):
            attempt((cell, H, B, dtype), run)
    for H, B, choice, chosen in in_time(of_share(varied(), share)):
        ours = rnnfast.LSTM(H, H, dtype=torch.bfloat16, device=DEVICE)
        with plan.override(lambda asked, chosen=chosen: plan.best(asked) if asked.backward else chosen):
            attempt((H, B, choice), forward_of(ours, random(3, B, H, dtype="bfloat16")))
    synchronize()


def measured(stage: str) -> set[tuple]:
    """The cases that an earlier call has measured."""
    path = os.environ.get("DONE")
    rows = [json.loads(line) for line in Path(path).read_text().splitlines()] if path else []
    return {tuple(row[name] for name in CASE) for row in rows if row["stage"] == stage and "trouble" not in row}


CASE = ("cell", "H", "B", "T", "dtype")


def grid(share: tuple[int, int]) -> None:
    done = measured("grid")
    for cell, H, B, dtype in in_time(layers()):
        if (cell, H, B, SIZES.T, dtype) not in done:
            compare("grid", cell, H, B, SIZES.T, dtype)


def sweep(share: tuple[int, int]) -> None:
    done = measured("sweep")
    for H, T, cell in in_time(itertools.product(SIZES.long, SIZES.lengths, CELLS)):
        if (cell, H, SIZES.batch[0], T, "bfloat16") not in done:
            compare("sweep", cell, H, SIZES.batch[0], T, "bfloat16")


CHOICES: tuple[dict, ...] = (
    {},
    *({"units": n} for n in (8, 16, 32)),
    {"polled": 1},
    {"gluon": 0},
    *({"warps": n} for n in (4, 8)),
    {"loop": "resident"},
    {"loop": "streamed"},
)


def varied() -> list[tuple[int, int, dict, plan.Plan]]:
    """The best plan of some layers and its variations, each once."""
    found: dict[tuple, dict] = {}
    for H, B, choice in itertools.product(SIZES.planned, SIZES.batch[:2], CHOICES):
        asked = problem("lstm", H, B, "bfloat16", False)
        try:
            own = {name: value for name, value in choice.items() if name != "loop"}
            chosen = vary.varied(asked, own, choice.get("loop"))
        except ValueError:
            continue
        found.setdefault((H, B, chosen), choice)
    return [(H, B, choice, chosen) for (H, B, chosen), choice in found.items()]


def plans(share: tuple[int, int]) -> None:
    """Microseconds of a step, from two lengths, so that what a call costs beside its steps drops out."""
    for H, B, choice, chosen in in_time(varied()):
        predicted = plan.step_time(problem("lstm", H, B, "bfloat16", False), chosen)
        row: dict = {"H": H, "B": B, "choice": choice, "plan": asdict(chosen), "predicted": predicted}
        try:
            ours = rnnfast.LSTM(H, H, dtype=torch.bfloat16, device=DEVICE)
            with plan.override(lambda asked, chosen=chosen: plan.best(asked) if asked.backward else chosen):
                runs = [forward_of(ours, random(T, B, H, dtype="bfloat16")) for T in SIZES.slope]
                short, long = map(milliseconds, runs)
            row["us"] = 1e3 * (long - short) / (SIZES.slope[1] - SIZES.slope[0])
            said = f"measured {row['us']:.2f}"
        except Exception as trouble:
            row["trouble"] = said = f"{type(trouble).__name__}: {trouble}"[:200]
        note("plans", **row)
        print(f"plan H={H} B={B} {choice} model {predicted:.2f} {said}", flush=True)
        if "trouble" in row:
            leave_if_lost()


STAGES = {function.__name__: function for function in (smoke, probe, warm, grid, sweep, plans)}


def main(words: list[str]) -> int:
    faulthandler.enable()
    n, parts = map(int, words[1].split("/")) if len(words) > 1 else (0, 1)
    if len(words) > 2:
        progress.follow(Path(words[2]))
    torch.manual_seed(0)
    start = time.monotonic()
    with standing_in() if STANDS_IN else nullcontext(), rnnfast.use_backend("triton"), counted():
        # A layer would run step by step, and be timed as what it is not.
        warnings.filterwarnings("error", message="the device refused")
        if parts == 1:
            raise_clocks()
        wrong = STAGES[words[0]]((n, parts))
    progress.end()
    print(f"{words[0]}: {time.monotonic() - start:.1f} s", flush=True)
    faulthandler.cancel_dump_traceback_later()
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
