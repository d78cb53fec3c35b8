"""The forward loop: all steps of a slice of the batch, in one direction. Its names are bound by `runtime.build`."""

# ruff: noqa: F821


def project_inputs(job, first, last):
    """Input part of the gates for the steps at places first to last, as one product."""
    count = 0
    for order in range(first, last):
        step = step_at(job, order)
        live = live_rows(job, step)
        fill_pointers(job.row_pointers + 8 * count, x_address(job, step), job.x_row, live)
        fill_pointers(job.out_pointers + 8 * count, gates_address(job, order, step), job.gates_row, live)
        count += live
    row_pointers = io_operands(count, job.row_pointers, job.inputs, job.operands)
    if job.unpacked:
        project_unpacked(
            count, row_pointers, job.w_ih, job.b_ih, job.inputs, job.hidden, job.first_block, job.last_block,
            job.out_pointers, job.gate_step, job.tile,
        )  # fmt: skip
        return
    project_gate_blocks(
        count, row_pointers, ACC_BYTES, job.w_ih, job.inputs, job.hidden, job.first_block, job.last_block, 0,
        job.out_pointers, job.gate_step, job.tile, False,
    )  # fmt: skip


def start_states(job, h_stride, aux_stride):
    """Copy the initial states to the work space; rows without any step end with them."""
    live = live_rows(job, 0) if job.steps else 0
    for row in range(job.rows):
        h_first = job.h_first + row * job.h_first_row
        h_now = job.h_work + row * h_stride
        read_row(h_first, h_now, job.width)
        read_row(h_first, job.h_work + (job.rows + row) * h_stride, job.width)
        if row >= live:
            write_row(h_now, job.h_final + row * job.width * IO_BYTES, job.width)
        for state in range(AUX):
            source = job.aux_first + state * job.aux_first_step + row * job.aux_first_row
            read_row(source, job.aux_work + (state * job.rows + row) * aux_stride, job.hidden)


def apply_resets(job, step, live, h_now, h_stride, aux_stride):
    for row in range(live):
        if is_reset(job, step, row):
            clear_row(h_now + row * h_stride, job.width)
            for state in range(AUX):
                clear_row(job.aux_work + (state * job.rows + row) * aux_stride, job.hidden)


def clear_padding(job, step, live):
    """Zero the results of the rows that a step of the padded layout does not have."""
    for row in range(live, job.rows):
        index = first_index(job, step) + row
        clear_io_row(job.h + index * job.h_row, job.width)
        if job.aux:
            for state in range(AUX):
                clear_io_row(job.aux + state * job.aux_step + index * job.aux_row, job.hidden)


