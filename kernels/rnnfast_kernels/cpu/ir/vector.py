"""A Numba type for one vector register, so that kernels do not depend on what a compiler vectorises by itself.

`Vec` behaves like a float: + - * /, negation, and mixing with literals, which take the vector's element type.

Arithmetic may be contracted to fused multiply-adds. It is never reassociated and never assumes finite numbers: NaN and
infinity mean what they mean in torch.
"""

import operator

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.core.typing.templates import AbstractTemplate, infer_global, signature
from numba.extending import intrinsic, lower_builtin, models, register_model

FLAGS = ("contract",)
# An int16 stands for a number of half precision in memory, and takes no part in arithmetic.
ELEMENT = {"float32": ir.FloatType(), "float64": ir.DoubleType(), "int16": ir.IntType(16)}
BYTES = {"float32": 4, "float64": 8, "int16": 2}
INTEGER = {"float32": ir.IntType(32), "float64": ir.IntType(64)}
# Mantissa bits, and the bias of the exponent.
FORMAT = {"float32": (23, 127), "float64": (52, 1023)}
INT32, INT64 = ir.IntType(32), ir.IntType(64)


class Vec(types.Type):
    """`lanes` elements of `dtype`."""

    def __init__(self, dtype: str, lanes: int):
        self.dtype, self.lanes = dtype, lanes
        super().__init__(name=f"Vec({dtype}x{lanes})")

    @property
    def item(self) -> int:
        return BYTES[self.dtype]

    @property
    def llvm(self) -> ir.VectorType:
        return ir.VectorType(ELEMENT[self.dtype], self.lanes)

    @property
    def llvm_bits(self) -> ir.VectorType:
        return ir.VectorType(INTEGER[self.dtype], self.lanes)


@register_model(Vec)
class VecModel(models.PrimitiveModel):
    def __init__(self, manager, vec):
        super().__init__(manager, vec, vec.llvm)


def splat(builder: ir.IRBuilder, scalar: ir.Value, lanes: int) -> ir.Value:
    """Copy a scalar to every lane."""
    single = builder.insert_element(ir.Constant(ir.VectorType(scalar.type, lanes), ir.Undefined), scalar, INT32(0))
    return builder.shuffle_vector(single, single, ir.Constant(ir.VectorType(INT32, lanes), [0] * lanes))


def constant(vec: Vec, number: float) -> ir.Constant:
    return ir.Constant(vec.llvm, [number] * vec.lanes)


def declared(builder: ir.IRBuilder, name: str, result: ir.Type, *arguments: ir.Type) -> ir.Function:
    """Declare a function that LLVM has, or that another module defines."""
    return cgutils.get_or_insert_function(builder.module, ir.FunctionType(result, arguments), name)


def suffix(vec: Vec) -> str:
    """What LLVM calls the type in the names of its functions."""
    return f"v{vec.lanes}{vec.dtype[0]}{8 * vec.item}"


def element(context, builder: ir.IRBuilder, kind: types.Type, value: ir.Value, vec: Vec) -> ir.Value:
    """Lower an operand: a vector as it is, a number as the vector that repeats it."""
    if isinstance(kind, Vec):
        return value
    scalar = context.cast(builder, value, kind, getattr(types, vec.dtype))
    return splat(builder, scalar, vec.lanes)


def infer_arithmetic(symbol):
    """Type `symbol` over two vectors, or a vector and a number."""

    class Arithmetic(AbstractTemplate):
        def generic(self, args, kws):
            vecs = [kind for kind in args if isinstance(kind, Vec)]
            others = [kind for kind in args if not isinstance(kind, Vec)]
            if (
                vecs
                and all(kind == vecs[0] for kind in vecs)
                and all(isinstance(kind, types.Number) for kind in others)
            ):
                return signature(vecs[0], *args)
            return None

    infer_global(symbol)(Arithmetic)


