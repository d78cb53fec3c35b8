"""Triton's kernels for published cells compile for every target without a GPU, and spill in no loop."""

import pytest

pytest.importorskip("triton", minversion="3.5")

import torch
from conftest import INTERPRETED
from rnnfast_kernels.gpu import aot

import rnnfast
from rnnfast import cells
from rnnfast.declare import Cell

LIBRARY = {name: cell for name, cell in vars(cells).items() if isinstance(cell, Cell)}
pytestmark = pytest.mark.skipif(INTERPRETED, reason="the interpreter does not compile")


@rnnfast.cell(gates="a b c d e")
def five_gates(x, u, state):
    total = torch.tanh(x.a + u.a) + torch.tanh(x.b + u.b) + torch.tanh(x.c + u.c)
    return 0.2 * (total + torch.tanh(x.d + u.d) + torch.tanh(x.e + u.e))


def check(cell, target, dtype, backward, H=128, B=16):
    device = aot.TARGETS[target][1]
    problem = aot.plan.Problem(cell.identity, H, B, 1, dtype, "ieee", backward, device)
    row, wrong = aot.report(aot.Case(target, problem, True))
    assert wrong is None, wrong
    assert cell.__name__ in row


@pytest.mark.long
@pytest.mark.parametrize("target", aot.TARGETS)
@pytest.mark.parametrize("name", LIBRARY)
def test_compiles_and_spills_in_no_loop(name, target):
    for dtype in ("bfloat16", "float32"):
        for backward in (False, True):
            check(LIBRARY[name], target, dtype, backward)


def test_a_cell_of_another_form():
    check(cells.indrnn, "sm_90", "bfloat16", True)


def test_more_gates_than_are_exchanged_at_once():
    check(five_gates, "sm_90", "float32", False, H=256)
