"""Products of float32 rows with bfloat16 weights, which are widened in registers (see `held.Products`).

A pair of terms takes the place of one float32 element of a panel. Rows stay float32: a pair of terms is two elements.
"""

# ruff: noqa: F821

from llvmlite import ir

from rnnfast_kernels.cpu.ir.memory import pointer
from rnnfast_kernels.cpu.ir.vector import ELEMENT, INT32, INT64, Vec, declared, splat, suffix
from rnnfast_kernels.cpu.target import Target

EXACT = False


def operations(target: Target) -> dict:
    return {}


def define(module: ir.Module, target: Target) -> None:
    """There is nothing to define."""


def sum_type(target: Target) -> ir.VectorType:
    return Vec("float32", target.lanes).llvm


def as_factors(builder: ir.IRBuilder, columns: list[ir.Value]) -> list[tuple[ir.Value, ir.Value]]:
    return [both(builder, column) for column in columns]


def both(builder: ir.IRBuilder, pairs: ir.Value) -> tuple[ir.Value, ir.Value]:
    """The first and the second terms of a vector of pairs, as float32."""
    kind = ir.VectorType(INT32, pairs.type.count)
    bits = builder.bitcast(pairs, kind)
    first = builder.shl(bits, ir.Constant(kind, [16] * kind.count))
    second = builder.and_(bits, ir.Constant(kind, [0xFFFF0000] * kind.count))
    return builder.bitcast(first, pairs.type), builder.bitcast(second, pairs.type)


def add_products(
    builder: ir.IRBuilder, target: Target, place: ir.Value, factors: list, sums: list[ir.Value]
) -> list[ir.Value]:
    """Add to each sum its products with the two numbers at `place`, in order."""
    vec = Vec("float32", target.lanes)
    fused = declared(builder, f"llvm.fmuladd.{suffix(vec)}", vec.llvm, vec.llvm, vec.llvm, vec.llvm)
    for term in range(2):
        spot = builder.add(place, INT64(4 * term))
        wide = splat(builder, builder.load(pointer(builder, spot, ELEMENT["float32"])), vec.lanes)
        pairs = zip(factors, sums, strict=True)
        sums = [builder.call(fused, [wide, factor[term], total]) for factor, total in pairs]
    return sums


def results(
    builder: ir.IRBuilder, target: Target, row: ir.Value, sums: list[ir.Value], lines: list[list[ir.Value]]
) -> list[ir.Value]:
    """The sums are the results."""
    return sums


def as_operands(rows, row_pointers, depth, scratch):
    """Where the addresses of rows of whole pairs are: `row_pointers`, or `scratch` with copies that end with a zero."""
    if depth % 2 == 0:
        return row_pointers
    stride = 2 * ((lines(depth) + LANES - 1) // LANES * VECTOR)
    goal = copies_start(rows, scratch)
    for row in range(rows):
        source = load_int(row_pointers + 8 * row)
        for k in range(0, depth, LANES):
            store(goal + k * ACC_BYTES, load(source + k * ACC_BYTES, depth - k), LANES)
        store(goal + depth * ACC_BYTES, zeros(), 1)
        store_int(scratch + 8 * row, goal)
        goal += stride
    return scratch