def lower_arithmetic(symbol, instruction: str, *kinds) -> None:
    """Lower `symbol` to one LLVM instruction."""

    @lower_builtin(symbol, *kinds)
    def lower(context, builder, sig, args):
        vec = sig.return_type
        operands = [element(context, builder, kind, value, vec) for kind, value in zip(sig.args, args, strict=True)]
        return getattr(builder, instruction)(*operands, flags=FLAGS)


for symbol, instruction, arity in (
    (operator.add, "fadd", 2),
    (operator.sub, "fsub", 2),
    (operator.mul, "fmul", 2),
    (operator.truediv, "fdiv", 2),
    (operator.neg, "fneg", 1),
):
    infer_arithmetic(symbol)
    lower_arithmetic(symbol, instruction, *([Vec] * arity))
    if arity == 2:
        lower_arithmetic(symbol, instruction, Vec, types.Number)
        lower_arithmetic(symbol, instruction, types.Number, Vec)


def where(relation: str):
    """A selection by comparison; a comparison with NaN is false."""

    @intrinsic
    def select(typing, a, b, yes, no):
        def lower(context, builder, sig, args):
            vec = sig.return_type
            left, right, chosen, other = (
                element(context, builder, kind, value, vec) for kind, value in zip(sig.args, args, strict=True)
            )
            return builder.select(builder.fcmp_ordered(relation, left, right), chosen, other)

        vec = next(kind for kind in (a, b, yes, no) if isinstance(kind, Vec))
        return vec(a, b, yes, no), lower

    return select


where_greater = where(">")
where_at_most = where("<=")


def polynomial(coefficients: list[float]):
    """A polynomial by Horner's rule, its constant coefficient first."""

    @intrinsic
    def evaluate(typing, a):
        def lower(context, builder, sig, args):
            value = constant(a, coefficients[-1])
            for coefficient in reversed(coefficients[:-1]):
                product = builder.fmul(value, args[0], flags=FLAGS)
                value = builder.fadd(product, constant(a, coefficient), flags=FLAGS)
            return value

        return a(a), lower

    return evaluate


def sign_mask(vec: Vec) -> ir.Constant:
    return ir.Constant(vec.llvm_bits, [1 << (8 * vec.item - 1)] * vec.lanes)


@intrinsic
def magnitude(typing, a):
    """Absolute value."""

    def lower(context, builder, sig, args):
        bits = builder.bitcast(args[0], a.llvm_bits)
        return builder.bitcast(builder.and_(bits, builder.not_(sign_mask(a))), a.llvm)

    return a(a), lower


@intrinsic
def with_sign_of(typing, size, sign):
    """`size`, which is not negative, with the sign of `sign`."""

    def lower(context, builder, sig, args):
        size_bits, sign_bits = (builder.bitcast(value, size.llvm_bits) for value in args)
        return builder.bitcast(builder.or_(size_bits, builder.and_(sign_bits, sign_mask(size))), size.llvm)

    return size(size, sign), lower


@intrinsic
def power_of_two(typing, shifted):
    """2**n, where `shifted` is n + round_shift: the low bits of its mantissa are the biased exponent."""

    def lower(context, builder, sig, args):
        mantissa, _ = FORMAT[shifted.dtype]
        bits = builder.bitcast(args[0], shifted.llvm_bits)
        places = ir.Constant(shifted.llvm_bits, [mantissa] * shifted.lanes)
        return builder.bitcast(builder.shl(bits, places), shifted.llvm)

    return shifted(shifted), lower


def round_shift(dtype: str) -> float:
    """Adding this to a small x rounds x to an integer n and leaves n + bias in the low bits of the mantissa."""
    mantissa, bias = FORMAT[dtype]
    return float(3 * 2 ** (mantissa - 1) + bias)


@intrinsic
def zeros_like(typing, a):
    def lower(context, builder, sig, args):
        return constant(a, 0.0)

    return a(a), lower
