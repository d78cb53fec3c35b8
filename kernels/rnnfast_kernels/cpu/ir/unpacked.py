"""The product of a few rows with a weight that is not packed, as LLVM IR: a square of it is transposed at a time.

`multiplier(target)` gives the function

    multiply_unpacked(rows, row_pointers, weight, units, depth, bias, out, out_step)
        out[m] = bias + sum over k of left[m, k] * weight[:, k]

for up to `most_rows(target)` rows. `weight` and `bias` are the addresses of the first of `units` <= lanes units; a bias
of 0 is absent. The sums are those of `tile`, bit by bit.
"""

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from rnnfast_kernels.cpu.ir.memory import load_io, pointer, store_all
from rnnfast_kernels.cpu.ir.operands import fused_multiply_add, load_io_terms
from rnnfast_kernels.cpu.ir.tile import external, kind_of
from rnnfast_kernels.cpu.ir.transpose import transposed
from rnnfast_kernels.cpu.ir.vector import ELEMENT, INT64, Vec, splat
from rnnfast_kernels.cpu.target import MOST_UNPACKED_ROWS, Target


def most_rows(target: Target) -> int:
    """Rows that the product takes at once; none where weights are packed beforehand."""
    return 0 if target.format else MOST_UNPACKED_ROWS


def unpacked_name(target: Target, rows: int) -> str:
    return f"rnnfast_unpacked_{kind_of(target)}_{rows}"


def unpacked_function(module: ir.Module, target: Target, rows: int) -> ir.Function:
    """The product of `rows` with some units of a weight as it is, a square of it transposed at a time."""
    vec = Vec(target.dtype, target.lanes)
    function = external(module, unpacked_name(target, rows), 7)
    row_pointers, weight, units, depth, bias, out, out_step = function.args
    lanes, terms = vec.lanes, target.terms
    entry = function.append_basic_block("entry")
    head, body, rest, tail, done = (function.append_basic_block(s) for s in ("head", "body", "rest", "tail", "done"))
    builder = ir.IRBuilder(entry)
    left = [builder.load(pointer(builder, builder.add(row_pointers, INT64(8 * row)), INT64)) for row in range(rows)]
    # Units past the last are those of the last again; nobody reads their sums.
    last = builder.sub(units, INT64(1))
    unit_row = builder.mul(depth, INT64(target.io_bytes))
    unit_rows = [
        builder.mul(unit_row, builder.select(builder.icmp_signed("<", INT64(n), last), INT64(n), last))
        for n in range(lanes)
    ]
    known = builder.select(builder.icmp_signed("!=", bias, INT64(0)), units, INT64(0))
    initial = load_io(target, builder, bias, known)
    left_over = builder.srem(depth, INT64(lanes * terms))
    whole = builder.sub(depth, left_over)
    before = builder.block
    builder.branch(head)

    def add_square(k: ir.Value, sums: list[ir.Value], count: ir.Value) -> list[ir.Value]:
        """Add the `count` terms from k on; a square has no more than `lanes * terms`."""
        start = builder.mul(k, INT64(target.io_bytes))
        spots = [builder.add(builder.add(weight, start), row) for row in unit_rows]
        loaded = [load_io_terms(target, builder, spot, count) for spot in spots]
        line = builder.mul(builder.sdiv(k, INT64(terms)), INT64(vec.item))
        for j, column in enumerate(transposed(builder, vec, loaded)):
            here, place = None, INT64(j)
            if not isinstance(count, ir.Constant):
                here = builder.icmp_signed("<", INT64(j * terms), count)
                place = builder.select(here, INT64(j), INT64(0))
            at = builder.add(line, builder.mul(place, INT64(vec.item)))
            scalars = [builder.load(pointer(builder, builder.add(row, at), ELEMENT[vec.dtype])) for row in left]
            added = [
                fused_multiply_add(builder, target, splat(builder, scalar, lanes), column, old)
                for scalar, old in zip(scalars, sums, strict=True)
            ]
            if here is not None:
                added = [builder.select(here, new, old) for new, old in zip(added, sums, strict=True)]
            sums = added
        return sums

    builder.position_at_end(head)
    k = builder.phi(INT64)
    sums = [builder.phi(vec.llvm) for _ in range(rows)]
    builder.cbranch(builder.icmp_signed("<", k, whole), body, rest)

    builder.position_at_end(body)
    added = add_square(k, sums, INT64(lanes * terms))
    k.add_incoming(INT64(0), before)
    k.add_incoming(builder.add(k, INT64(lanes * terms)), builder.block)
    for total, new in zip(sums, added, strict=True):
        total.add_incoming(initial, before)
        total.add_incoming(new, builder.block)
    builder.branch(head)

    builder.position_at_end(rest)
    builder.cbranch(builder.icmp_signed(">", left_over, INT64(0)), tail, done)
    builder.position_at_end(tail)
    added = add_square(whole, sums, left_over)
    after_tail = builder.block
    builder.branch(done)

    builder.position_at_end(done)
    totals = [builder.phi(vec.llvm) for _ in range(rows)]
    for row, total in enumerate(totals):
        total.add_incoming(sums[row], rest)
        total.add_incoming(added[row], after_tail)
        store_all(builder, vec, builder.add(out, builder.mul(out_step, INT64(row))), total)
    builder.ret_void()
    return function


def multiplier(target: Target):
    """`multiply_unpacked` for a target."""

    @intrinsic
    def multiply_unpacked(typing, rows, row_pointers, weight, units, depth, bias, out, out_step):
        def lower(context, builder, sig, args):
            count, *operands = args
            end = builder.append_basic_block("multiplied")
            choice = builder.switch(count, end)
            for rows in range(1, most_rows(target) + 1):
                block = builder.append_basic_block(f"unpacked_{rows}")
                choice.add_case(INT64(rows), block)
                with builder.goto_block(block):
                    builder.call(external(builder.module, unpacked_name(target, rows), 7), operands)
                    builder.branch(end)
            builder.position_at_end(end)
            return context.get_dummy_value()

        return types.void(*[types.int64] * 8), lower

    return multiply_unpacked
