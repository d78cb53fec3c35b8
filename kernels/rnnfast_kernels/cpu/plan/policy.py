"""How much work is worth a thread, and how a layer is cut: free to change.

Nothing here changes a result, and no kernel is compiled again for it.
"""

import functools
from pathlib import Path

from rnnfast_kernels.equations.cell import Cell

# Bytes of gates that a worker computes ahead of the recurrence, and the rows that make that product worth its panels.
CHUNK_BYTES = 1 << 17
CHUNK_ROWS = 64
# Multiplications below which another thread costs more than it brings.
SERIAL_WORK = 1 << 20
# Multiplications of one step that make a worker worth its part in a meeting of all, and the rows for each thread from
# which on slices of the batch are the better way to share: later where weights take a quarter of a thread's cache.
STEP_WORK = 1 << 15
BARRIER_ROWS, LARGE_BARRIER_ROWS = 4, 10
# Bytes of a processor's second-level cache where the system does not say.
USUAL_CACHE = 1 << 20


def work_per_row(cell: Cell, inputs: int, hidden: int, width: int) -> int:
    """Multiplications of one row in one step."""
    projection = width * hidden if width != hidden else 0
    return hidden * (cell.gates * inputs + cell.recurrent * width) + projection


def threads_for(work: int, threads: int) -> int:
    """Threads worth using for so many multiplications."""
    return max(1, min(threads, work // SERIAL_WORK))


def even_cuts(count: int, parts: int) -> tuple[int, ...]:
    """Bounds that cut `count` into `parts` as evenly as can be."""
    return tuple(count * part // parts for part in range(parts + 1))


@functools.cache
def cache_bytes() -> int:
    """Size of a processor's second-level cache, as Linux gives it ("2048K")."""
    try:
        size = Path("/sys/devices/system/cpu/cpu0/cache/index2/size").read_text().strip()
        return int(size.removesuffix("K")) << 10
    except (OSError, ValueError):
        return USUAL_CACHE


def workers_for(rows: int, work: int, step_work: int, directions: int, threads: int) -> int:
    """Threads that share the hidden units of one direction, where the batch has too few rows to share them.

    A thread that has some of the units reads its part of the recurrent weights at each step, one that has some of the
    rows reads all of them.
    """
    large = step_work // max(1, rows) * 16 >= cache_bytes()
    if rows >= (LARGE_BARRIER_ROWS if large else BARRIER_ROWS) * threads:
        return 1
    return max(1, min(threads_for(work, threads) // directions, step_work // STEP_WORK))


def slices_for(work: int, batch: int, directions: int, threads: int) -> int:
    """Slices of the batch; each slice of each direction is one job."""
    return max(1, min(batch, -(-threads_for(work, threads) // directions)))


def chunk_steps(shape, rows: int) -> int:
    """Steps whose input products are computed together."""
    row_bytes = shape.definition.gates * shape.target.padded(shape.hidden) * shape.acc_bytes
    rows = max(1, rows)
    return max(1, min(shape.steps, max(CHUNK_BYTES // (rows * row_bytes), CHUNK_ROWS // rows)))
