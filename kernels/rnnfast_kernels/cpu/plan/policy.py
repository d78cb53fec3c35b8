"""How much work is worth a thread, and how a layer is cut: free to change.

Nothing here changes a result, and no kernel is compiled again for it.
"""

from rnnfast_kernels.equations.cell import Cell

# Bytes of gates that a worker computes ahead of the recurrence, and the rows that make that product worth its panels.
CHUNK_BYTES = 1 << 17
CHUNK_ROWS = 64
# Multiplications below which another thread costs more than it brings.
SERIAL_WORK = 1 << 20
# Multiplications of one step that make a worker worth its barrier, and the rows for each thread from
# which on slices of the batch are the better way to share.
STEP_WORK = 1 << 15
BARRIER_ROWS = 4


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


def workers_for(rows: int, work: int, step_work: int, directions: int, threads: int) -> int:
    """Threads that share the hidden units of one direction, where the batch has too few rows to share them.

    A thread that has some of the units reads its part of the recurrent weights at each step, one that has some of the
    rows reads all of them.
    """
    if rows >= BARRIER_ROWS * threads:
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
