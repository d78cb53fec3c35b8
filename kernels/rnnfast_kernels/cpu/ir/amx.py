"""Products of int8 numbers by Intel's AMX: sixteen rows by sixteen columns by 64 terms in one instruction.

Panels and rows are those of `vpdpbusd`: a line of a panel is a row of AMX's right operand, and quantised rows stand in
memory at equal distances. All sixteen rows are read and written, whatever stands there.
"""

from llvmlite import ir

from rnnfast_kernels.cpu.ir.memory import pointer
from rnnfast_kernels.cpu.ir.vector import INT64, declared

BYTE = ir.IntType(8)
ROWS, LINES = 16, 16
# Rows below which registers are as fast, and lines below which they are, where they hold all sums.
LEAST_ROWS, LEAST_LINES = 4, 64
# Palette 1; then bytes of a row of each of eight tiles, and their rows.
CONFIGURATION = [1, *[0] * 15, *[64, 0] * 8, *[0] * 16, *[ROWS] * 8, *[0] * 8]


def configuration(module: ir.Module) -> ir.GlobalVariable:
    """The constant that describes the tiles."""
    name = "rnnfast_amx_configuration"
    if name in module.globals:
        return module.globals[name]
    kind = ir.ArrayType(BYTE, 64)
    constant = ir.GlobalVariable(module, kind, name)
    constant.initializer = ir.Constant(kind, [BYTE(each) for each in CONFIGURATION])
    constant.global_constant, constant.linkage, constant.align = True, "internal", 64
    return constant


def call(builder: ir.IRBuilder, name: str, *args: ir.Value) -> None:
    builder.call(declared(builder, f"llvm.x86.{name}", ir.VoidType(), *[each.type for each in args]), list(args))


def multiply(
    builder: ir.IRBuilder,
    vectors: int,
    left: ir.Value,
    row_step: ir.Value,
    lines: ir.Value,
    depth: ir.Value,
    out: ir.Value,
    out_step: ir.Value,
) -> ir.Value:
    """Write the sums of whole blocks of lines to `out` [16, vectors], and return the number of these lines.

    left: the first row, the others `row_step` bytes apart. lines: the panel's first line, of up to six vectors.
    """
    call(builder, "ldtilecfg", builder.bitcast(configuration(builder.module), BYTE.as_pointer()))
    for n in range(vectors):
        call(builder, "tilezero", BYTE(n))
    rows, columns = vectors, range(vectors + 1, 8)  # the tiles beside those of sums
    before = builder.block
    head, body, rest = (builder.append_basic_block(label) for label in ("blocks", "block", "blocks_done"))
    builder.branch(head)
    builder.position_at_end(head)
    k = builder.phi(INT64)
    k.add_incoming(INT64(0), before)
    following = builder.add(k, INT64(LINES))
    builder.cbranch(builder.icmp_signed("<=", following, depth), body, rest)
    builder.position_at_end(body)
    place = builder.add(left, builder.shl(k, INT64(2)))
    call(builder, "tileloadd64", BYTE(rows), pointer(builder, place, BYTE), row_step)
    start = builder.add(lines, builder.mul(k, INT64(64 * vectors)))
    for n in range(vectors):
        column = BYTE(columns[n % len(columns)])
        spot = pointer(builder, builder.add(start, INT64(64 * n)), BYTE)
        call(builder, "tileloadd64", column, spot, INT64(64 * vectors))
        call(builder, "tdpbusd", BYTE(n), BYTE(rows), column)
    k.add_incoming(following, builder.block)
    builder.branch(head)
    builder.position_at_end(rest)
    for n in range(vectors):
        call(builder, "tilestored64", BYTE(n), pointer(builder, builder.add(out, INT64(64 * n)), BYTE), out_step)
    call(builder, "tilerelease")
    return k
