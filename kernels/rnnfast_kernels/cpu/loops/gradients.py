"""Products that follow the backward time loop: gradients by the input and by the weights.

Their work is split over rows, or over rows of the result, never over the terms of a sum, and a sum's terms are added
in blocks whose bounds depend on the layer alone: results do not depend on the number of threads.
"""

# ruff: noqa: F821

from rnnfast_kernels.cpu.job import Record

# With `add`, a product is added to what stands there.
# out[rows, units] = sum over parts of left[part][rows, depth] * panels[part]
PRODUCT = Record(
    "rows", "depth", "units", "parts",
    "left", "left_row", "left_part", "panels", "panels_part", "out", "out_row",
    "tile", "row_pointers", "operands", "out_pointers", "chunk", "add",
)  # fmt: skip

# out[columns, units] = sum over valid rows of left[row, columns] x right[row, units], for the columns first to last;
# bias, and second_bias where there is one, is the sum of left. `layer` is a record of the whole batch, `right` tells
# which of its rows are meant.
OUTER = Record(
    "layer", "right", "group", "groups",
    "left", "left_row", "columns", "first", "last", "units", "right_base", "right_row",
    "out", "bias", "second_bias", "block",
    "tile", "row_pointers", "left_pointers", "right_pointers", "panels", "strip", "add",
)  # fmt: skip

# Values of `right`: the layer's input, the h that entered a step, or rows at `right_base`.
INPUTS, ENTERING, OTHERS = 0, 1, 2


def rows_product(address):
    """The product of `PRODUCT`, in chunks of rows that fit a cache."""
    job = product_at(address)
    for first in range(0, job.rows, job.chunk):
        count = min(job.chunk, job.rows - first)
        fill_pointers(job.out_pointers, job.out + first * job.out_row, job.out_row, count)
        for part in range(job.parts):
            left = job.left + part * job.left_part + first * job.left_row
            fill_pointers(job.row_pointers, left, job.left_row, count)
            panels = job.panels + part * job.panels_part
            row_pointers = as_operands(count, job.row_pointers, job.depth, job.operands)
            adds = part + job.add > 0
            project_plain(
                count, row_pointers, ACC_BYTES, panels, job.depth, job.units, job.out_pointers, 0, job.tile, adds
            )


def right_address(job, layer, order, step, row):
    if job.right == INPUTS:
        return x_address(layer, step) + row * layer.x_row
    if job.right == ENTERING:
        return entering_states(layer, order, step, row)[0]
    return job.right_base + (first_index(layer, step) + row) * job.right_row


def pack_strip(job, column, depth):
    """Copy a vector's width of columns of the left rows side by side, and return their sums."""
    total = zeros()
    lanes = job.columns - column
    for k in range(0, depth, TERMS):
        store(job.strip + k // TERMS * VECTOR, load_line(job.left_pointers, k, depth, column, lanes), LANES)
    for k in range(depth):
        total = total + load(load_int(job.left_pointers + 8 * k) + column * ACC_BYTES, lanes)
    return total


def add_block(job, depth, accumulate):
    """Add the terms of `depth` rows."""
    blocks = (job.units + LANES - 1) // LANES
    pack_rows(job.right_pointers, depth, job.units, job.panels, 0, blocks)
    for column in range(job.first, job.last, LANES):
        lanes = min(LANES, job.columns - column)
        total = pack_strip(job, column, depth)
        if job.bias:
            address = job.bias + column * ACC_BYTES
            total = total + load(address, lanes) if accumulate else total
            store(address, total, lanes)
            if job.second_bias:
                store(job.second_bias + column * ACC_BYTES, total, lanes)
        fill_pointers(job.row_pointers, job.strip, ACC_BYTES, lanes)
        out_row = job.units * ACC_BYTES
        out_pointers = job.row_pointers + 8 * lanes
        fill_pointers(out_pointers, job.out + column * out_row, out_row, lanes)
        project_plain(
            lanes, job.row_pointers, VECTOR, job.panels, depth, job.units, out_pointers, 0, job.tile, accumulate
        )


def outer_product(address):
    """The product of `OUTER`."""
    job = outer_at(address)
    layer = layer_at(job.layer)
    depth, accumulate = 0, job.add > 0
    for order in range(layer.steps):
        step = step_at(layer, order)
        index = first_index(layer, step)
        for row in range(job.group, live_rows(layer, step), job.groups):
            store_int(job.left_pointers + 8 * depth, job.left + (index + row) * job.left_row)
            store_int(job.right_pointers + 8 * depth, right_address(job, layer, order, step, row))
            depth += 1
            if depth == job.block:
                add_block(job, depth, accumulate)
                depth, accumulate = 0, True
    if depth or not accumulate:
        add_block(job, depth, accumulate)
