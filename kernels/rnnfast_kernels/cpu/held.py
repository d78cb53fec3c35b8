"""The register-tiled product over weights that are packed beforehand in fewer bits, as LLVM IR (see `tile`)."""

from llvmlite import ir

from rnnfast_kernels.cpu import int8, widened
from rnnfast_kernels.cpu.memory import load_all, pointer, store_all
from rnnfast_kernels.cpu.target import Target
from rnnfast_kernels.cpu.vector import ELEMENT, INT32, INT64, Vec, splat

# Sums in flight that hide the latency of a product.
IN_FLIGHT = 10


def define_tile(function: ir.Function, target: Target, rows: int, vectors: int) -> None:
    """The product for one tile of `rows` x `vectors` registers (see `tile.tile_function`)."""
    lanes, vector = target.lanes, target.vector
    vec = Vec("float32", lanes)
    narrow = target.weights == "int8"
    kind = int8.integers(lanes) if narrow else vec.llvm
    row_pointers, _, panel, depth, out, out_step = function.args
    builder = ir.IRBuilder(function.append_basic_block("entry"))
    left = [builder.load(pointer(builder, builder.add(row_pointers, INT64(8 * row)), INT64)) for row in range(rows)]
    strip = target.strip(vectors)
    strip_bytes = builder.mul(builder.add(depth, INT64(target.head)), INT64(vector * strip))
    strips = [builder.add(panel, builder.mul(strip_bytes, INT64(n))) for n in range(-(-vectors // strip))]
    widths = [min(strip, vectors - strip * n) for n in range(len(strips))]
    # Sums of integers may be cut into several, added at the end: results are the same.
    apart = max(1, min(4, -(-IN_FLIGHT // (rows * vectors)))) if narrow else 1
    at_once = max(target.unroll, apart)

    def load_line(line: ir.Value) -> list[ir.Value]:
        spots = [builder.add(s, builder.mul(line, INT64(vector * w))) for s, w in zip(strips, widths, strict=True)]
        spots = [builder.add(spots[n // strip], INT64(vector * (n % strip))) for n in range(vectors)]
        return [load_all(builder, vec, spot) for spot in spots]

    def add_line(k: ir.Value, sums: list[ir.Value]) -> list[ir.Value]:
        columns = load_line(builder.add(k, INT64(target.head)))
        columns = [widened.both(builder, each) for each in columns] if not narrow else columns
        offset = builder.shl(k, INT64(2 if narrow else 3))
        added = []
        for row in range(rows):
            here = sums[row * vectors : (row + 1) * vectors]
            place = builder.add(left[row], offset)
            if narrow:
                quad = splat(builder, builder.load(pointer(builder, place, INT32), align=1), lanes)
                pairs = zip(columns, here, strict=True)
                added += [int8.add_products(builder, target, quad, builder.bitcast(c, kind), t) for c, t in pairs]
            else:
                added += widened.add_products(builder, vec, place, columns, here)
        return added

    def loop(k: ir.Value, groups: list[list[ir.Value]], count: int) -> tuple[ir.Value, list[list[ir.Value]]]:
        """Add lines from k on, `count` in a round; each has sums of its own if there are so many groups."""
        before = builder.block
        head, body, rest = (function.append_basic_block(label) for label in ("head", "body", "rest"))
        builder.branch(head)
        builder.position_at_end(head)
        k_now = builder.phi(INT64)
        now = [[builder.phi(kind) for _ in group] for group in groups]
        builder.cbranch(builder.icmp_signed("<=", builder.add(k_now, INT64(count)), depth), body, rest)
        builder.position_at_end(body)
        new = list(now)
        for i in range(count):
            new[i % len(new)] = add_line(builder.add(k_now, INT64(i)), new[i % len(new)])
        k_next = builder.add(k_now, INT64(count))
        builder.branch(head)
        k_now.add_incoming(k, before)
        k_now.add_incoming(k_next, body)
        for phis, starts, following in zip(now, groups, new, strict=True):
            for phi, start, value in zip(phis, starts, following, strict=True):
                phi.add_incoming(start, before)
                phi.add_incoming(value, body)
        builder.position_at_end(rest)
        return k_now, now

    sums = [builder.bitcast(each, kind) for each in load_line(INT64(0))] * rows
    groups = [sums, *([ir.Constant(kind, None)] * len(sums) for _ in range(apart - 1))]
    k = INT64(0)
    if at_once > 1:
        k, groups = loop(k, groups, at_once)
        for group in groups[1:]:
            groups[0] = [builder.add(total, other) for total, other in zip(groups[0], group, strict=True)]
    _, (sums,) = loop(k, groups[:1], 1)
    scales, biases = (load_line(INT64(1)), load_line(INT64(2))) if narrow else ([], [])
    for row in range(rows):
        goal = builder.add(out, builder.mul(out_step, INT64(row)))
        values = sums[row * vectors : (row + 1) * vectors]
        if narrow:
            scale = builder.load(pointer(builder, builder.sub(left[row], INT64(4)), ELEMENT["float32"]), align=1)
            wide = splat(builder, scale, lanes)
            rest = zip(values, scales, biases, strict=True)
            values = [int8.finish(builder, vec, total, wide, column, bias) for total, column, bias in rest]
        for n, value in enumerate(values):
            store_all(builder, vec, builder.add(goal, INT64(vector * n)), value)
    builder.ret_void()
