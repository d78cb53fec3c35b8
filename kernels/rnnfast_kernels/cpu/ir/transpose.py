"""The transposition of squares of a matrix, which packs its rows as the columns of a panel, as LLVM IR."""

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from rnnfast_kernels.cpu.ir.memory import store_all
from rnnfast_kernels.cpu.ir.operands import load_io_terms
from rnnfast_kernels.cpu.ir.tile import external, kind_of
from rnnfast_kernels.cpu.ir.vector import INT64, Vec
from rnnfast_kernels.cpu.target import Target


def interleave(builder: ir.IRBuilder, vec: Vec, a: ir.Value, b: ir.Value, half: int) -> tuple[ir.Value, ir.Value]:
    """The first, and the second, halves of a's and b's lanes, taken in turn in runs of `half` lanes."""
    lanes = vec.lanes

    def pick(offset: int) -> ir.Value:
        mask = []
        for lane in range(0, lanes, 2 * half):
            mask += [lane + offset + i for i in range(half)]
            mask += [lanes + lane + offset + i for i in range(half)]
        return builder.shuffle_vector(a, b, ir.Constant(ir.VectorType(ir.IntType(32), lanes), mask))

    return pick(0), pick(half)


def transposed(builder: ir.IRBuilder, vec: Vec, rows: list[ir.Value]) -> list[ir.Value]:
    """Transpose a square of vectors: swap the off-diagonal halves, then those of each half, down to single lanes."""
    half = vec.lanes // 2
    while half:
        for start in range(0, vec.lanes, 2 * half):
            for row in range(start, start + half):
                rows[row], rows[row + half] = interleave(builder, vec, rows[row], rows[row + half], half)
        half //= 2
    return rows


def transpose_name(target: Target) -> str:
    return f"rnnfast_transpose_{kind_of(target)}"


def transpose_function(module: ir.Module, target: Target) -> ir.Function:
    """out[k, i] = the k-th terms of source[i] up to `columns`, for i < lanes; 0 for i >= rows. Steps are in bytes."""
    vec = Vec(target.dtype, target.lanes)
    function = external(module, transpose_name(target), 6)
    source, source_step, rows, columns, out, out_step = function.args
    builder = ir.IRBuilder(function.append_basic_block("entry"))
    loaded = []
    for row in range(vec.lanes):
        count = builder.select(builder.icmp_signed("<", INT64(row), rows), columns, INT64(0))
        spot = builder.add(source, builder.mul(source_step, INT64(row)))
        loaded.append(load_io_terms(target, builder, spot, count))
    for k, column in enumerate(transposed(builder, vec, loaded)):
        with builder.if_then(builder.icmp_signed("<", INT64(k * target.terms), columns)):
            store_all(builder, vec, builder.add(out, builder.mul(out_step, INT64(k))), column)
    builder.ret_void()
    return function


def transposer(target: Target):
    """`transpose_square`, which packs `lanes` rows of a matrix as the columns of a panel."""

    @intrinsic
    def transpose_square(typing, source, source_step, rows, columns, out, out_step):
        def lower(context, builder, sig, args):
            builder.call(external(builder.module, transpose_name(target), 6), args)
            return context.get_dummy_value()

        return types.void(*[types.int64] * 6), lower

    return transpose_square
