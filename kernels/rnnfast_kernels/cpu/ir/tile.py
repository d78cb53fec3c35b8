"""The register-tiled product, as LLVM IR.

A panel is the right operand's [depth, N vectors] part, with one row of initial values (a bias) before it, packed so
that it is read in order: as strips of `target.strip(N)` vectors, one after another, the last of which may be narrower.
`multiplier(target, ...)` gives the function

    multiply(N, rows, row_pointers, step, panel, depth, ahead, nth, out)
        out[m, n] = panel[0, n] + sum over k of left[m, k] * panel[1 + k, n]

`row_pointers` is the address of `rows` int64 addresses, one for each row of the left operand. Elements of a row are
`step` bytes apart, an element or a vector, so that a row may be a column of a matrix. `out` is [rows, N vectors]. An
element of an operand may stand for two terms of the sum (see `operands`); `depth` counts elements.

Panels that leave the second-level cache between two steps would be read from memory in the time of a panel's first
tile. So the `nth` tile of a panel also asks for the nth part of the next one, which is at `ahead`: a cache line for
each of its own lines.

The sum runs over k in order, in one register, whatever the number of rows: an element of the result does not depend
on how the product was tiled.
"""

import itertools
from collections.abc import Iterator

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from rnnfast_kernels.cpu.ir import held
from rnnfast_kernels.cpu.ir.memory import CACHE_LINE, PREFETCHING_ROWS, load_all, pointer, prefetch, store_all
from rnnfast_kernels.cpu.ir.operands import fused_multiply_add
from rnnfast_kernels.cpu.ir.vector import ELEMENT, INT64, Vec, splat
from rnnfast_kernels.cpu.target import Target

# Arguments of the function of a tile: see `multiply`; the last are the address to prefetch from, `out` and its step.
TILE_ARGUMENTS = 7


def external(module: ir.Module, name: str, arguments: int) -> ir.Function:
    """A function of int64 arguments that is defined in the module of `library`."""
    return cgutils.get_or_insert_function(module, ir.FunctionType(ir.VoidType(), [INT64] * arguments), name)


def kind_of(target: Target) -> str:
    """The part of functions' names that tells targets apart."""
    weights = target.format.name if target.format else ""
    return f"{target.io}_{target.dtype}x{target.lanes}x{target.terms}{weights}"


def tile_name(target: Target, rows: int, vectors: int) -> str:
    return f"rnnfast_tile_{kind_of(target)}_{rows}x{vectors}"


