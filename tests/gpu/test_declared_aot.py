"""Triton's kernels for published cells compile for every target without a GPU, and spill in no loop."""

import pytest

pytest.importorskip("triton", minversion="3.5")

from conftest import INTERPRETED
from rnnfast_kernels.gpu import aot

from rnnfast import cells
from rnnfast.declare import Cell

LIBRARY = {name: cell for name, cell in vars(cells).items() if isinstance(cell, Cell)}
pytestmark = pytest.mark.skipif(INTERPRETED, reason="the interpreter does not compile")


def check(name, target, dtype, backward, H=128, B=16):
    device = aot.TARGETS[target][1]
    problem = aot.plan.Problem(LIBRARY[name].identity, H, B, 1, dtype, "ieee", backward, device)
    row, wrong = aot.report(aot.Case(target, problem, True))
    assert wrong is None, wrong
    assert name in row


@pytest.mark.long
@pytest.mark.parametrize("target", aot.TARGETS)
@pytest.mark.parametrize("name", LIBRARY)
def test_compiles_and_spills_in_no_loop(name, target):
    for dtype in ("bfloat16", "float32"):
        for backward in (False, True):
            check(name, target, dtype, backward)


def test_a_cell_of_another_form():
    check("indrnn", "sm_90", "bfloat16", True)
