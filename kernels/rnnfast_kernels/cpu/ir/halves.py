"""Half precision as LLVM IR: 16 bits in memory, float32 in registers, and pairs of bfloat16 numbers as factors.

Some processors multiply vectors of pairs of bfloat16 numbers and add both products of a pair to a float32 sum. Such a
pair takes the place of one float32 element; its first number is the lower half.
"""

from llvmlite import ir

from rnnfast_kernels.cpu.ir.vector import INT32, Vec, declared


class Bfloat16(ir.Type):
    """LLVM's type, which llvmlite does not name."""

    def _to_string(self) -> str:
        return "bfloat"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Bfloat16)

    def __hash__(self) -> int:
        return hash(Bfloat16)


def floats(lanes: int) -> Vec:
    return Vec("float32", lanes)


def widened(builder: ir.IRBuilder, dtype: str, bits: ir.Value) -> ir.Value:
    """Turn the bits of halves into float32."""
    lanes = bits.type.count
    if dtype == "float16":
        return builder.fpext(builder.bitcast(bits, ir.VectorType(ir.HalfType(), lanes)), floats(lanes).llvm)
    wide = builder.zext(bits, ir.VectorType(INT32, lanes))
    return builder.bitcast(builder.shl(wide, repeated(wide, 16)), floats(lanes).llvm)


def narrowed(builder: ir.IRBuilder, dtype: str, value: ir.Value) -> ir.Value:
    """Round float32 to the bits of halves, ties to even."""
    lanes = value.type.count
    kind = ir.VectorType(ir.IntType(16), lanes)
    if dtype == "float16":
        return builder.bitcast(builder.fptrunc(value, ir.VectorType(ir.HalfType(), lanes)), kind)
    bits = builder.bitcast(value, ir.VectorType(INT32, lanes))
    upper = builder.lshr(bits, repeated(bits, 16))
    half_less_tie = builder.add(builder.and_(upper, repeated(bits, 1)), repeated(bits, 0x7FFF))
    nearest = builder.lshr(builder.add(bits, half_less_tie), repeated(bits, 16))
    quiet = builder.or_(upper, repeated(bits, 0x40))
    return builder.trunc(builder.select(builder.fcmp_unordered("uno", value, value), quiet, nearest), kind)


def repeated(like: ir.Value, number: int) -> ir.Constant:
    """The number in every lane."""
    return ir.Constant(like.type, [number] * like.type.count)


def pairs(builder: ir.IRBuilder, first: ir.Value, second: ir.Value) -> ir.Value:
    """Round two vectors, which follow one another, to one vector of pairs of neighbours."""
    vec = floats(first.type.count)
    kind = ir.VectorType(Bfloat16(), 2 * vec.lanes)
    convert = declared(builder, "llvm.x86.avx512bf16.cvtne2ps2bf16.512", kind, vec.llvm, vec.llvm)
    return builder.bitcast(builder.call(convert, [second, first]), vec.llvm)


def pairs_in_turn(builder: ir.IRBuilder, first: ir.Value, second: ir.Value) -> ir.Value:
    """Round two vectors to one that has, lane by lane, a pair of an element of the first and one of the second."""
    lanes = first.type.count
    bits = builder.bitcast(pairs(builder, first, second), ir.VectorType(ir.IntType(16), 2 * lanes))
    return shuffled_in_turn(builder, bits, bits, lanes)


def shuffled_in_turn(builder: ir.IRBuilder, first: ir.Value, second: ir.Value, lanes: int) -> ir.Value:
    """The halves at places 0 to lanes - 1 of both vectors taken together, each beside the one `lanes` places on."""
    order = [place for lane in range(lanes) for place in (lane, lanes + lane)]
    turns = ir.Constant(ir.VectorType(INT32, 2 * lanes), order)
    return builder.bitcast(builder.shuffle_vector(first, second, turns), floats(lanes).llvm)


def add_products(builder: ir.IRBuilder, a: ir.Value, b: ir.Value, total: ir.Value) -> ir.Value:
    """Add both products of every pair to a sum."""
    vec = floats(total.type.count)
    kind = ir.VectorType(Bfloat16(), 2 * vec.lanes)
    dot = declared(builder, "llvm.x86.avx512bf16.dpbf16ps.512", vec.llvm, vec.llvm, kind, kind)
    return builder.call(dot, [total, builder.bitcast(a, kind), builder.bitcast(b, kind)])
