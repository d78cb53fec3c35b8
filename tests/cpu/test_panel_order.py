"""Who reads which weights, and in which order."""

from types import FunctionType

import pytest
from rnnfast_kernels.cells import CELLS
from rnnfast_kernels.cpu.loops import products
from rnnfast_kernels.cpu.plan import policy


def panels(widest, first, last, backwards):
    """The panels of a pass: first block, blocks, and where the next panel is said to be."""
    known = {"WIDEST": widest, "max": max}
    known["panel_blocks"] = FunctionType(products.panel_blocks.__code__, known)
    next_panel = FunctionType(products.next_panel.__code__, known)
    found, done = [], 0
    while done < last - first:
        found.append(next_panel(first, last, done, backwards))
        done += found[-1][1]
    return found


@pytest.mark.parametrize("widest", [1, 2, 4])
@pytest.mark.parametrize("first", [0, 8])
@pytest.mark.parametrize("count", range(1, 14))
def test_a_pass_backwards_meets_the_same_panels(widest, first, count):
    forwards = panels(widest, first, first + count, 0)
    backwards = panels(widest, first, first + count, 1)
    assert [each[:2] for each in backwards] == [each[:2] for each in forwards[::-1]]
    assert [each[0] for each in forwards[1:]] == [each[2] for each in forwards[:-1]]
    assert all(first <= following < first + count for _, _, following in (*forwards, *backwards))


def test_the_panel_after_one_of_a_pass_backwards_is_the_one_before_it():
    assert [(block, following) for block, _, following in panels(4, 0, 12, 1)] == [(8, 4), (4, 0), (0, 0)]


@pytest.mark.parametrize(
    ("hidden", "rows", "threads", "workers"),
    [(32, 1, 2, 1), (128, 7, 2, 2), (128, 8, 2, 1), (256, 7, 1, 1), (256, 15, 4, 4), (256, 16, 4, 1)],
)
def test_threads_share_units_where_the_batch_has_few_rows(hidden, rows, threads, workers):
    work = policy.work_per_row(CELLS["lstm"], 0, hidden, hidden)
    assert policy.workers_for(rows, 100 * rows * work, rows * work, 1, threads) == workers
