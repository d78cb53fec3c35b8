"""The other functions that a cell may use, over vectors: NaN and infinity as in torch, a few units in the last place.

The exponential is that of `activations`, with its power of two in two factors, so that results overflow and underflow
where they should. The logarithm is that of the mantissa, as 2 artanh((m - 1) / (m + 1)), plus that of the exponent.
sin, cos and erf are the C library's, lane by lane.
"""

# ruff: noqa: F821

import math

from llvmlite import ir
from numba.core import cgutils
from numba.extending import intrinsic

from rnnfast_kernels.cpu.ir import vector
from rnnfast_kernels.cpu.ir.vector import FORMAT, INT32, constant, declared, suffix

# Beyond these, e^x is infinite or 0; terms of the series of artanh.
LIMITS = {"float32": (90.0, -110.0, 6), "float64": (712.0, -760.0, 12)}


def exp_parts(x):
    """e^x as (e^r - 1), then two powers of two whose product is to be multiplied with e^r."""
    x = where_greater(x, EXP_HIGH, EXP_HIGH, where_greater(EXP_LOW, x, EXP_LOW, x))
    n = (x * LOG2_E + ROUND_SHIFT) - ROUND_SHIFT
    r = (x - n * LN2_HIGH) - n * LN2_LOW
    half = (n * 0.5 + ROUND_SHIFT) - ROUND_SHIFT
    first, second = power_of_two(half + ROUND_SHIFT), power_of_two((n - half) + ROUND_SHIFT)
    return polynomial(r) * (r * r) + r, first, second


def exp(x):
    part, first, second = exp_parts(x)
    return (part + ONE) * first * second


def expm1(x):
    """e^x - 1; near 0 there is no power of two, and nothing cancels."""
    part, first, second = exp_parts(x)
    power = first * second
    return where_greater(x, EXPM1_FAR, (part + ONE) * first * second, part * power + (power - ONE))


def log(x):
    """-infinity at 0, NaN below."""
    small = x * TINY_SCALE
    scaled = where_greater(TINY, x, small, x)
    mantissa, exponent = split_float(scaled)
    large = where_greater(mantissa, SQRT_2, ONE, ZERO)
    mantissa = where_greater(mantissa, SQRT_2, mantissa * 0.5, mantissa)
    exponent = exponent + large - where_greater(TINY, x, TINY_EXPONENT, ZERO)
    s = (mantissa - ONE) / (mantissa + ONE)
    square = s * s
    series = artanh_series(square) * square * s
    result = exponent * LN2_HIGH + (exponent * LN2_LOW + (series + s) * 2.0)
    result = where_greater(x, LARGEST, x, result)
    result = where_greater(x, ZERO, result, where_equal(x, ZERO, MINUS_INFINITY, x * NOT_A_NUMBER))
    return result


def log1p(x):
    """log(1 + x), with what was lost in 1 + x put back."""
    u = x + ONE
    lost = (x - (u - ONE)) / u
    correct = where_greater(x, LARGE, ZERO, where_greater(u, ZERO, lost, ZERO))
    return log(u) + correct


def softplus(x):
    return where_greater(x, 20.0, x, log1p(exp(x)))


def logsigmoid(x):
    return where_greater(x, ZERO, ZERO, x) - log1p(exp(-magnitude(x)))


def rsqrt(x):
    return ONE / sqrt(x)


def sign(x):
    return where_greater(x, ZERO, ONE, where_greater(ZERO, x, -ONE, ZERO))


def maximum(a, b):
    """The larger, NaN if one is."""
    return where_greater(a, b, a, where_equal(b, b, where_equal(a, a, b, a), b))


def minimum(a, b):
    """The smaller, NaN if one is."""
    return where_greater(b, a, a, where_equal(b, b, where_equal(a, a, b, a), b))


def clamp_low(a, low):
    return where_greater(low, a, low, a)


def clamp_high(a, high):
    return where_greater(a, high, high, a)


def bounded(a, low, high):
    return clamp_high(clamp_low(a, low), high)


def detach(a):
    return a


def surrogate(a, slope):
    return where_greater(a, a * ZERO, ONE, a * ZERO)


PLAIN = (
    exp_parts, exp, expm1, log, log1p, softplus, logsigmoid, rsqrt, sign, maximum, minimum, clamp_low, clamp_high,
    bounded, detach, surrogate,
)  # fmt: skip


@intrinsic
def sqrt(typing, a):
    def lower(context, builder, sig, args):
        return builder.call(declared(builder, f"llvm.sqrt.{suffix(a)}", a.llvm, a.llvm), args)

    return a(a), lower


@intrinsic
def split_float(typing, a):
    """A positive normal number as a mantissa in [1, 2) and an exponent, both as vectors of numbers."""

    def lower(context, builder, sig, args):
        mantissa, bias = FORMAT[a.dtype]
        one = ir.Constant(a.llvm_bits, [bias << mantissa] * a.lanes)
        low = ir.Constant(a.llvm_bits, [(1 << mantissa) - 1] * a.lanes)
        bits = builder.bitcast(args[0], a.llvm_bits)
        fraction = builder.bitcast(builder.or_(builder.and_(bits, low), one), a.llvm)
        exponent = builder.lshr(bits, ir.Constant(a.llvm_bits, [mantissa] * a.lanes))
        number = builder.fsub(builder.uitofp(exponent, a.llvm), constant(a, float(bias)))
        return context.make_tuple(builder, sig.return_type, [fraction, number])

    from numba import types

    return types.UniTuple(a, 2)(a), lower


def from_library(name: str):
    """A function of the C library, called for each lane."""

    @intrinsic
    def function(typing, a):
        def lower(context, builder, sig, args):
            scalar = a.llvm.element
            symbol = name + "f" if a.dtype == "float32" else name
            callee = cgutils.get_or_insert_function(builder.module, ir.FunctionType(scalar, [scalar]), symbol)
            result = ir.Constant(a.llvm, ir.Undefined)
            for lane in range(a.lanes):
                value = builder.call(callee, [builder.extract_element(args[0], INT32(lane))])
                result = builder.insert_element(result, value, INT32(lane))
            return result

        return a(a), lower

    return function


def operations(dtype: str) -> dict:
    """The names that the functions above are bound over, beside those of `activations`."""
    high, low, terms = LIMITS[dtype]
    mantissa, bias = FORMAT[dtype]
    return {
        "EXP_HIGH": high,
        "EXP_LOW": low,
        "LOG2_E": math.log2(math.e),
        # From here on e^x - 1 is e^x to the last bit.
        "EXPM1_FAR": float(mantissa),
        "SQRT_2": math.sqrt(2),
        # The smallest normal number, and what brings smaller ones above it.
        "TINY": 2.0 ** (1 - bias),
        "TINY_SCALE": 2.0 ** (mantissa + 1),
        "TINY_EXPONENT": float(mantissa + 1),
        "LARGE": 2.0 ** (mantissa + 2),
        "LARGEST": (2.0 - 2.0**-mantissa) * 2.0**bias,
        "MINUS_INFINITY": -math.inf,
        "NOT_A_NUMBER": math.nan,
        "artanh_series": vector.polynomial([1 / (2 * k + 3) for k in range(terms)]),
        "where_equal": vector.where("=="),
        "abs": vector.magnitude,
        "sqrt": sqrt,
        "split_float": split_float,
        **{name: from_library(name) for name in ("sin", "cos", "erf")},
    }
