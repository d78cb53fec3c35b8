"""Plans of the tests' own, so that each loop runs on layers of any size."""

from dataclasses import replace

import pytest

pytest.importorskip("triton", minversion="3.5")

from rnnfast_kernels.gpu import plan


def in_chunks(problem, chosen, split):
    """The same plan with another number of parts of k, each of 16 values to a chunk, so that small layers have several
    chunks."""
    span = min(problem.H, chosen.columns * chosen.block_n)
    return replace(chosen, split=split, block_k=16, chunks=plan.cdiv(span, 16 * split))


def alone(split, rows=16):
    """Cooperative plans of one program to a group."""

    def choose(problem):
        width = max(16, plan.next_power(problem.H))
        return in_chunks(problem, plan.cooperative(problem, rows, width, 4), split)

    return choose


def together(units, split, slices=1):
    """Cooperative plans in which programs of `units` hidden units share a recurrence; in backward with slices of k."""

    def choose(problem):
        several = slices if problem.backward else 1
        return in_chunks(problem, plan.cooperative(problem, 16, units, 4, several), split)

    return choose


ALONE = {
    "resident": lambda problem: plan.resident(problem, 16, 4),
    "cooperative": alone(2),
    "cooperative-unsplit": alone(1),
    "cooperative-few-rows": alone(2, rows=4),
    "streamed": plan.streamed,
}
TOGETHER = {
    "split": together(8, 2),
    "unsplit": together(8, 1),
    "wide": together(16, 2),
    "grid": together(8, 1, slices=4),
    "grid of two lines": together(8, 1, slices=2),
}