def advance(job, step, live, gates, h_now, h_next, h_stride, aux_stride, zero):
    """One step for all live rows: tile by tile the recurrent product, followed at once by the cell.

    zero: whether h is zero, so that the product is the bias.
    """
    row_pointers = job.row_pointers
    if RECURRENT > 0 and not zero:
        fill_pointers(job.row_pointers, h_now, h_stride, live)
        row_pointers = as_operands(live, job.row_pointers, job.width, job.operands)
    index = first_index(job, step)
    cell_out = job.unprojected_work if job.w_hr else h_next
    cell_stride = aux_stride if job.w_hr else h_stride
    done = 0
    while done < job.last_block - job.first_block:
        if job.unpacked:
            block, blocks, following = job.first_block + done, 1, 0
        else:
            block, blocks, following = next_recurrent_panel(job.first_block, job.last_block, done, step % 2)
        panel = recurrent_panel(job.w_hh, block, job.width)
        ahead = recurrent_panel(job.w_hh, following, job.width)
        first = nth = 0
        while first < live:
            count = recurrent_rows(live - first)
            if job.unpacked:
                multiply_block(count, row_pointers, job.w_hh, job.b_hh, job.width, job.hidden, block * LANES, job.tile)
            elif RECURRENT > 0 and zero:
                start_tile(blocks * RECURRENT, count, panel, job.width, job.tile)
            elif RECURRENT > 0:
                multiply(
                    blocks * RECURRENT, count, row_pointers + 8 * first, ACC_BYTES, panel, lines(job.width), ahead, nth,
                    job.tile,
                )  # fmt: skip
            for row in range(first, first + count):
                for i in range(blocks):
                    unit = (block + i) * LANES
                    lanes = job.hidden - unit
                    offset = unit * ACC_BYTES
                    u = load_recurrent(job.tile + ((row - first) * blocks + i) * RECURRENT * VECTOR, VECTOR, LANES)
                    x = load_gates(gates + row * job.gates_row + offset, job.gate_step, lanes)
                    h = load(h_now + row * h_stride + offset, LANES)
                    aux = job.aux_work + row * aux_stride + offset
                    state = (h,) + load_aux(aux, job.rows * aux_stride, LANES)  # noqa: RUF005
                    p = load_parameters(job.parameters + unit * IO_BYTES, job.hidden * IO_BYTES, lanes)
                    s = load_signals(job.signals, step, job.first_row + row, unit, lanes)
                    new_state, kept = cell_forward(x, u, state, p, s)
                    store(cell_out + row * cell_stride + offset, new_state[0], LANES)
                    store_tuple(aux, job.rows * aux_stride, new_state[1:], LANES)
                    if job.w_hr == 0:
                        store_io(job.h + (index + row) * job.h_row + unit * IO_BYTES, new_state[0], lanes)
                    elif job.unprojected:
                        store_io(
                            job.unprojected + (index + row) * job.unprojected_row + unit * IO_BYTES, new_state[0], lanes
                        )
                    if job.aux:
                        address = job.aux + (index + row) * job.aux_row + unit * IO_BYTES
                        store_io_tuple(address, job.aux_step, new_state[1:], lanes)
                    if job.keep:
                        store_tuple(gates + row * job.gates_row + offset, job.gate_step, kept, lanes)
            first += count
            nth += 1
        done += blocks


def project_output(job, step, live, h_next, h_stride, unprojected_stride):
    """h = W_hr times what the cell put out."""
    fill_pointers(job.row_pointers, job.unprojected_work, unprojected_stride, live)
    fill_pointers(job.out_pointers, h_next, h_stride, live)
    row_pointers = as_operands(live, job.row_pointers, job.hidden, job.operands)
    project_plain(live, row_pointers, ACC_BYTES, job.w_hr, job.hidden, job.width, job.out_pointers, 0, job.tile, False)
    h = job.h + first_index(job, step) * job.h_row
    for row in range(live):
        write_row(h_next + row * h_stride, h + row * job.h_row, job.width)


def forward_turn(address, turn):
    """Turn 0 takes the initial states, turn n the n-th step, and the last one gives the final states."""
    job = layer_at(address)
    h_stride = (job.width + LANES - 1) // LANES * VECTOR
    aux_stride = (job.hidden + LANES - 1) // LANES * VECTOR
    if turn == 0:
        if job.first_block == 0:
            start_states(job, h_stride, aux_stride)
        return
    order = turn - 1
    h_now = job.h_work + order % 2 * job.rows * h_stride
    h_next = job.h_work + turn % 2 * job.rows * h_stride
    live = live_rows(job, step_at(job, order)) if order < job.steps else 0
    if job.first_block == 0 and order > 0:
        for row in range(live, live_rows(job, step_at(job, order - 1))):
            write_row(h_now + row * h_stride, job.h_final + row * job.width * IO_BYTES, job.width)
    if order == job.steps:
        if job.first_block == 0:
            write_aux_finals(job, aux_stride)
        return
    step = step_at(job, order)
    if order % job.chunk == 0:
        project_inputs(job, order, min(order + job.chunk, job.steps))
    if job.starts == 0:
        clear_padding(job, step, live)
    if job.resets:
        apply_resets(job, step, live, h_now, h_stride, aux_stride)
    zero = job.zero_first != 0 and order == 0
    advance(job, step, live, gates_address(job, order, step), h_now, h_next, h_stride, aux_stride, zero)
    if job.w_hr:
        project_output(job, step, live, h_next, h_stride, aux_stride)


def write_aux_finals(job, aux_stride):
    for state in range(AUX):
        for row in range(job.rows):
            out = job.aux_final + state * job.aux_final_step + row * job.hidden * IO_BYTES
            write_row(job.aux_work + (state * job.rows + row) * aux_stride, out, job.hidden)


def layer_forward(address):
    """Run the slice through all steps."""
    run_turns(address, layer_at(address).steps + 2, False)
