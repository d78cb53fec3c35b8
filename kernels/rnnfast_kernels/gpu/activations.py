"""What a cell's names mean on a GPU, and every cell bound to it.

`sigmoid` and `tanh` are built on `exp` alone, because it exists on every target and in the interpreter. They keep NaN,
saturate without overflowing to NaN, and `tanh` keeps its relative accuracy near zero. On NVIDIA, `exp` and `reciprocal`
of float32 are one instruction each: what the compiler puts around it for the sake of subnormal results costs more than
the rest of a cell.
"""

from collections.abc import Callable
from typing import NamedTuple

import triton
import triton.language as tl
from triton.language.target_info import is_cuda

from rnnfast_kernels.bind import bind
from rnnfast_kernels.cells import CELLS
from rnnfast_kernels.equations.emit import shown
from rnnfast_kernels.gpu.tiles import INTERPRETED


@triton.jit
def exp(x, TIMES: tl.constexpr = 1.0):
    """e^(TIMES x); a result below the smallest normal number may be 0."""
    if not INTERPRETED and is_cuda() and x.dtype == tl.float32:
        power = x * (TIMES * 1.4426950408889634)  # log2(e)
        return tl.inline_asm_elementwise(
            "ex2.approx.ftz.f32 $0, $1;", "=f,f", [power], tl.float32, is_pure=True, pack=1
        )
    else:
        return tl.exp(x * TIMES)


@triton.jit
def reciprocal(x):
    """1 / x, 0 for infinity; a result below the smallest normal number may be 0."""
    if not INTERPRETED and is_cuda() and x.dtype == tl.float32:
        return tl.inline_asm_elementwise("rcp.approx.ftz.f32 $0, $1;", "=f,f", [x], tl.float32, is_pure=True, pack=1)
    else:
        return 1.0 / x


@triton.jit
def sigmoid(x):
    """1 / (1 + exp(-x)); exp overflows to infinity and its reciprocal to 0."""
    return reciprocal(1.0 + exp(-x))


@triton.jit
def with_sign_of(a, x):
    """a, which is not negative, with the sign of x."""
    if x.dtype == tl.float64:
        return tl.where(x < 0.0, -a, a)
    else:
        sign = x.to(tl.int32, bitcast=True) & -0x80000000
        return (a.to(tl.int32, bitcast=True) | sign).to(tl.float32, bitcast=True)


@triton.jit
def tanh(x):
    """1 - 2 / (1 + exp(2|x|)) with the sign of x; near zero, where that cancels, a series or a fraction.

    Near 1 only the subtraction rounds by much. An error of tanh there is magnified in the gradient, by 1 - y^2.
    float32: x + x^3 p(x^2) with p fitted for the least relative error below |x| = 0.35, which is 1e-7 with rounding.
    float64: seven levels of Lambert's tanh(x) = x / (1 + x^2 / (3 + x^2 / (5 + ...))), which err by 2e-16 below 0.5.
    """
    a, y = tl.abs(x), x * x
    far = with_sign_of(1.0 - 2.0 * reciprocal(1.0 + exp(a, 2.0)), x)
    if x.dtype == tl.float64:
        p = 135135.0 + y * (17325.0 + y * (378.0 + y))
        q = 135135.0 + y * (62370.0 + y * (3150.0 + y * 28.0))
        return tl.where(a < 0.5, x * (p / q), far)
    else:
        p = -0.33332663 + y * (0.13299825 + y * -0.0491485)
        return tl.where(a < 0.35, x + x * (y * p), far)


@triton.jit
def relu(x):
    return tl.where(x <= 0.0, 0.0, x)


@triton.jit
def sigmoid_backward(dy, y):
    return dy * y * (1.0 - y)


@triton.jit
def tanh_backward(dy, y):
    return dy * (1.0 - y * y)


@triton.jit
def relu_backward(dy, y):
    return tl.where(y <= 0.0, 0.0, dy)


