"""Products of int8 numbers: rows quantised as they are read, sums in int32, results in float32.

A weight w[n, k] is q[n, k] * scale[n], a row x[k] of the left operand a[k] * s with s = max |x| / 127:

    out[n] = (sum over k of a[k] * q[n, k]) * (s * scale[n]) + bias[n]

Four terms, a quad, take the place of one float32 element. A panel's vectors of initial values are followed by one of
scales and one of biases. The scale s of a row stands in the four bytes before its quads.

The sums are exact, and what follows them is never contracted, so results are equal on all processors. `vpdpbusd`
multiplies unsigned by signed numbers: there the row holds a + 128, and sums start at -128 * (sum over k of q[n, k]).
"""

# ruff: noqa: F821

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from rnnfast_kernels.cpu.ir.memory import load_first, pointer
from rnnfast_kernels.cpu.ir.vector import INT32, INT64, Vec, declared, splat
from rnnfast_kernels.cpu.target import Target

BYTE = ir.IntType(8)
FLOAT = ir.FloatType()
# Adding this to a number rounds it to an integer, which the lowest bits of the sum then hold.
ROUND = 12582912.0
# What a row's largest magnitude is at least taken to be. Its inverse is finite.
SMALLEST = 127 * 2.0**-126
INFINITY_BITS = 0x7F800000
# Sums have no rounding.
EXACT = True


def integers(lanes: int) -> ir.VectorType:
    return ir.VectorType(INT32, lanes)


def repeated(number: int, lanes: int, bits: int = 32) -> ir.Constant:
    """The number in every lane."""
    return ir.Constant(ir.VectorType(ir.IntType(bits), lanes), [number] * lanes)


def sum_type(target: Target) -> ir.VectorType:
    return integers(target.lanes)


def as_factors(builder: ir.IRBuilder, columns: list[ir.Value]) -> list[ir.Value]:
    return [builder.bitcast(column, integers(column.type.count)) for column in columns]


def add_products(
    builder: ir.IRBuilder, target: Target, place: ir.Value, factors: list[ir.Value], sums: list[ir.Value]
) -> list[ir.Value]:
    """Add to each int32 lane the products of the four numbers at `place` with its own four."""
    add = {
        "vpdpbusd": add_vpdpbusd,
        "amx": add_vpdpbusd,
        "vpmaddubsw": add_vpmaddubsw,
        "vpmaddwd": add_vpmaddwd,
        "sdot": add_sdot,
        "plain": add_plain,
    }[target.dot]
    quad = splat(builder, builder.load(pointer(builder, place, INT32), align=1), target.lanes)
    return [add(builder, quad, factor, total) for factor, total in zip(factors, sums, strict=True)]


def add_vpdpbusd(builder, a, w, total):
    kind = total.type
    name = f"llvm.x86.avx512.vpdpbusd.{32 * kind.count}"
    return builder.call(declared(builder, name, kind, kind, kind, kind), [total, a, w])


def add_vpmaddubsw(builder, a, w, total):
    """|a| times w with the sign of a; as neither is -128, pairs of products fit 16 bits."""
    count = total.type.count
    byte_kind, word_kind = ir.VectorType(BYTE, 4 * count), ir.VectorType(ir.IntType(16), 2 * count)
    a, w = builder.bitcast(a, byte_kind), builder.bitcast(w, byte_kind)
    size = builder.call(
        declared(builder, f"llvm.abs.v{4 * count}i8", byte_kind, byte_kind, ir.IntType(1)), [a, ir.IntType(1)(1)]
    )
    signed = builder.call(declared(builder, "llvm.x86.avx2.psign.b", byte_kind, byte_kind, byte_kind), [w, a])
    pairs = builder.call(
        declared(builder, "llvm.x86.avx2.pmadd.ub.sw", word_kind, byte_kind, byte_kind), [size, signed]
    )
    name = "llvm.x86.avx2.pmadd.wd"
    quads = builder.call(declared(builder, name, total.type, word_kind, word_kind), [pairs, repeated(1, 2 * count, 16)])
    return builder.add(total, quads)


def add_vpmaddwd(builder, a, w, total):
    """The first and third numbers of each quad, then the second and fourth, in 16 bits."""
    kind = ir.VectorType(ir.IntType(16), 2 * total.type.count)
    eight = repeated(8, kind.count, 16)
    dot = declared(builder, "llvm.x86.avx512.pmaddw.d.512", total.type, kind, kind)
    words = [builder.bitcast(each, kind) for each in (a, w)]
    even = [builder.ashr(builder.shl(each, eight), eight) for each in words]
    odd = [builder.ashr(each, eight) for each in words]
    return builder.add(builder.add(total, builder.call(dot, even)), builder.call(dot, odd))


def add_sdot(builder, a, w, total):
    kind = ir.VectorType(BYTE, 4 * total.type.count)
    name = f"llvm.aarch64.neon.sdot.v{total.type.count}i32.v{kind.count}i8"
    dot = declared(builder, name, total.type, total.type, kind, kind)
    return builder.call(dot, [total, builder.bitcast(a, kind), builder.bitcast(w, kind)])


def add_plain(builder, a, w, total):
    lanes = total.type.count
    last = repeated(24, lanes)
    for place in range(4):
        left = repeated(24 - 8 * place, lanes)
        first, second = (builder.ashr(builder.shl(each, left), last) for each in (a, w))
        total = builder.add(total, builder.mul(first, second))
    return total


