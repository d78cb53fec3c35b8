"""Kernels for cells of other forms than torch's as they are compiled for a GPU, run without one.

See `test_gpu_compiled.py`: right results, nothing out of bounds, no race, no deadlock.
"""

import pytest
import torch
from any_form import CELLS, compare, everything, make, pointwise
from conftest import INTERPRETED
from gpu_plans import ALONE, TOGETHER

if INTERPRETED or torch.cuda.is_available():
    pytest.skip("compiles for GPUs that are not there", allow_module_level=True)
pytest.importorskip("triton", minversion="3.5")

from compiled_kernels import compiled_for
from rnnfast_kernels.gpu import plan

from rnnfast.backends import gpu, gpu_products


@pytest.fixture(autouse=True)
def strict(monkeypatch):
    """Float32 products as exact as they come; CPU tensors where there is no GPU."""
    monkeypatch.setattr(gpu_products, "tf32_wanted", lambda: False)
    monkeypatch.setattr(gpu, "unsupported", lambda *_: None)


def check(cell, dtype=torch.float32, target="sm_90", tolerance=None, **sizes):
    """Forward and backward with lengths."""
    with compiled_for(target):
        compare(
            make(cell, dtype, **({"B": 2, "H": 33, "D": 1} | sizes)), tolerance, lengths=torch.tensor([2, 3])
        )  # fmt: skip


def test_without_a_product():
    check(pointwise)


@pytest.mark.long
@pytest.mark.parametrize("target", ["sm_80", "sm_90", "sm_120"])
@pytest.mark.parametrize("cell", [everything, pointwise], ids=lambda cell: cell.__name__)
def test_by_the_plan_of_the_device(cell, target):
    check(cell, torch.bfloat16, target, 6e-2)
    check(cell, torch.float32, target)


@pytest.mark.long
@pytest.mark.parametrize("name", CELLS)
def test_published_cells(name):
    check(CELLS[name])


LOOPS = {
    **{name: TOGETHER[name] for name in ("split", "grid", "grid of two lines")},
    **{name: ALONE[name] for name in ("resident", "streamed")},
}


@pytest.mark.long
@pytest.mark.parametrize("loop", LOOPS)
def test_every_loop(loop):
    with plan.override(LOOPS[loop]):
        check(everything)


@pytest.mark.long
def test_more_units_than_a_program_has():
    check(pointwise, H=150)
