"""Run one case: draw it, check every contender against the oracle, time those that are right, measure their memory."""

import time
from collections.abc import Callable
from dataclasses import dataclass, field

from torch import Tensor

from benchmarks import measure, memory, oracle
from benchmarks.cases import Case
from benchmarks.contenders import BASELINE, Call, Contender
from benchmarks.workload import Workload, draw

TWIN = f"{BASELINE} again"


@dataclass(frozen=True)
class Settings:
    device: str = "cpu"
    seed: int = 0
    effort: measure.Effort = field(default_factory=measure.Effort)


Entering = Callable[[str], None]


def run_case(case: Case, contenders: list[Contender], settings: Settings, entering: Entering) -> dict:
    """Return the case's record: the noise and one row per contender, with a status and, where `ok`, its numbers.

    entering: told which contender works now; the empty name is the suite itself.
    """
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
            rows[name] |= measure_memory(call, work)
    return {"noise": noise(samples), "rows": [{"contender": name, **row} for name, row in rows.items()]}


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
    wrong = oracle.verdict(found, work.case.dtype)
    if wrong:
        return {"status": "wrong", "reason": wrong}, None
    worst = max(found, key=found.__getitem__)
    row = {"status": "ok", "first_ms": short(first * 1e3), "error": short(found[worst]), "worst": worst}
    return row | ({"note": call.note} if call.note else {}), call


def crashed(error: Exception) -> dict:
    reason = " ".join(str(error).split())[:200]
    return {"status": "crashed", "reason": f"{type(error).__name__}: {reason}"}


def time_all(
    calls: dict[str, Call], rows: dict[str, dict], settings: Settings, entering: Entering
) -> dict[str, list[float]]:
    """Write times into the rows; a call that raises loses its place, and the rest start anew."""
    turn = ""

    def enter(name: str) -> None:
        nonlocal turn
        turn = name.removesuffix(" again") if name == TWIN else name
        entering(turn)

    while calls:
        everyone = calls | ({TWIN: calls[BASELINE]} if BASELINE in calls else {})
        try:
            samples = measure.alternate(everyone, measure.clock_for(settings.device), settings.effort, enter)
        except Exception as error:
            rows[turn] = crashed(error)
            del calls[turn]
            continue
        for name in calls:
            rows[name] |= numbers(samples, name)
        return samples
    return {}


def numbers(samples: dict[str, list[float]], name: str) -> dict:
    """Milliseconds per run and the ratio to the baseline: medians with 20th and 80th percentiles."""
    ms = [short(1e3 * seconds) for seconds in measure.spread(samples[name])]
    row = {"ms": ms, "rounds": len(samples[name])}
    if BASELINE in samples and name != BASELINE:
        row["ratio"] = [short(ratio) for ratio in measure.spread(measure.ratios(samples[BASELINE], samples[name]))]
    return row


def noise(samples: dict[str, list[float]]) -> float | None:
    return short(measure.noise(samples[BASELINE], samples[TWIN])) if TWIN in samples else None


def measure_memory(call: Call, work: Workload) -> dict:
    """Bytes saved for backward, where torch's autograd keeps them, and peak memory."""
    saved = memory.saved_bytes(call)
    peak = memory.peak_bytes(call, work.device)
    return {key: value for key, value in (("saved", saved), ("peak", peak)) if value is not None}


def short(value: float) -> float:
    """Four significant digits: what the noise leaves, and small files."""
    return float(f"{value:.4g}")
