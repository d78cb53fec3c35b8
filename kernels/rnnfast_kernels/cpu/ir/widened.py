"""Products of float32 rows with bfloat16 weights, which are widened in registers.

A pair of terms takes the place of one float32 element of a panel. Rows stay float32: a pair of terms is two elements.
"""

# ruff: noqa: F821

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from rnnfast_kernels.cpu.ir.memory import pointer
from rnnfast_kernels.cpu.ir.operands import copies_start
from rnnfast_kernels.cpu.ir.vector import ELEMENT, INT32, INT64, Vec, declared, splat, suffix


def both(builder: ir.IRBuilder, pairs: ir.Value) -> tuple[ir.Value, ir.Value]:
    """The first and the second terms of a vector of pairs, as float32."""
    kind = ir.VectorType(INT32, pairs.type.count)
    bits = builder.bitcast(pairs, kind)
    first = builder.shl(bits, ir.Constant(kind, [16] * kind.count))
    second = builder.and_(bits, ir.Constant(kind, [0xFFFF0000] * kind.count))
    return builder.bitcast(first, pairs.type), builder.bitcast(second, pairs.type)


def add_products(builder: ir.IRBuilder, vec: Vec, place: ir.Value, columns, totals) -> list[ir.Value]:
    """Add to each column's sum its products with the two numbers at `place`, in order."""
    fused = declared(builder, f"llvm.fmuladd.{suffix(vec)}", vec.llvm, vec.llvm, vec.llvm, vec.llvm)
    for term in range(2):
        spot = builder.add(place, INT64(4 * term))
        wide = splat(builder, builder.load(pointer(builder, spot, ELEMENT["float32"])), vec.lanes)
        pairs = zip(columns, totals, strict=True)
        totals = [builder.call(fused, [wide, column[term], total]) for column, total in pairs]
    return totals


def operations() -> dict:
    """What kernels over held weights call in place of the function of the same name for others."""

    @intrinsic
    def multiply_unpacked(typing, rows, row_pointers, weight, units, depth, bias, out, out_step):
        """Held weights are packed always."""

        def lower(context, builder, sig, args):
            return context.get_dummy_value()

        return types.void(*[types.int64] * 8), lower

    return {"multiply_unpacked": multiply_unpacked}


def as_operands(rows, row_pointers, depth, room):
    """Where the addresses of rows of whole pairs are: `row_pointers`, or in `room` with copies that end with a zero."""
    if depth % 2 == 0:
        return row_pointers
    stride = 2 * ((lines(depth) + LANES - 1) // LANES * VECTOR)
    goal = copies_start(rows, room)
    for row in range(rows):
        source = load_int(row_pointers + 8 * row)
        for k in range(0, depth, LANES):
            store(goal + k * ACC_BYTES, load(source + k * ACC_BYTES, depth - k), LANES)
        store(goal + depth * ACC_BYTES, zeros(), 1)
        store_int(room + 8 * row, goal)
        goal += stride
    return room


def io_operands(rows, row_pointers, depth, room):
    """The same for rows of given tensors."""
    return as_operands(rows, row_pointers, depth, room)


ROWS = (copies_start, as_operands, io_operands)
