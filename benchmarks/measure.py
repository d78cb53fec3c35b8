"""One case: draw it, check every contender against the oracle, time those that are right in turn, read their memory.

In a round each contender gives one sample: one run, or as many as fill a few milliseconds. The order turns around from
round to round. The ratio to the baseline is formed within each round and its median taken, which a slow drift of the
machine leaves alone. The baseline runs twice in every round: the ratio to itself is the noise.
"""

import ctypes
import math
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import Parameter

from benchmarks import oracle
from benchmarks.cases import Case
from benchmarks.contenders import BASELINE, Call, Contender
from benchmarks.workload import Workload, draw

TWIN = f"{BASELINE} again"
SAMPLE_SECONDS = 0.004
# Worker threads of a peer may still spin for a moment after its run; they must not spin into the next one's.
PAUSE_SECONDS = 0.002
FLUSH_BYTES = 256 << 20
STATUS, CLEAR_REFS = Path("/proc/self/status"), Path("/proc/self/clear_refs")


@dataclass(frozen=True)
class Settings:
    """seconds: for one contender on one case, in so many rounds at least and at most."""

    device: str = "cpu"
    seed: int = 0
    seconds: float = 0.5
    fewest: int = 3
    most: int = 40


# Told which contender works now, so that a crash has a name; the empty name is the suite itself.
Entering = Callable[[str], None]
Clock = Callable[[Call, int], float]


def run_case(case: Case, contenders: list[Contender], settings: Settings, entering: Entering) -> dict:
    """Return the case's record: the noise and one row per contender, with a status and, where `ok`, its numbers."""
    entering("")
    work = draw(case, settings.device, settings.seed)
    reference = oracle.expected(work)
    rows: dict[str, dict] = {}
    calls: dict[str, Call] = {}
    for contender in contenders:
        entering(contender.name)
        rows[contender.name], call = check(contender, work, reference)
        if call is not None:
            calls[contender.name] = call
    samples = time_all(calls, rows, settings, entering)
    for name, call in calls.items():
        entering(name)
        if case.mode == "training":
            found = {"saved": saved_bytes(call), "peak": peak_bytes(call, work.device)}
            rows[name] |= {key: value for key, value in found.items() if value is not None}
    strays = short(noise(samples[BASELINE], samples[TWIN])) if TWIN in samples else None
    return {"noise": strays, "rows": [{"contender": name, **row} for name, row in rows.items()]}


def check(contender: Contender, work: Workload, reference: dict[str, Tensor]) -> tuple[dict, Call | None]:
    """Hold a contender's results against the oracle's; return its row and, if it may be timed, its Call."""
    try:
        module = contender.load()
        reason = module.unsupported(work.case, **contender.options)
        if reason:
            return {"status": "skipped", "reason": reason}, None
        start = time.perf_counter()
        call = module.prepare(work, **contender.options)
        got = oracle.results(call)
        first = time.perf_counter() - start
    except Exception as error:
        return crashed(error), None
    found = oracle.errors(reference, got)
    wrong = oracle.verdict(found, work.case)
    if wrong:
        return {"status": "wrong", "reason": wrong}, None
    worst = max(found, key=found.__getitem__)
    row = {"status": "ok", "first_ms": short(first * 1e3), "error": short(found[worst]), "worst": worst}
    return row | ({"note": call.note} if call.note else {}), call


