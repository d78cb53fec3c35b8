"""Take times: contenders in turn, one sample each per round, so that what disturbs one disturbs its neighbours too.

A sample is one run, or as many runs as fill a few milliseconds. The order turns around from round to round. The ratio
to the baseline is formed within each round and its median taken, which a slow drift of the machine leaves alone. The
baseline runs twice in every round: the ratio to its own twin is the noise, and no smaller difference is a difference.
"""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from benchmarks.contenders import Call

SAMPLE_SECONDS = 0.004
# Worker threads of a peer may still spin for a moment after its run; they must not spin into the next one's.
PAUSE_SECONDS = 0.002
FLUSH_BYTES = 256 << 20


@dataclass(frozen=True)
class Effort:
    """How long to measure one contender on one case, and how many rounds at least and at most."""

    seconds: float = 0.5
    fewest: int = 3
    most: int = 40


Clock = Callable[[Call, int], float]


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


def clock_for(device: str) -> Clock:
    return cpu_clock if device == "cpu" else GpuClock()


def warm_up(call: Call, clock: Clock) -> tuple[float, int]:
    """Run until settled; return the seconds per run and the runs that make one sample."""
    with call.context():
        seconds = clock(call, 1)
        if seconds < 0.5:
            seconds = min(clock(call, 1), clock(call, 1))
        runs = max(1, round(SAMPLE_SECONDS / seconds))
        return (clock(call, runs) if runs > 1 else seconds), runs


def alternate(
    calls: dict[str, Call], clock: Clock, effort: Effort, entering: Callable[[str], None]
) -> dict[str, list[float]]:
    """Time every call in turn; return each one's seconds per run, round by round.

    entering: told whose turn it is, so that a crash has a name.
    """
    warm = {}
    for name, call in calls.items():
        entering(name)
        warm[name] = warm_up(call, clock)
    round_seconds = sum(seconds * (runs + 1) + PAUSE_SECONDS for seconds, runs in warm.values())
    rounds = min(effort.most, max(effort.fewest, math.ceil(effort.seconds * len(calls) / round_seconds)))
    samples: dict[str, list[float]] = {name: [] for name in calls}
    for index in range(rounds):
        for name in list(calls)[:: 1 if index % 2 == 0 else -1]:
            entering(name)
            runs = warm[name][1]
            with calls[name].context():
                if runs > 1:
                    time.sleep(PAUSE_SECONDS)
                    calls[name].run()
                samples[name].append(clock(calls[name], runs))
    return samples


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
