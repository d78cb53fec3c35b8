"""Packing of panels, and products of rows with panels, bound over a target's vectors and a number of gates.

A matrix that stands on the right of a product is kept as panels (see `tile`). With G gates, a panel holds the same
hidden units of every gate: its vectors are [blocks, G], a block being one vector's worth of units, in strips of STRIP.
So one `multiply` yields all gates of its units, and a cell can follow at once. G = 1 is the ordinary product.
"""

# ruff: noqa: F821

from rnnfast_kernels.cpu.job import Record

# Packing of one weight, or of some of its blocks: that of all gates, of those with a recurrent part, or a plain matrix.
PACK = Record("kind", "weight", "weight_row", "bias", "units", "depth", "panels", "first", "last", "row_pointers")
GATE_COLUMNS, PLAIN_COLUMNS, PLAIN_ROWS, RECURRENT_COLUMNS = 0, 1, 2, 3


def panel_blocks(blocks):
    """Blocks of the next panel when `blocks` are left."""
    if WIDEST >= 4 and blocks >= 4:
        return 4
    if WIDEST >= 2 and blocks >= 2:
        return 2
    return 1


def next_panel(first_block, last_block, done, backwards):
    """The panel after `done` blocks of a pass over some: its first block, its blocks, and where the panel after it is.

    Where every other pass is backwards, each begins with what the one before ended with, and the cache still holds.
    """
    left = last_block - first_block - done
    if backwards:
        blocks = 4 if WIDEST >= 4 and left % 4 == 0 else 2 if WIDEST >= 2 and left % 2 == 0 else 1
        block = first_block + left - blocks
        return block, blocks, max(first_block, block - blocks)
    blocks = panel_blocks(left)
    block, following = first_block + done, first_block + done + blocks
    return block, blocks, following if following < last_block else block


def tile_rows(rows):
    """Rows of the next tile when `rows` are left: as even as they can be."""
    tiles = (rows + ROWS - 1) // ROWS
    return (rows + tiles - 1) // tiles


def panel_address(panels, block, depth):
    """Where the panel that begins with a block of units is."""
    return panels + block * (HEAD + lines(depth)) * GATES * VECTOR


def strip_address(panel, vector, depth):
    """Where a panel's strips hold one of its vectors: its initial value, before those of all lines."""
    return panel + vector // STRIP * STRIP * (HEAD + lines(depth)) * VECTOR + vector % STRIP * VECTOR


