"""How exact tanh of the GPU kernels is, interpreted or as compiled, above all near 1: see test_cpu_activations.py."""

import random
from contextlib import nullcontext
from dataclasses import replace

import loop_backend
import numpy as np
import pytest
import torch
from closeness import relative_error
from conftest import INTERPRETED
from gpu_layers import Case, exact, make, run

if torch.cuda.is_available():
    pytest.skip("runs kernels on CPU tensors", allow_module_level=True)
pytest.importorskip("triton", minversion="3.5")

import triton
import triton.language as tl
from compiled_kernels import compiled_for
from gpu_plans import ALONE
from rnnfast_kernels.gpu import activations, plan

from rnnfast.backends import gpu, gpu_products

CPU = torch.device("cpu")
BITS = {torch.float32: 23, torch.float64: 52}
# Units in the last place that tanh may err by, from this |tanh| on.
LIMITS = ((0.0, 3.0), (0.5, 2.0), (0.7, 1.3), (0.9, 0.9), (0.99, 0.6))
BLOCK = 1024


@triton.jit
def tanh_of_all(p_x, p_y, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(p_y + at, activations.tanh(tl.load(p_x + at)))


def tanh(x: torch.Tensor) -> torch.Tensor:
    padded = torch.nn.functional.pad(x, (0, -len(x) % BLOCK))
    y = torch.full_like(padded, float("nan"))
    with nullcontext() if INTERPRETED else compiled_for("sm_90"):
        tanh_of_all[(len(padded) // BLOCK,)](padded, y, BLOCK)
    return y[: len(x)]


@pytest.mark.parametrize("dtype", BITS, ids=["f32", "f64"])
def test_tanh_errs_by_few_units_in_the_last_place_and_by_less_than_one_near_one(dtype):
    small = torch.logspace(-30, -2, 5 * BLOCK, dtype=torch.float64)
    usual = torch.linspace(0.01, 12 if dtype == torch.float32 else 22, 20 * BLOCK, dtype=torch.float64)
    x = torch.cat((small, usual, -small, -usual)).to(dtype)
    y, expected = tanh(x).numpy(), np.tanh(x.numpy().astype(np.longdouble))
    error = np.abs(y - expected) / np.exp2(np.floor(np.log2(np.abs(expected))) - BITS[dtype])
    for least, limit in LIMITS:
        assert error[np.abs(expected) >= least].max() <= limit, least
    assert (np.abs(y) <= 1).all()


@pytest.mark.parametrize("dtype", BITS, ids=["f32", "f64"])
@pytest.mark.filterwarnings("ignore:.* encountered in:RuntimeWarning")
def test_tanh_at_the_ends(dtype):
    ends = torch.tensor([0.0, torch.inf, torch.nan, 9.5, 40.0, 1e30, 1e-20], dtype=dtype)
    expected = torch.tensor([0.0, 1.0, torch.nan, 9.5, 1.0, 1.0, 1e-20], dtype=dtype)
    expected[3] = torch.tanh(ends[3])
    for sign in (1, -1):
        torch.testing.assert_close(tanh(sign * ends), sign * expected, rtol=1e-15, atol=0, equal_nan=True)


def errors_of_gradients(cell: str, hidden: int, count: int) -> list[tuple[float, float]]:
    """Errors of the kernels and of torch in float32, for each gradient of small random layers."""
    errors = []
    for seed in range(count):
        draw = random.Random(f"{cell} {hidden} {seed}")
        case = Case(cell, *(draw.randint(1, most) for most in (3, 3, 5)), hidden, reverse=(draw.random() < 0.5,))
        layer = make(case, CPU)
        layer = replace(layer, x=layer.x * draw.choice([0.3, 1, 3, 8]))
        expected, theirs = run(loop_backend, exact(layer)), run(loop_backend, layer)
        ours = run(gpu, layer)
        errors += [
            (relative_error(value, ours[name]), relative_error(value, theirs[name]))
            for name, value in expected.items()
            if name.startswith("d")
        ]
    return errors


LONG = [pytest.param(cell, range(1, 6), id=cell, marks=pytest.mark.long) for cell in ("rnn_tanh", "lstm", "gru")]


@pytest.mark.parametrize(("cell", "sizes"), [pytest.param("gru", (1,), id="gru of one unit"), *LONG])
def test_gradients_of_small_layers_are_as_exact_as_torchs(cell, sizes, monkeypatch):
    """An error of a single one may be chance: torch's own is zero now and then."""
    monkeypatch.setattr(gpu_products, "tf32_wanted", lambda: False)
    errors = []
    with plan.override(ALONE["streamed"]), nullcontext() if INTERPRETED else compiled_for("sm_90"):
        for hidden in sizes:
            errors += errors_of_gradients(cell, hidden, 16)
    found, allowed = np.array(errors).T
    assert (found > np.maximum(5 * allowed, 1e-6)).sum() <= max(1, len(errors) // 200)
    assert found.mean() <= 1.25 * allowed.mean()
