"""The register-tiled product, and the transposition that packs its operand, as LLVM IR.

A panel is the right operand's [depth, N vectors] part, with one row of initial values (a bias) before it, packed so
that it is read in order: as strips of `target.strip(N)` vectors, one after another, the last of which may be narrower.
`multiplier(target, ...)` gives the function

    multiply(N, rows, row_pointers, step, panel, depth, nth, out)
        out[m, n] = panel[0, n] + sum over k of left[m, k] * panel[1 + k, n]

`row_pointers` is the address of `rows` int64 addresses, one for each row of the left operand. Elements of a row are
`step` bytes apart, an element or a vector, so that a row may be a column of a matrix. `out` is [rows, N vectors]. An
element of an operand may stand for two terms of the sum (see `operands`); `depth` counts elements.

Panels that leave the second-level cache between two steps would be read from memory in the time of a panel's first
tile. So the `nth` tile of a panel also asks for the nth part of the panel after it, a cache line for each of its lines.

The sum runs over k in order, in one register, whatever the number of rows: an element of the result does not depend
on how the product was tiled.
"""

import itertools
from collections.abc import Iterator

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from rnnfast_kernels.cpu.ir import held, int8
from rnnfast_kernels.cpu.ir.memory import (
    CACHE_LINE,
    PREFETCHING_ROWS,
    load_all,
    load_io,
    pointer,
    prefetch,
    store_all,
)
from rnnfast_kernels.cpu.ir.operands import fused_multiply_add, load_io_terms
from rnnfast_kernels.cpu.ir.vector import ELEMENT, INT64, Vec, splat
from rnnfast_kernels.cpu.target import MOST_UNPACKED_ROWS, Target

# Arguments of the function of a tile: see `multiply`; the last are the address to prefetch from, `out` and its step.
TILE_ARGUMENTS = 7


def external(module: ir.Module, name: str, arguments: int) -> ir.Function:
    """A function of int64 arguments that `library` defines."""
    if name not in module.globals:
        ir.Function(module, ir.FunctionType(ir.VoidType(), [INT64] * arguments), name)
    return module.globals[name]


def kind_of(target: Target) -> str:
    return f"{target.io}_{target.dtype}x{target.lanes}x{target.terms}{target.weights}"


def tile_name(target: Target, rows: int, vectors: int) -> str:
    return f"rnnfast_tile_{kind_of(target)}_{rows}x{vectors}"


def tile_function(module: ir.Module, target: Target, rows: int, vectors: int) -> ir.Function:
    """The product for one tile of `rows` x `vectors` registers; `out_step` bytes lie between two rows of the result."""
    vec = Vec(target.dtype, target.lanes)
    function = external(module, tile_name(target, rows, vectors), TILE_ARGUMENTS)
    if target.weights:
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
    def multiply(typing, vectors, rows, row_pointers, step, panel, depth, nth, out):
        def lower(context, builder, sig, args):
            width, count, row_pointers, step, panel, depth, nth, out = args
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
                    ahead = builder.add(builder.add(panel, builder.mul(lines, out_step)), place)
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

        return types.void(*[types.int64] * 8), lower

    return multiply


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


def unpacked_multiplier(target: Target):
    """`multiply_unpacked`, for up to `MOST_UNPACKED_ROWS` rows.

        multiply_unpacked(rows, row_pointers, weight, units, depth, bias, out, out_step)
            out[m] = bias + sum over k of left[m, k] * weight[:, k]

    `weight` and `bias` are the addresses of the first of `units` <= lanes units; a bias of 0 is absent. The sums are
    those of `multiply`, bit by bit.
    """

    @intrinsic
    def multiply_unpacked(typing, rows, row_pointers, weight, units, depth, bias, out, out_step):
        def lower(context, builder, sig, args):
            count, *operands = args
            end = builder.append_basic_block("multiplied")
            choice = builder.switch(count, end)
            for rows in range(1, MOST_UNPACKED_ROWS + 1):
                block = builder.append_basic_block(f"unpacked_{rows}")
                choice.add_case(INT64(rows), block)
                with builder.goto_block(block):
                    builder.call(external(builder.module, unpacked_name(target, rows), 7), operands)
                    builder.branch(end)
            builder.position_at_end(end)
            return context.get_dummy_value()

        return types.void(*[types.int64] * 8), lower

    return multiply_unpacked


def library(target: Target, gates: set[int]) -> ir.Module:
    """All functions that the intrinsics above call, for panels of these numbers of gates.

    They are a module of their own because Numba optimises what a function contains again for each of its callers.
    """
    module = ir.Module("rnnfast")
    if target.weights == "int8":
        int8.quantise_function(module, target)
    if not target.weights:
        transpose_function(module, target)
    shapes = set()
    for vectors, rows, each in itertools.chain.from_iterable(tiles(target, g) for g in gates):
        shapes |= {(rows, each), (rows, (vectors - 1) % each + 1)}
    for rows, vectors in sorted(shapes):
        tile_function(module, target, rows, vectors)
    if not target.weights:
        for rows in range(1, MOST_UNPACKED_ROWS + 1):
            unpacked_function(module, target, rows)
    return module