def results(
    builder: ir.IRBuilder, target: Target, row: ir.Value, sums: list[ir.Value], lines: list[list[ir.Value]]
) -> list[ir.Value]:
    """Each sum times the scales of the row and of the weight's rows, plus the bias. lines: scales and biases."""
    scale = builder.load(pointer(builder, builder.sub(row, INT64(4)), FLOAT), align=1)
    wide, vec = splat(builder, scale, target.lanes), Vec("float32", target.lanes)
    return [
        builder.fadd(builder.fmul(builder.sitofp(total, vec.llvm), builder.fmul(wide, column)), bias)
        for total, column, bias in zip(sums, *lines, strict=True)
    ]


def quantise_name(target: Target) -> str:
    return f"rnnfast_quantise_{target.lanes}_{target.dot}"


def define(module: ir.Module, target: Target) -> None:
    """Define quantise(source, depth, goal): a row of float32 as quads at `goal`, and its scale before them.

    A row with NaN or infinity has NaN for a scale. One of less than 2**-126 is zero.
    """
    kind = ir.FunctionType(ir.VoidType(), [INT64] * 3)
    function = ir.Function(module, kind, quantise_name(target))
    source, depth, goal = function.args
    lanes, vec = target.lanes, Vec("float32", target.lanes)
    builder = ir.IRBuilder(function.append_basic_block("entry"))
    magnitude = repeated(0x7FFFFFFF, lanes)

    def each_vector(*starts: ir.Value):
        """A loop over vectors of the row: the values, where they begin, and phis of what is carried along."""
        before = builder.block
        head, body, rest = (function.append_basic_block(label) for label in ("head", "body", "rest"))
        builder.branch(head)
        builder.position_at_end(head)
        k, carried = builder.phi(INT64), [builder.phi(start.type) for start in starts]
        k.add_incoming(INT64(0), before)
        builder.cbranch(builder.icmp_signed("<", k, depth), body, rest)
        builder.position_at_end(body)
        values = load_first(builder, vec, builder.add(source, builder.mul(k, INT64(vec.item))), builder.sub(depth, k))

        def close(*following: ir.Value) -> None:
            k.add_incoming(builder.add(k, INT64(lanes)), builder.block)
            for phi, start, value in zip(carried, starts, following, strict=True):
                phi.add_incoming(start, before)
                phi.add_incoming(value, builder.block)
            builder.branch(head)
            builder.position_at_end(rest)

        return k, values, carried, close

    _, values, (largest,), close = each_vector(repeated(0, lanes))
    bits = builder.and_(builder.bitcast(values, integers(lanes)), magnitude)
    close(builder.select(builder.icmp_signed(">", bits, largest), bits, largest))
    top = largest
    half = lanes // 2
    while half:
        order = [*range(half, 2 * half), *range(half)][:half] + [0] * (lanes - half)
        other = builder.shuffle_vector(top, top, ir.Constant(integers(lanes), order))
        top = builder.select(builder.icmp_signed(">", top, other), top, other)
        half //= 2
    top = builder.extract_element(top, INT32(0))
    finite = builder.icmp_signed("<", top, INT32(INFINITY_BITS))
    most = builder.bitcast(top, FLOAT)
    small = builder.fcmp_ordered("<", most, ir.Constant(FLOAT, SMALLEST))
    most = builder.select(small, ir.Constant(FLOAT, SMALLEST), most)
    scale = builder.fdiv(most, ir.Constant(FLOAT, 127.0))
    scale = builder.select(finite, scale, ir.Constant(FLOAT, float("nan")))
    inverse = builder.fdiv(ir.Constant(FLOAT, 127.0), most)
    builder.store(scale, pointer(builder, builder.sub(goal, INT64(4)), FLOAT), align=1)
    wide = splat(builder, inverse, lanes)

    k, values, _, close = each_vector()
    shifted = builder.fadd(builder.fmul(values, wide), ir.Constant(vec.llvm, [ROUND] * lanes))
    numbers = builder.trunc(builder.bitcast(shifted, integers(lanes)), ir.VectorType(BYTE, lanes))
    if target.adds_128:
        numbers = builder.xor(numbers, repeated(0x80, lanes, 8))
    builder.store(numbers, pointer(builder, builder.add(goal, k), numbers.type), align=1)
    close()
    builder.ret_void()


def operations(target: Target) -> dict:
    """What `as_operands` calls."""

    @intrinsic
    def quantise(typing, source, depth, goal):
        def lower(context, builder, sig, args):
            builder.call(declared(builder, quantise_name(target), ir.VoidType(), *[INT64] * 3), args)
            return context.get_dummy_value()

        return types.void(*[types.int64] * 3), lower

    return {"quantise": quantise}


def as_operands(rows, row_pointers, depth, scratch):
    """Where the addresses of rows in the form of operands are: in `scratch`, with the quantised rows."""
    stride = VECTOR + (lines(depth) + LANES - 1) // LANES * VECTOR
    goal = copies_start(rows, scratch) + VECTOR
    for row in range(rows):
        quantise(load_int(row_pointers + 8 * row), depth, goal)
        store_int(scratch + 8 * row, goal)
        goal += stride
    return scratch