def strip_line(vectors, vector):
    """Bytes between two lines of the strip that holds a vector."""
    return min(STRIP, vectors - vector // STRIP * STRIP) * VECTOR


def pack_columns(weight, bias, units, depth, panels, first_block, last_block):
    """Pack weight [G*units, depth], whose rows are a product's columns, and bias [G*units] if its address is not 0."""
    block = first_block
    while block < last_block:
        blocks = panel_blocks(last_block - block)
        panel = panel_address(panels, block, depth)
        for vector in range(blocks * GATES):
            line = strip_line(blocks * GATES, vector)
            unit = (block + vector // GATES) * LANES
            count = units - unit
            row = (vector % GATES) * units + unit
            out = strip_address(panel, vector, depth)
            store(out, load_io(bias + row * IO_BYTES, count) if bias else zeros(), LANES)
            for k in range(0, depth, LANES * TERMS):
                source = weight + (row * depth + k) * IO_BYTES
                address = out + line * (HEAD + k // TERMS)
                transpose_square(source, depth * IO_BYTES, count, min(LANES * TERMS, depth - k), address, line)
        block += blocks


def pack_rows(row_pointers, depth, units, panels, first_block, last_block):
    """Pack the given matrix [depth, units] whose rows are at the addresses `row_pointers`."""
    block = first_block
    while block < last_block:
        blocks = panel_blocks(last_block - block)
        panel = panel_address(panels, block, depth)
        for i in range(blocks):
            store(strip_address(panel, i, depth), zeros(), LANES)
        for k in range(0, depth, TERMS):
            for i in range(blocks):
                unit = (block + i) * LANES
                out = strip_address(panel, i, depth) + (HEAD + k // TERMS) * strip_line(blocks, i)
                store(out, load_io_line(row_pointers, k, depth, unit, units - unit), LANES)
        block += blocks


def project(rows, row_pointers, step, panels, depth, units, out_pointers, gate_step, tile, accumulate):
    """Multiply rows, in the form of operands, by panels; write or add each result [G, units] at its output pointer."""
    last_block = (units + LANES - 1) // LANES
    project_blocks(
        rows, row_pointers, step, panels, depth, units, 0, last_block, 0, out_pointers, gate_step, tile, accumulate
    )


def project_blocks(
    rows, row_pointers, step, panels, depth, units, first_block, last_block, backwards, out_pointers, gate_step, tile,
    accumulate,
):  # fmt: skip
    """Do that for some blocks of the units, which begin and end where panels do, from the first or from the last on."""
    done = 0
    while done < last_block - first_block:
        block, blocks, following = next_panel(first_block, last_block, done, backwards)
        panel, ahead = panel_address(panels, block, depth), panel_address(panels, following, depth)
        first = nth = 0
        while first < rows:
            count = tile_rows(rows - first)
            multiply(blocks * GATES, count, row_pointers + 8 * first, step, panel, lines(depth), ahead, nth, tile)
            source = tile
            for row in range(first, first + count):
                out = load_int(out_pointers + 8 * row)
                for vector in range(blocks * GATES):
                    unit = (block + vector // GATES) * LANES
                    address = out + (vector % GATES) * gate_step + unit * ACC_BYTES
                    value = load(source, LANES)
                    if accumulate:
                        value = value + load(address, units - unit)
                    store(address, value, units - unit)
                    source += VECTOR
            first += count
            nth += 1
        done += blocks


def start_tile(vectors, rows, panel, depth, tile):
    """The tile of rows of zeros. (A bias of -0.0 becomes 0.0, as it does in a sum.)"""
    for vector in range(vectors):
        address = strip_address(panel, vector, depth) + (HEAD - 1) * strip_line(vectors, vector)
        value = load(address, LANES) + zeros()
        for row in range(rows):
            store(tile + (row * vectors + vector) * VECTOR, value, LANES)


def project_unpacked(rows, row_pointers, weight, bias, depth, units, block, last_block, out_pointers, gate_step, tile):
    """Multiply a few rows by some blocks of a weight [G*units, depth] that is not packed, as `project_blocks` does."""
    while block < last_block:
        unit = block * LANES
        multiply_block(rows, row_pointers, weight, bias, depth, units, unit, tile)
        for row in range(rows):
            out = load_int(out_pointers + 8 * row) + unit * ACC_BYTES
            for gate in range(GATES):
                store(out + gate * gate_step, load(tile + (row * GATES + gate) * VECTOR, LANES), units - unit)
        block += 1


def multiply_block(rows, row_pointers, weight, bias, depth, units, unit, tile):
    """The tile of one block of a weight that is not packed."""
    for gate in range(GATES):
        first = gate * units + unit
        bias_address = bias + first * IO_BYTES if bias else 0
        out = tile + gate * VECTOR
        address = weight + first * depth * IO_BYTES
        multiply_unpacked(
            rows, row_pointers, address, min(LANES, units - unit), depth, bias_address, out, GATES * VECTOR
        )


def copy_row(source, out, units):
    for unit in range(0, units, LANES):
        store(out + unit * ACC_BYTES, load(source + unit * ACC_BYTES, units - unit), units - unit)


def read_row(source, out, units):
    """Copy from a given tensor."""
    for unit in range(0, units, LANES):
        store(out + unit * ACC_BYTES, load_io(source + unit * IO_BYTES, units - unit), units - unit)


def write_row(source, out, units):
    """Copy to a given tensor."""
    for unit in range(0, units, LANES):
        store_io(out + unit * IO_BYTES, load(source + unit * ACC_BYTES, units - unit), units - unit)


def add_io_row(source, out, units):
    """Add from a given tensor."""
    for unit in range(0, units, LANES):
        address = out + unit * ACC_BYTES
        store(address, load(address, units - unit) + load_io(source + unit * IO_BYTES, units - unit), units - unit)


def clear_row(out, units):
    for unit in range(0, units, LANES):
        store(out + unit * ACC_BYTES, zeros(), units - unit)


def clear_io_row(out, units):
    for unit in range(0, units, LANES):
        store_io(out + unit * IO_BYTES, zeros(), units - unit)


def fill_pointers(row_pointers, start, step, count):
    """Write `count` addresses, `step` bytes apart."""
    for i in range(count):
        store_int(row_pointers + 8 * i, start + i * step)


def pack(address):
    """Pack one weight, or some blocks of it."""
    job = pack_at(address)
    if job.kind == GATE_COLUMNS:
        pack_gate_columns(job.weight, job.bias, job.units, job.depth, job.panels, job.first, job.last)
    elif job.kind == RECURRENT_COLUMNS:
        pack_recurrent_columns(job.weight, job.bias, job.units, job.depth, job.panels, job.first, job.last)
    elif job.kind == PLAIN_COLUMNS:
        pack_plain_columns(job.weight, job.bias, job.units, job.depth, job.panels, job.first, job.last)
    else:
        fill_pointers(job.row_pointers, job.weight, job.weight_row, job.depth)
        pack_rows(job.row_pointers, job.depth, job.units, job.panels, job.first, job.last)


PLACES = (panel_blocks, next_panel, tile_rows, panel_address, strip_address, strip_line)
ROWS = (copy_row, read_row, write_row, add_io_row, clear_row, clear_io_row, fill_pointers)
# Functions over panels of so many gates; and the names by which loops call them, and those of `PLACES`: over panels of
# a cell's gates, of the gates with a recurrent part, and of a matrix.
PRODUCTS = (pack_columns, pack_rows, project, project_blocks, start_tile, multiply_block, project_unpacked)
OF_GATES = {
    "pack_gate_columns": "pack_columns",
    "project_gate_blocks": "project_blocks",
    "project_unpacked": "project_unpacked",
}
OF_RECURRENT = {
    "pack_recurrent_columns": "pack_columns",
    "multiply": "multiply",
    "multiply_block": "multiply_block",
    "start_tile": "start_tile",
    "next_recurrent_panel": "next_panel",
    "recurrent_rows": "tile_rows",
    "recurrent_panel": "panel_address",
}
OF_MATRIX = {
    "pack_plain_columns": "pack_columns",
    "pack_rows": "pack_rows",
    "project_plain": "project",
    "project_plain_blocks": "project_blocks",
}
