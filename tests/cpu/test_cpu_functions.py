"""The functions that cells may use, as vectors of the CPU: a few units in the last place, torch's special values."""

import numpy as np
import pytest
import torch
from numba import njit
from rnnfast_kernels.bind import bind
from rnnfast_kernels.cpu.runtime.build import OPTIONS, vectors
from rnnfast_kernels.cpu.target import target
from torch.nn import functional

# ruff: noqa: F821

# Each function: torch's, where it is defined, and the units in the last place that it may err by.
FUNCTIONS = {
    "exp": (torch.exp, (-80.0, 80.0), 3),
    "expm1": (torch.expm1, (-30.0, 30.0), 4),
    "log": (torch.log, (1e-3, 1e3), 3),
    "log1p": (torch.log1p, (-0.999, 50.0), 4),
    "softplus": (functional.softplus, (-30.0, 30.0), 8),
    "logsigmoid": (functional.logsigmoid, (-30.0, 30.0), 8),
    "sqrt": (torch.sqrt, (0.0, 1e3), 1),
    "rsqrt": (torch.rsqrt, (1e-3, 1e3), 2),
    "abs": (torch.abs, (-3.0, 3.0), 0),
    "sign": (torch.sign, (-3.0, 3.0), 0),
    "sin": (torch.sin, (-9.0, 9.0), 2),
    "cos": (torch.cos, (-9.0, 9.0), 2),
    "erf": (torch.erf, (-4.0, 4.0), 2),
}
SPECIAL = [0.0, -0.0, float("inf"), -float("inf"), float("nan"), 1e-30, -1e-30, 95.0, -95.0, 1e-40, 20.0, 3e38]
DTYPES = {"float32": torch.float32, "float64": torch.float64}


def map_all(source, goal, count):
    for start in range(0, count, LANES):
        store(goal + start * ACC_BYTES, mapped(load(source + start * ACC_BYTES, count - start)), count - start)


def run(name: str, dtype: str, x: torch.Tensor) -> torch.Tensor:
    """Apply a function to every element."""
    namespace = vectors(target(dtype), f"test of functions {dtype}")
    kernel = njit(bind(map_all, {**namespace, "mapped": namespace[name]}), error_model="numpy")
    result = torch.empty_like(x)
    kernel(x.data_ptr(), result.data_ptr(), x.numel())
    return result


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", FUNCTIONS)
def test_errs_by_few_units_in_the_last_place(name, dtype):
    assert OPTIONS["error_model"] == "numpy"
    function, (low, high), units = FUNCTIONS[name]
    usual = torch.linspace(low, high, 4001, dtype=torch.float64)
    small = torch.logspace(-12, 0, 500, dtype=torch.float64) * (0.99 if low < 0 else 1)
    x = torch.cat((usual, small, -small if low < 0 else small)).to(DTYPES[dtype])
    found = torch.cat((x, torch.tensor(SPECIAL, dtype=x.dtype)))
    got, special = run(name, dtype, found).split((len(x), len(SPECIAL)))
    exact = function(x.double()).numpy()
    # In float64 torch's own result is the measure, which errs by a unit or two itself.
    allowed = units if dtype == "float32" else units + 4
    unit = np.spacing(np.abs(exact).astype(x.numpy().dtype)).astype(float)
    error = np.abs(got.double().numpy() - exact) / unit
    # sin and cos pass through 0, where what counts is the absolute error.
    error = error if name not in ("sin", "cos") else np.abs(got.double().numpy() - exact) / torch.finfo(x.dtype).eps
    assert error.max() <= allowed, (x[error.argmax()], got[error.argmax()], exact[error.argmax()])
    # In float64, since log1p of 3e38 is infinite with torch 2.6 in float32.
    expected = function(torch.tensor(SPECIAL, dtype=x.dtype).double()).to(x.dtype)
    near = 1e-5 if dtype == "float32" else 1e-14
    torch.testing.assert_close(special, expected, rtol=near, atol=0, equal_nan=True)


@pytest.mark.parametrize("name", ["maximum", "minimum"])
def test_extrema_of_ties_and_nan(name):
    def map_pairs(first, second, goal, count):
        for start in range(0, count, LANES):
            found = chosen(
                load(first + start * ACC_BYTES, count - start), load(second + start * ACC_BYTES, count - start)
            )
            store(goal + start * ACC_BYTES, found, count - start)

    namespace = vectors(target("float32"), "test of functions float32")
    kernel = njit(bind(map_pairs, {**namespace, "chosen": namespace[name]}), error_model="numpy")
    values = [1.0, -1.0, float("nan"), float("inf"), 0.0]
    a, b = (t.flatten().contiguous() for t in torch.meshgrid(torch.tensor(values), torch.tensor(values), indexing="ij"))
    result = torch.empty_like(a)
    kernel(a.data_ptr(), b.data_ptr(), result.data_ptr(), len(a))
    assert torch.equal(result.nan_to_num(7.0), getattr(torch, name)(a, b).nan_to_num(7.0))
