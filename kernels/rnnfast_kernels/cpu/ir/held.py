"""The register-tiled product over weights that are packed beforehand in fewer bits, as LLVM IR (see `tile`).

What a format does in its own way is in a module of its own, named in `PRODUCTS`. With AMX, tiles of many rows take 64
terms at a time (see `amx`); what is left of the sums follows line by line.
"""

from collections.abc import Callable, Sequence
from typing import Protocol

from llvmlite import ir

from rnnfast_kernels.cpu.ir import amx, int8, widened
from rnnfast_kernels.cpu.ir.memory import CACHE_LINE, PREFETCHING_ROWS, load_all, pointer, prefetch, store_all
from rnnfast_kernels.cpu.ir.vector import INT64, Vec
from rnnfast_kernels.cpu.target import Target

# Sums in flight that hide the latency of a product.
IN_FLIGHT = 10

Values = list[ir.Value]


class Products(Protocol):
    """How the numbers of a format are multiplied: a module with these.

    EXACT: whether sums have no rounding, so that they may be cut into several, which are added at the end.
    as_operands: the function of a kernel in place of that in `operands`.
    """

    EXACT: bool
    as_operands: Callable

    def operations(self, target: Target) -> dict:
        """The intrinsics that `as_operands` calls, beside those of `operands`."""

    def define(self, module: ir.Module, target: Target) -> None:
        """Define what these call as functions of a module."""

    def sum_type(self, target: Target) -> ir.VectorType:
        """The type of a vector of sums."""

    def as_factors(self, builder: ir.IRBuilder, columns: Values) -> list:
        """The vectors of a panel's line in the form that products take."""

    def add_products(
        self, builder: ir.IRBuilder, target: Target, place: ir.Value, factors: list, sums: Values
    ) -> Values:
        """Add to each sum the products of a row's terms, at `place`, with a factor; return the sums."""

    def results(
        self, builder: ir.IRBuilder, target: Target, row: ir.Value, sums: Values, lines: list[Values]
    ) -> Values:
        """A row's sums in float32. row: its address. lines: those before the panel's terms, but for initial values."""


PRODUCTS: dict[str, Products] = {"bfloat16": widened, "int8": int8}


def products_of(target: Target) -> Products:
    """The module of a target's format of weights."""
    return PRODUCTS[target.format.name]  # type: ignore[union-attr]


def define_tile(function: ir.Function, target: Target, rows: int, vectors: int) -> None:
    """The product for one tile of `rows` x `vectors` registers (see `tile.tile_function`)."""
    builder = ir.IRBuilder(function.append_basic_block("entry"))
    tile = Tile(builder, target, rows, vectors, function.args)
    if target.dot != "amx" or rows < amx.LEAST_ROWS:
        tile.in_registers(range(rows))
    elif rows * vectors <= tile.most_sums:
        long = builder.icmp_signed(">=", tile.depth, INT64(amx.LEAST_LINES))
        with builder.if_else(long) as (then, otherwise):
            with then:
                tile.by_amx()
            with otherwise:
                tile.in_registers(range(rows))
    else:
        tile.by_amx()
    builder.ret_void()


