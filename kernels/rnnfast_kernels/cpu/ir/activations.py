"""sigmoid, tanh, relu and their derivatives over vectors: branch-free, a few units in the last place, NaN kept.

Both transcendental functions come from one primitive, e^-a for a >= 0 in two parts, with which e^-a - 1 keeps its
relative accuracy near 0:

    -a = n ln 2 + r,  |r| <= ln(2) / 2      the integer n by adding and subtracting a large number
    e^-a = 2^n (e^r - 1) + 2^n              e^r - 1 by its Taylor series

(Cody and Waite, Software Manual for the Elementary Functions, 1980.) The functions are bound over a dtype's constants.
"""

# ruff: noqa: F821

import math

from rnnfast_kernels.cpu.ir import vector

# ln 2 in two parts, the first so short that its product with n is exact; the a from which on e^-a counts as 0 and
# tanh(a) rounds to 1; terms of the series; the a above which tanh(a) is taken from its distance to 1.
CONSTANTS = {
    "float32": {
        "LN2_HIGH": 0.693145751953125,
        "LN2_LOW": 1.4286068202862268e-06,
        "EXP_LIMIT": 87.0,
        "TANH_LIMIT": 10.0,
        "TANH_FAR": 0.625,
        "terms": 7,
    },
    "float64": {
        "LN2_HIGH": 0.6931471803691238,
        "LN2_LOW": 1.9082149292705877e-10,
        "EXP_LIMIT": 708.0,
        "TANH_LIMIT": 20.0,
        "TANH_FAR": 0.625,
        "terms": 13,
    },
}


def exp_neg_parts(a):
    """e^-a as a pair whose sum it is: (e^-a - 2^n, 2^n)."""
    shifted = a * MINUS_LOG2_E + ROUND_SHIFT
    n = shifted - ROUND_SHIFT
    r = (-a - n * LN2_HIGH) - n * LN2_LOW
    power = power_of_two(shifted)
    return (polynomial(r) * (r * r) + r) * power, power


def sigmoid(x):
    """1 / (1 + e^-x), from e^-|x| so that nothing overflows."""
    a = magnitude(x)
    part, power = exp_neg_parts(where_greater(a, EXP_LIMIT, EXP_LIMIT, a))
    e = where_greater(a, EXP_LIMIT, ZERO, part + power)
    return where_greater(ZERO, x, e, ONE) / (e + ONE)


def tanh(x):
    """(1 - e) / (1 + e) with e = e^-2|x| and the sign of x; away from 0 as 1 - 2e / (1 + e).

    There only the last subtraction rounds by much. An error of tanh near 1 is magnified in the gradient, by 1 - y^2.
    """
    a = magnitude(x)
    a = where_greater(a, TANH_LIMIT, TANH_LIMIT, a)
    part, power = exp_neg_parts(a + a)
    e = part + power
    fraction = where_greater(a, TANH_FAR, e, (ONE - power) - part) / (e + ONE)
    return with_sign_of(where_greater(a, TANH_FAR, ONE - (fraction + fraction), fraction), x)


def relu(x):
    """The larger of x and 0; NaN stays."""
    return where_greater(ZERO, x, ZERO, x)


def sigmoid_backward(dy, y):
    return dy * (y * (ONE - y))


def tanh_backward(dy, y):
    return dy * (ONE - y * y)


def relu_backward(dy, y):
    """dy, but 0 where y is 0."""
    return where_at_most(y, ZERO, ZERO, dy)


def sigmoid_hvp(dot, dy, y):
    """Derivative of `sigmoid_backward(dy, y)` by y, times dot."""
    return dot * dy * (ONE - (y + y))


def tanh_hvp(dot, dy, y):
    """Derivative of `tanh_backward(dy, y)` by y, times dot."""
    return -(dot * dy) * (y + y)


ACTIVATIONS = (sigmoid, tanh, relu, sigmoid_backward, tanh_backward, relu_backward)
HVP = (sigmoid_hvp, tanh_hvp)


def constants(dtype: str) -> dict:
    """The names that the functions above are bound over, but for `exp_neg_parts`."""
    row = dict(CONSTANTS[dtype])
    # e^r = 1 + r + r^2 (1/2! + r/3! + ...)
    series = vector.polynomial([1 / math.factorial(k) for k in range(2, row.pop("terms") + 1)])
    return {
        "MINUS_LOG2_E": -math.log2(math.e),
        "ROUND_SHIFT": vector.round_shift(dtype),
        "ZERO": 0.0,
        "ONE": 1.0,
        "TWO": 2.0,
        "polynomial": series,
        "magnitude": vector.magnitude,
        "with_sign_of": vector.with_sign_of,
        "power_of_two": vector.power_of_two,
        "where_greater": vector.where_greater,
        "where_at_most": vector.where_at_most,
        **row,
    }
