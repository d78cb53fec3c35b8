"""What products multiply: elements as they are, or pairs of bfloat16 numbers where the processor multiplies those.

A pair takes the place of one element: two terms of a sum that follow one another. So operands in pairs are half as
long: `TERMS` is 2 for them and else 1, and a sum of `depth` terms is `lines(depth)` elements long. The last pair of an
odd number ends with a zero. The caller's tensors, `given`, have the form of operands but for odd depths, unless they
are in half precision and the processor has no products of it; what the kernels computed themselves is float32.
"""

# ruff: noqa: F821

import functools

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from rnnfast_kernels.cpu.ir import halves
from rnnfast_kernels.cpu.ir.memory import load_first, load_io, loader
from rnnfast_kernels.cpu.ir.vector import Vec, declared, suffix
from rnnfast_kernels.cpu.target import Target


def fused_multiply_add(builder: ir.IRBuilder, target: Target, a: ir.Value, b: ir.Value, total: ir.Value) -> ir.Value:
    """Add the products of a's and b's terms to a sum."""
    if target.terms == 2:
        return halves.add_products(builder, a, b, total)
    vec = Vec(target.dtype, target.lanes)
    fused = declared(builder, f"llvm.fmuladd.{suffix(vec)}", vec.llvm, vec.llvm, vec.llvm, vec.llvm)
    return builder.call(fused, [a, b, total])


def load_io_terms(target: Target, builder: ir.IRBuilder, address: ir.Value, count: ir.Value) -> ir.Value:
    """Load a vector of terms that follow one another in a given tensor, the first `count`; the others are 0."""
    if target.terms == 1:
        return load_io(target, builder, address, count)
    bits = load_first(builder, Vec("int16", 2 * target.lanes), address, count)
    return builder.bitcast(bits, Vec(target.dtype, target.lanes).llvm)


def operations(target: Target) -> dict:
    """The functions of kernels that make operands, beside those below."""
    vec = Vec(target.dtype, target.lanes)

    @intrinsic
    def load_io_pairs(typing, first, second, count):
        """Pairs of one element at either address."""

        def lower(context, builder, sig, args):
            *addresses, lanes = args
            bits = [load_first(builder, Vec("int16", vec.lanes), address, lanes) for address in addresses]
            return halves.shuffled_in_turn(builder, *bits, vec.lanes)

        return vec(types.int64, types.int64, types.int64), lower

    def of_two(combine):
        @intrinsic
        def combined(typing, first, second):
            def lower(context, builder, sig, args):
                return combine(builder, *args)

            return vec(vec, vec), lower

        return combined

    return {
        "TERMS": target.terms,
        "load_io_terms": loader(vec, functools.partial(load_io_terms, target)),
        "load_io_pairs": load_io_pairs,
        "round_neighbours": of_two(halves.pairs),
        "round_in_turn": of_two(halves.pairs_in_turn),
    }


def lines(depth):
    return (depth + TERMS - 1) // TERMS


def copies_start(rows, scratch):
    """Where copies begin in memory that begins with their addresses."""
    return scratch + (8 * rows + VECTOR - 1) // VECTOR * VECTOR


def as_operands(rows, row_pointers, depth, scratch):
    """Where the addresses of rows in the form of operands are: `row_pointers`, or in `scratch` with copies of rows."""
    if TERMS == 1:
        return row_pointers
    stride = (lines(depth) + LANES - 1) // LANES * VECTOR
    copies = copies_start(rows, scratch)
    for row in range(rows):
        source = load_int(row_pointers + 8 * row)
        goal = copies + row * stride
        for k in range(0, depth, 2 * LANES):
            first = load(source + k * ACC_BYTES, depth - k)
            second = load(source + (k + LANES) * ACC_BYTES, depth - k - LANES)
            store(goal + k // 2 * ACC_BYTES, round_neighbours(first, second), LANES)
        store_int(scratch + 8 * row, goal)
    return scratch


def io_operands(rows, row_pointers, depth, scratch):
    """The same for rows of given tensors."""
    if IO_BYTES == ACC_BYTES:
        return as_operands(rows, row_pointers, depth, scratch)
    if IO_BYTES * TERMS == ACC_BYTES and depth % TERMS == 0:
        return row_pointers
    stride = (lines(depth) + LANES - 1) // LANES * VECTOR
    copies = copies_start(rows, scratch)
    for row in range(rows):
        source = load_int(row_pointers + 8 * row)
        goal = copies + row * stride
        for k in range(0, depth, TERMS * LANES):
            store(goal + k // TERMS * ACC_BYTES, load_io_terms(source + k * IO_BYTES, depth - k), LANES)
        store_int(scratch + 8 * row, goal)
    return scratch


def load_line(row_pointers, k, depth, unit, count):
    """The terms from number k on of several sums: elements from `unit` on of the rows at `row_pointers`."""
    first = load(load_int(row_pointers + 8 * k) + unit * ACC_BYTES, count)
    if TERMS == 1:
        return first
    second = load(load_int(row_pointers + 8 * (k + 1)) + unit * ACC_BYTES, count) if k + 1 < depth else zeros()
    return round_in_turn(first, second)


def load_io_line(row_pointers, k, depth, unit, count):
    """The same for rows of given tensors."""
    first = load_int(row_pointers + 8 * k) + unit * IO_BYTES
    if TERMS == 1:
        return load_io(first, count)
    if k + 1 < depth:
        return load_io_pairs(first, load_int(row_pointers + 8 * (k + 1)) + unit * IO_BYTES, count)
    return round_in_turn(load_io(first, count), zeros())


LINES = (lines, load_line, load_io_line)
ROWS = (copies_start, as_operands, io_operands)
