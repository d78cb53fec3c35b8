"""How a layer's work is cut: slices of the batch, chunks of steps, scratch memory.

Nothing here changes a result: every element's sum runs in the same order whatever the plan.
"""

import functools
from dataclasses import dataclass

from rnnfast_kernels.cells import CELLS
from rnnfast_kernels.cpu.target import Target, target

# Bytes of gates that a worker computes ahead of the recurrence, and the rows that make that product worth its panels.
CHUNK_BYTES = 1 << 17
CHUNK_ROWS = 64
# Rows whose outer products are summed before the sum is added to the gradient of a weight.
OUTER_BLOCK = 256
# Multiplications below which a second thread costs more than it brings.
SERIAL_WORK = 1 << 20


@dataclass(frozen=True)
class Shape:
    """The sizes of a layer that plans depend on."""

    cell: str
    dtype: str
    steps: int
    batch: int
    rows: int
    inputs: int
    hidden: int
    width: int
    directions: int

    @property
    def gates(self) -> int:
        return CELLS[self.cell].gates

    @property
    def extra(self) -> int:
        return len(CELLS[self.cell].states) - 1

    @property
    def target(self) -> Target:
        return target(self.dtype)

    @property
    def row_work(self) -> int:
        """Multiplications of one row in one step."""
        projected = self.width * self.hidden if self.width != self.hidden else 0
        return self.gates * self.hidden * (self.inputs + self.width) + projected


def panel_bytes(chosen: Target, columns: int, depth: int) -> int:
    """Memory of a matrix [depth, columns], packed."""
    return chosen.padded(columns) * (1 + depth) * chosen.item


def even_cuts(count: int, parts: int) -> list[int]:
    """Bounds that cut `count` into `parts` as evenly as can be."""
    return [count * part // parts for part in range(parts + 1)]


def threads_for(work: int, threads: int) -> int:
    """Threads worth using for so many multiplications."""
    return max(1, min(threads, work // SERIAL_WORK))


@functools.lru_cache(maxsize=4096)
def row_cuts(shape: Shape, threads: int) -> list[int]:
    """Bounds of the slices of the batch; each slice of each direction is one job."""
    threads = threads_for(shape.rows * shape.row_work * shape.directions, threads)
    slices = max(1, min(shape.batch, -(-threads // shape.directions)))
    return even_cuts(shape.batch, slices)


def chunk_steps(shape: Shape, rows: int) -> int:
    """Steps whose input products are computed together."""
    row_bytes = shape.gates * shape.target.padded(shape.hidden) * shape.target.item
    rows = max(1, rows)
    return max(1, min(shape.steps, max(CHUNK_BYTES // (rows * row_bytes), CHUNK_ROWS // rows)))


class Scratch:
    """Sizes of buffers, collected first and then laid out in one piece of memory."""

    def __init__(self) -> None:
        self.size = 0

    def add(self, size: int) -> int:
        """Reserve `size` bytes and a vector's margin, and return their offset."""
        offset = self.size
        self.size += (size + 64 + 63) // 64 * 64
        return offset


def product_chunk(chosen: Target, depth: int) -> int:
    """Rows of a product's left operand that stay in the second-level cache."""
    return max(2 * chosen.accumulators, min(1024, (1 << 19) // (depth * chosen.item)))
