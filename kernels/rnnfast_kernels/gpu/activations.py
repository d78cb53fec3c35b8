"""What a cell's names mean on a GPU, and every cell bound to it.

`sigmoid` and `tanh` are built on `exp` alone, because it exists on every target and in the interpreter. They keep NaN,
saturate without overflowing to NaN, and `tanh` keeps its relative accuracy near zero.
"""

from collections.abc import Callable
from typing import NamedTuple

import triton
import triton.language as tl

from rnnfast_kernels.bind import bind
from rnnfast_kernels.cells import CELLS


@triton.jit
def sigmoid(x):
    """1 / (1 + exp(-x)); exp overflows to infinity and its reciprocal to 0."""
    return 1.0 / (1.0 + tl.exp(-x))


@triton.jit
def tanh(x):
    """(1 - exp(-2|x|)) / (1 + exp(-2|x|)) with the sign of x; near zero, where that cancels, a continued fraction.

    Seven levels of Lambert's tanh(x) = x / (1 + x^2 / (3 + x^2 / (5 + ...))) err by 2e-16 at |x| = 0.5.
    """
    e = tl.exp(-2.0 * tl.abs(x))
    far = (1.0 - e) / (1.0 + e)
    y = x * x
    p = 135135.0 + y * (17325.0 + y * (378.0 + y))
    q = 135135.0 + y * (62370.0 + y * (3150.0 + y * 28.0))
    return tl.where(tl.abs(x) < 0.5, x * (p / q), tl.where(x < 0.0, -far, far))


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
    return tl.zeros_like(x)


# `tl` itself must be among a bound cell's globals, or the interpreter cannot patch it.
NAMESPACE = {
    "tl": tl,
    "sigmoid": sigmoid,
    "tanh": tanh,
    "relu": relu,
    "sigmoid_backward": sigmoid_backward,
    "tanh_backward": tanh_backward,
    "relu_backward": relu_backward,
    "zeros_like": zeros_like,
}


class BoundCell(NamedTuple):
    """A cell's two equations as functions that a kernel takes as constexpr arguments."""

    forward: triton.JITFunction
    backward: triton.JITFunction


def bound(equation: Callable) -> triton.JITFunction:
    function = bind(equation, NAMESPACE)
    # The interpreter looks a function up by the name that its source gives it.
    function.__name__ = equation.__name__
    return triton.jit(function)


BOUND = {name: BoundCell(bound(cell.forward), bound(cell.backward)) for name, cell in CELLS.items()}