@triton.jit
def zeros_like(x):
    return tl.where(x == x, 0.0, 0.0).to(x.dtype)


@triton.jit
def where_greater(a, b, yes, no):
    return tl.where(a > b, yes, no)


@triton.jit
def where_at_most(a, b, yes, no):
    return tl.where(a <= b, yes, no)


@triton.jit
def where_equal(a, b, yes, no):
    return tl.where(a == b, yes, no)


@triton.jit
def log1p(x):
    """log(1 + x), with what is lost in 1 + x put back."""
    u = 1.0 + x
    lost = (x - (u - 1.0)) / u
    return tl.log(u) + tl.where((u > 0.0) & (x < 1e16), lost, 0.0)


@triton.jit
def expm1(x):
    """e^x - 1 = 2 tanh(x / 2) / (1 - tanh(x / 2)) where that cancels, else by `exp`."""
    t = tanh(x * 0.5)
    return tl.where(tl.abs(x) < 0.5, 2.0 * t / (1.0 - t), tl.exp(x) - 1.0)


@triton.jit
def softplus(x):
    return tl.where(x > 20.0, x, log1p(tl.exp(tl.where(x > 20.0, 20.0, x))))


@triton.jit
def logsigmoid(x):
    return tl.where(x > 0.0, 0.0, x) - log1p(tl.exp(-tl.abs(x)))


@triton.jit
def rsqrt(x):
    return 1.0 / tl.sqrt(x)


@triton.jit
def sign(x):
    return tl.where(x > 0.0, 1.0, tl.where(x < 0.0, -1.0, 0.0 * tl.abs(x)))


@triton.jit
def maximum(a, b):
    """The larger, NaN if one is."""
    return tl.where(a > b, a, tl.where(b == b, tl.where(a == a, b, a), b))


@triton.jit
def minimum(a, b):
    """The smaller, NaN if one is."""
    return tl.where(a < b, a, tl.where(b == b, tl.where(a == a, b, a), b))


@triton.jit
def clamp_low(a, low):
    return tl.where(a < low, low, a)


@triton.jit
def clamp_high(a, high):
    return tl.where(a > high, high, a)


@triton.jit
def bounded(a, low, high):
    return clamp_high(clamp_low(a, low), high)


@triton.jit
def detach(a):
    return a


@triton.jit
def surrogate(a, slope):
    return tl.where(a > 0.0, 1.0, 0.0 * slope)


def of_language(name: str) -> Callable:
    """A function of `tl`, looked up as it is called by the interpreter, which puts its own there for each launch."""
    return (lambda x: getattr(tl, name)(x)) if INTERPRETED.value else getattr(tl, name)


# `tl` itself must be among a bound cell's globals, or the interpreter cannot patch it.
NAMESPACE = {
    "tl": tl,
    **{name: of_language(name) for name in ("exp", "abs", "log", "sqrt", "sin", "cos", "erf")},
    **{
        function.__name__: function
        for function in (
            sigmoid, tanh, relu, sigmoid_backward, tanh_backward, relu_backward, zeros_like, where_greater,
            where_at_most, where_equal, log1p, expm1, softplus, logsigmoid, rsqrt, sign, maximum, minimum, clamp_low,
            clamp_high, bounded, detach, surrogate,
        )
    },
}  # fmt: skip


class BoundCell(NamedTuple):
    """A cell's two equations as functions that a kernel takes as constexpr arguments."""

    forward: triton.JITFunction
    backward: triton.JITFunction


def bound(equation: Callable) -> triton.JITFunction:
    function = bind(shown(equation), NAMESPACE)
    # The interpreter looks a function up by the name that its source gives it.
    function.__name__ = equation.__name__
    return triton.jit(function)


class Bound(dict):
    """Every cell, bound when it is first asked for."""

    def __missing__(self, name: str) -> BoundCell:
        cell = CELLS[name]
        self[name] = BoundCell(bound(cell.forward), bound(cell.backward))
        return self[name]


BOUND = Bound()