def tile_function(module: ir.Module, target: Target, rows: int, vectors: int) -> ir.Function:
    """The product for one tile of `rows` x `vectors` registers; `out_step` bytes lie between two rows of the result."""
    vec = Vec(target.dtype, target.lanes)
    function = external(module, tile_name(target, rows, vectors), TILE_ARGUMENTS)
    if target.format:
        held.define_tile(function, target, rows, vectors)
        return function
    row_pointers, step, panel, depth, ahead, out, out_step = function.args
    builder = ir.IRBuilder(function.append_basic_block("entry"))
    left = [builder.load(pointer(builder, builder.add(row_pointers, INT64(8 * row)), INT64)) for row in range(rows)]
    strip = target.strip(vectors)
    strip_bytes = builder.mul(builder.add(depth, INT64(1)), INT64(target.vector * strip))
    strips = [builder.add(panel, builder.mul(strip_bytes, INT64(n))) for n in range(-(-vectors // strip))]
    widths = [min(strip, vectors - strip * n) for n in range(len(strips))]

    def load_line(line: ir.Value) -> list[ir.Value]:
        spots = [
            builder.add(s, builder.mul(line, INT64(target.vector * w))) for s, w in zip(strips, widths, strict=True)
        ]
        return [
            load_all(builder, vec, builder.add(spots[n // strip], INT64(target.vector * (n % strip))))
            for n in range(vectors)
        ]

    def add_lines(k: ir.Value, sums: list[ir.Value], step: ir.Value, at_once: int) -> tuple[ir.Value, list[ir.Value]]:
        """Add the terms from k on, `at_once` lines in one round of a loop, while so many are left."""
        before = builder.block
        head, body, rest = (function.append_basic_block(label) for label in ("head", "body", "rest"))
        builder.branch(head)
        builder.position_at_end(head)
        k_now, now = builder.phi(INT64), [builder.phi(vec.llvm) for _ in sums]
        builder.cbranch(builder.icmp_signed("<=", builder.add(k_now, INT64(at_once)), depth), body, rest)
        builder.position_at_end(body)
        new = now
        for i in range(at_once):
            line = builder.add(k_now, INT64(i))
            columns = load_line(builder.add(line, INT64(1)))
            if rows >= PREFETCHING_ROWS:
                prefetch(builder, builder.add(ahead, builder.mul(line, INT64(CACHE_LINE))))
            offset = builder.mul(line, step)
            added = []
            for row in range(rows):
                scalar = builder.load(pointer(builder, builder.add(left[row], offset), ELEMENT[vec.dtype]))
                wide = splat(builder, scalar, vec.lanes)
                before_row = new[row * vectors : (row + 1) * vectors]
                added += [
                    fused_multiply_add(builder, target, wide, column, total)
                    for column, total in zip(columns, before_row, strict=True)
                ]
            new = added
        k_next = builder.add(k_now, INT64(at_once))
        builder.branch(head)
        for phi, start, following in zip([k_now, *now], [k, *sums], [k_next, *new], strict=True):
            phi.add_incoming(start, before)
            phi.add_incoming(following, body)
        builder.position_at_end(rest)
        return k_now, now

    def finish(sums: list[ir.Value]) -> None:
        for row in range(rows):
            goal = builder.add(out, builder.mul(out_step, INT64(row)))
            for n in range(vectors):
                store_all(builder, vec, builder.add(goal, INT64(target.vector * n)), sums[row * vectors + n])
        builder.ret_void()

    sums = load_line(INT64(0)) * rows
    if target.unroll == 1:
        finish(add_lines(INT64(0), sums, step, 1)[1])
        return function
    adjacent = builder.icmp_signed("==", step, INT64(vec.item))
    with builder.if_then(adjacent):
        finish(add_lines(*add_lines(INT64(0), sums, INT64(vec.item), target.unroll), INT64(vec.item), 1)[1])
    finish(add_lines(*add_lines(INT64(0), sums, INT64(target.vector), target.unroll), INT64(target.vector), 1)[1])
    return function


def tiles(target: Target, gates: int) -> Iterator[tuple[int, int, int]]:
    """Panel widths, rows, and the vectors that one tile takes: the whole panel where the registers hold so much."""
    for vectors, rows in itertools.product(target.widths(gates), range(1, target.rows(gates) + 1)):
        yield vectors, rows, vectors if target.fits(rows, vectors) else target.strip(vectors)


def multiplier(target: Target, gates: int):
    """`multiply` for panels of so many gates, and any number of rows from 1 to `target.rows(gates)`."""
    most_rows = target.rows(gates)

    @intrinsic
    def multiply(typing, vectors, rows, row_pointers, step, panel, depth, ahead, nth, out):
        def lower(context, builder, sig, args):
            width, count, row_pointers, step, panel, depth, following, nth, out = args
            lines = builder.add(depth, INT64(target.head))
            part = builder.mul(depth, INT64(CACHE_LINE))
            end = builder.append_basic_block("multiplied")
            choice = builder.switch(builder.add(builder.mul(width, INT64(most_rows + 1)), count), end)
            for vectors, rows, each in tiles(target, gates):
                block = builder.append_basic_block(f"tile_{rows}x{vectors}")
                choice.add_case(INT64(vectors * (most_rows + 1) + rows), block)
                with builder.goto_block(block):
                    out_step = INT64(vectors * target.vector)
                    strips = range(0, vectors, each)
                    # Tiles that ask for the whole panel between them.
                    turns = max(1, vectors * target.vector // (CACHE_LINE * len(strips)))
                    place = builder.mul(builder.urem(nth, INT64(turns)), builder.mul(part, INT64(len(strips))))
                    ahead = builder.add(following, place)
                    for first in strips:
                        name = tile_name(target, rows, min(each, vectors - first))
                        tile = external(builder.module, name, TILE_ARGUMENTS)
                        strip = builder.add(panel, builder.mul(lines, INT64(first * target.vector)))
                        goal = builder.add(out, INT64(first * target.vector))
                        builder.call(tile, [row_pointers, step, strip, depth, ahead, goal, out_step])
                        ahead = builder.add(ahead, part)
                    builder.branch(end)
            builder.position_at_end(end)
            return context.get_dummy_value()

        return types.void(*[types.int64] * 9), lower

    return multiply
