"""Plans of the tests' own, so that each loop runs on layers of any size."""

from dataclasses import replace

import pytest

pytest.importorskip("triton", minversion="3.4")

from rnnfast_kernels.gpu import plan

ROOM = 10**9


def alone(block_k, split, rows=16, **changes):
    """Cooperative plans of one program to a group."""

    def choose(problem):
        width = max(16, plan.next_power(problem.H))
        return replace(plan.cooperative(problem, rows, width, block_k, split, 4, shared=ROOM), **changes)

    return choose


def together(units, split, slices=1, **changes):
    """Cooperative plans in which programs of `units` hidden units share a recurrence; in backward with slices of k."""

    def choose(problem):
        several = slices if problem.backward else 1
        return replace(plan.cooperative(problem, 16, units, 16, split, 4, shared=ROOM, slices=several), **changes)

    return choose


ALONE = {
    "resident": lambda problem: plan.resident(problem, 16, 4),
    "cooperative": alone(16, 2),
    "cooperative-unsplit": alone(16, 1),
    "cooperative-rereading": alone(16, 1, kept=1, stages=3),
    "cooperative-few-rows": alone(16, 2, rows=4),
    "cooperative-lazy": alone(16, 2, eager=False),
    "streamed": plan.streamed,
}
TOGETHER = {
    "split": together(8, 2),
    "unsplit": together(8, 1),
    "wide": together(16, 2),
    "rereading": together(8, 1, kept=1, stages=3),
    "lazy": together(8, 2, eager=False),
    "lazy-rereading": together(16, 1, kept=1, stages=3, eager=False),
    "grid": together(8, 2, slices=4),
    "grid-rereading": together(8, 1, slices=2, kept=1, stages=3),
}