class Tile:
    """The code of one tile."""

    def __init__(self, builder: ir.IRBuilder, target: Target, rows: int, vectors: int, args: Sequence[ir.Value]):
        row_pointers, _, self.panel, self.depth, self.ahead, self.out, self.out_step = args
        self.builder, self.target, self.rows, self.vectors = builder, target, rows, vectors
        self.products = products_of(target)
        self.vec = Vec("float32", target.lanes)
        self.kind = self.products.sum_type(target)
        self.most_sums = target.registers * 3 // 4
        spots = [builder.add(row_pointers, INT64(8 * row)) for row in range(rows)]
        self.left = [builder.load(pointer(builder, spot, INT64)) for spot in spots]
        strip = target.strip(vectors)
        step = builder.mul(builder.add(self.depth, INT64(target.head)), INT64(target.vector * strip))
        self.strips = [builder.add(self.panel, builder.mul(step, INT64(n))) for n in range(-(-vectors // strip))]
        self.widths = [min(strip, vectors - strip * n) for n in range(len(self.strips))]

    def load_line(self, line: ir.Value) -> Values:
        """The panel's vectors of one line."""
        builder, vector, strip = self.builder, self.target.vector, self.target.strip(self.vectors)
        pairs = zip(self.strips, self.widths, strict=True)
        spots = [builder.add(start, builder.mul(line, INT64(vector * width))) for start, width in pairs]
        places = [builder.add(spots[n // strip], INT64(vector * (n % strip))) for n in range(self.vectors)]
        return [load_all(builder, self.vec, place) for place in places]

    def goal(self, row: int, n: int) -> ir.Value:
        """Where a vector of the result goes."""
        start = self.builder.add(self.out, self.builder.mul(self.out_step, INT64(row)))
        return self.builder.add(start, INT64(self.target.vector * n))

    def add_line(self, rows: range, k: ir.Value, sums: Values) -> Values:
        """Add the terms of one line to the sums of some rows."""
        builder, target = self.builder, self.target
        columns = self.load_line(builder.add(k, INT64(target.head)))
        # Products of integers leave no time for it.
        if self.rows >= PREFETCHING_ROWS and not self.products.EXACT:
            prefetch(builder, builder.add(self.ahead, builder.mul(k, INT64(CACHE_LINE))))
        element = target.operand_elements * target.acc_bytes
        offset = builder.shl(k, INT64(element.bit_length() - 1))
        factors = self.products.as_factors(builder, columns)
        added = []
        for n, row in enumerate(rows):
            here = sums[n * self.vectors : (n + 1) * self.vectors]
            added += self.products.add_products(builder, target, builder.add(self.left[row], offset), factors, here)
        return added

    def add_lines(self, rows: range, k: ir.Value, groups: list[Values], count: int) -> tuple[ir.Value, list[Values]]:
        """Add lines from k on, `count` in a round; they take turns if there are several groups of sums."""
        builder, before = self.builder, self.builder.block
        head, body, rest = (builder.append_basic_block(label) for label in ("head", "body", "rest"))
        builder.branch(head)
        builder.position_at_end(head)
        k_now = builder.phi(INT64)
        now = [[builder.phi(self.kind) for _ in group] for group in groups]
        builder.cbranch(builder.icmp_signed("<=", builder.add(k_now, INT64(count)), self.depth), body, rest)
        builder.position_at_end(body)
        new = list(now)
        for i in range(count):
            new[i % len(new)] = self.add_line(rows, builder.add(k_now, INT64(i)), new[i % len(new)])
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

    def in_registers(self, rows: range) -> None:
        """All terms of some rows."""
        initial = [self.builder.bitcast(each, self.kind) for each in self.load_line(INT64(0))]
        self.go_on(rows, INT64(0), initial * len(rows))

    def go_on(self, rows: range, k: ir.Value, sums: Values) -> None:
        """The terms from k on, and the results."""
        apart = max(1, min(4, -(-IN_FLIGHT // len(sums)))) if self.products.EXACT else 1
        at_once = max(self.target.unroll, apart)
        groups = [sums, *([ir.Constant(self.kind, None)] * len(sums) for _ in range(apart - 1))]
        if at_once > 1:
            k, groups = self.add_lines(rows, k, groups, at_once)
            for group in groups[1:]:
                groups[0] = [self.builder.add(a, b) for a, b in zip(groups[0], group, strict=True)]
        _, (sums,) = self.add_lines(rows, k, groups[:1], 1)
        self.store(rows, sums)

    def store(self, rows: range, sums: Values) -> None:
        """The results, from sums."""
        builder, vectors = self.builder, self.vectors
        lines = [self.load_line(INT64(line)) for line in range(1, self.target.head)]
        for n, row in enumerate(rows):
            own = sums[n * vectors : (n + 1) * vectors]
            values = self.products.results(builder, self.target, self.left[row], own, lines)
            for column, value in enumerate(values):
                store_all(builder, self.vec, self.goal(row, column), value)

    def by_amx(self) -> None:
        """Sums of whole blocks of lines by AMX, by way of the result's memory; then the rest."""
        builder, head, vector = self.builder, self.target.head, self.target.vector
        first = builder.add(self.panel, INT64(head * self.vectors * vector))
        row_step = builder.sub(self.left[1], self.left[0])
        k = amx.multiply(builder, self.vectors, self.left[0], row_step, first, self.depth, self.out, self.out_step)
        initial = [builder.bitcast(each, self.kind) for each in self.load_line(INT64(0))]
        most = max(1, self.most_sums // self.vectors)
        for start in range(0, self.rows, most):
            rows = range(start, min(self.rows, start + most))
            sums = []
            for row in rows:
                for n in range(self.vectors):
                    sum_of_blocks = load_all(builder, self.vec, self.goal(row, n))
                    sums.append(builder.add(builder.bitcast(sum_of_blocks, self.kind), initial[n]))
            self.go_on(rows, k, sums)