def crashed(error: Exception) -> dict:
    return {"status": "crashed", "reason": f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"}


def time_all(
    calls: dict[str, Call], rows: dict[str, dict], settings: Settings, entering: Entering
) -> dict[str, list[float]]:
    """Write times into the rows; a call that raises loses its place, and the rest start anew."""
    turn = ""

    def enter(name: str) -> None:
        nonlocal turn
        turn = BASELINE if name == TWIN else name
        entering(turn)

    clock = cpu_clock if settings.device == "cpu" else GpuClock()
    while calls:
        everyone = calls | ({TWIN: calls[BASELINE]} if BASELINE in calls else {})
        try:
            samples = alternate(everyone, clock, settings, enter)
        except Exception as error:
            rows[turn] = crashed(error)
            del calls[turn]
            continue
        for name in calls:
            rows[name] |= {"ms": [short(1e3 * s) for s in spread(samples[name])], "rounds": len(samples[name])}
            if BASELINE in samples and name != BASELINE:
                rows[name]["ratio"] = [short(r) for r in spread(ratios(samples[BASELINE], samples[name]))]
        return samples
    return {}


def alternate(calls: dict[str, Call], clock: Clock, settings: Settings, entering: Entering) -> dict[str, list[float]]:
    """Time every call in turn; return each one's seconds per run, round by round."""
    warm = {}
    for name, call in calls.items():
        entering(name)
        warm[name] = warm_up(call, clock)
    round_seconds = sum(seconds * (runs + 1) + PAUSE_SECONDS for seconds, runs in warm.values())
    wanted = math.ceil(settings.seconds * len(calls) / round_seconds)
    samples: dict[str, list[float]] = {name: [] for name in calls}
    for index in range(min(settings.most, max(settings.fewest, wanted))):
        for name in list(calls)[:: 1 if index % 2 == 0 else -1]:
            entering(name)
            runs = warm[name][1]
            with calls[name].context():
                if runs > 1:
                    time.sleep(PAUSE_SECONDS)
                    calls[name].run()
                samples[name].append(clock(calls[name], runs))
    return samples


def warm_up(call: Call, clock: Clock) -> tuple[float, int]:
    """Run until settled; return the seconds per run and the runs that make one sample."""
    with call.context():
        seconds = clock(call, 1)
        if seconds < 0.5:
            seconds = min(clock(call, 1), clock(call, 1))
        runs = max(1, round(SAMPLE_SECONDS / seconds))
        return (clock(call, runs) if runs > 1 else seconds), runs


def cpu_clock(call: Call, runs: int) -> float:
    """Seconds per run, of `runs` in a row."""
    start = time.perf_counter()
    for _ in range(runs):
        call.run()
    return (time.perf_counter() - start) / runs


class GpuClock:
    """Seconds per run between two device events, the L2 cache overwritten before each run."""

    def __init__(self) -> None:
        self.flush = torch.empty(FLUSH_BYTES, dtype=torch.int8, device="cuda")

    def __call__(self, call: Call, runs: int) -> float:
        events = []
        for _ in range(runs):
            start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            self.flush.zero_()
            start.record()
            call.run()
            stop.record()
            events.append((start, stop))
        torch.cuda.synchronize()
        return sum(start.elapsed_time(stop) for start, stop in events) / 1e3 / runs


def quantile(values: list[float], at: float) -> float:
    """The value below which the fraction `at` of the values lies, between neighbours by interpolation."""
    ordered = sorted(values)
    place = at * (len(ordered) - 1)
    low = int(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (place - low) * (ordered[high] - ordered[low])


def spread(values: list[float]) -> tuple[float, float, float]:
    """Median, 20th and 80th percentile."""
    return quantile(values, 0.5), quantile(values, 0.2), quantile(values, 0.8)


def ratios(baseline: list[float], samples: list[float]) -> list[float]:
    """How many times faster than the baseline, round by round."""
    return [base / own for base, own in zip(baseline, samples, strict=True)]


def noise(baseline: list[float], twin: list[float]) -> float:
    """How far the same contender strays from itself, relatively: its bias or half its spread, whichever is larger."""
    middle, low, high = (math.log(value) for value in spread(ratios(baseline, twin)))
    return math.expm1(max(abs(middle), (high - low) / 2))


def short(value: float) -> float:
    """Four significant digits: what the noise leaves, and small files."""
    return float(f"{value:.4g}")


def saved_bytes(call: Call) -> int | None:
    """Bytes of the distinct storages that autograd keeps for backward, without parameters; None where it keeps none."""
    storages: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if not isinstance(tensor, Parameter):
            storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    with call.context(), torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        call.run()
    return sum(storages.values()) or None


def peak_bytes(call: Call, device: str) -> int | None:
    """Most memory that one run holds above what was held before it; None where the system does not tell."""
    if device != "cpu":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        with call.context():
            call.run()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    if not CLEAR_REFS.exists():
        return None
    if sys.platform == "linux":
        # Memory that the C library keeps after a free would hide that the next run uses it.
        getattr(ctypes.CDLL(None), "malloc_trim", int)(0)
    CLEAR_REFS.write_text("5")
    before = resident("VmRSS")
    with call.context():
        call.run()
    return max(0, resident("VmHWM") - before)


def resident(field: str) -> int:
    """A field of this process's status, in bytes."""
    line = next(line for line in STATUS.read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) * 1024
