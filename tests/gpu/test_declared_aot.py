"""Triton's kernels for published cells compile for every target without a GPU, and spill in no loop."""

import pytest
from conftest import INTERPRETED

from rnnfast import cells
from rnnfast.declare import Cell

aot = pytest.importorskip("rnnfast_kernels.gpu.aot")
STANDARD = {name: cell for name, cell in vars(cells).items() if isinstance(cell, Cell) and cell.kernel.standard}


@pytest.mark.long
@pytest.mark.skipif(INTERPRETED, reason="the interpreter does not compile")
@pytest.mark.parametrize("target", aot.TARGETS)
@pytest.mark.parametrize("name", STANDARD)
def test_compiles_and_spills_in_no_loop(name, target):
    device = aot.TARGETS[target][1]
    for dtype in ("bfloat16", "float32"):
        for backward in (False, True):
            problem = aot.plan.Problem(STANDARD[name].identity, 128, 16, 1, dtype, "ieee", backward, device)
            row, wrong = aot.report(aot.Case(target, problem, True))
            assert wrong is None, wrong
            assert name in row
