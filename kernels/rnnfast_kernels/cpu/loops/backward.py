"""The backward loop: from the last step to the first, it writes the gates' gradients. See `forward`."""

# ruff: noqa: F821


def start_gradients(job, h_stride, aux_stride):
    """The gradient by a row's final state is where its recurrence back in time starts."""
    for row in range(job.rows):
        out = job.h_work + row * h_stride
        source = job.dh_final + row * job.width * IO_BYTES if job.dh_final else job.zeros
        read_row(source, out, job.width)
        for state in range(AUX):
            out = job.aux_work + (state * job.rows + row) * aux_stride
            source = job.daux_final + state * job.daux_final_step + row * job.hidden * IO_BYTES
            read_row(source if job.daux_final else job.zeros, out, job.hidden)


def end_gradients(job, h_stride, aux_stride):
    """What has come back to the first step is the gradient by the initial state."""
    for row in range(job.rows):
        write_row(job.h_work + row * h_stride, job.dh_first + row * job.width * IO_BYTES, job.width)
        for state in range(AUX):
            out = job.daux_first + state * job.daux_first_step + row * job.hidden * IO_BYTES
            write_row(job.aux_work + (state * job.rows + row) * aux_stride, out, job.hidden)


def last_unit(job, units):
    return min(job.last_block * LANES, units)


def last_width_block(job):
    """End of this job's blocks of h; with a projection, whose width is another, a job has them all."""
    return job.last_block if job.w_hr == 0 else (job.width + LANES - 1) // LANES


def add_gradients(job, step, live, h_stride, aux_stride):
    """Add the gradient by the states that the caller saw."""
    index = first_index(job, step)
    start = job.first_block * LANES
    units = last_unit(job, job.hidden) - start
    h_units = units if job.w_hr == 0 else job.width
    for row in range(live):
        if job.dh:
            source = job.dh + (index + row) * job.dh_row
            add_io_row(source + start * IO_BYTES, job.h_work + row * h_stride + start * ACC_BYTES, h_units)
        if job.daux:
            for state in range(AUX):
                source = job.daux + state * job.daux_step + (index + row) * job.daux_row
                out = job.aux_work + (state * job.rows + row) * aux_stride
                add_io_row(source + start * IO_BYTES, out + start * ACC_BYTES, units)


def entering_states(job, order, step, row):
    """Addresses of the states that a row entered a step with, h and aux, and the distance between the aux ones."""
    if is_reset(job, step, row):
        return job.zeros, job.zeros, 0
    if order > 0:
        before = step_at(job, order - 1)
        if row < live_rows(job, before):
            index = first_index(job, before) + row
            return job.h + index * job.h_row, job.aux + index * job.aux_row, job.aux_step
    return job.h_first + row * job.h_first_row, job.aux_first + row * job.aux_first_row, job.aux_first_step


def differentiate_cell(job, order, step, row, h_stride, aux_stride):
    """Gradient by a row's gates and, in place, by the states that entered the step (but for the recurrent product)."""
    index = first_index(job, step) + row
    h_before, aux_before, before_step = entering_states(job, order, step, row)
    h_after = job.h + index * job.h_row
    dh_in = job.h_work + row * h_stride
    if job.w_hr:
        h_before = job.zeros
        h_after = job.unprojected + index * job.unprojected_row
        dh_in = job.unprojected_work + row * aux_stride
    aux_after = job.aux + index * job.aux_row
    daux = job.aux_work + row * aux_stride
    gates = job.gates + index * job.gates_row
    dgates = index * job.dgates_row
    gate_step = job.hidden * ACC_BYTES
    for unit in range(job.first_block * LANES, last_unit(job, job.hidden), LANES):
        offset, given, lanes = unit * ACC_BYTES, unit * IO_BYTES, job.hidden - unit
        dstate = (load(dh_in + offset, LANES),) + load_aux(daux + offset, job.rows * aux_stride, LANES)  # noqa: RUF005
        kept = load_kept(gates + offset, gate_step, lanes)
        aux = load_io_aux(aux_before + given, before_step, lanes)
        state = (load_io(h_before + given, lanes),) + aux  # noqa: RUF005
        aux = load_io_aux(aux_after + given, job.aux_step, lanes)
        new_state = (load_io(h_after + given, lanes),) + aux  # noqa: RUF005
        p = load_parameters(job.parameters + given, job.hidden * IO_BYTES, lanes)
        s = load_signals(job.signals, step, job.first_row + row, unit, lanes)
        dx, du, direct, dp, ds = cell_backward(dstate, kept, state, new_state, p, s)
        store_tuple(job.dx_gates + dgates + offset, gate_step, dx, lanes)
        if job.du_gates != job.dx_gates:
            store_tuple(job.du_gates + index * job.du_row + offset, gate_step, du, lanes)
        store_tuple(job.dparameters + index * job.dparameters_row + offset, gate_step, dp, lanes)
        if job.dsignals:
            store_tuple(job.dsignals + index * job.dsignals_row + offset, gate_step, ds, lanes)
        store(dh_in + offset, direct[0], LANES)
        store_tuple(daux + offset, job.rows * aux_stride, direct[1:], LANES)


def clear_gradients(job, step, live):
    """Zero the gates' gradients in the rows that a step of the padded layout does not have."""
    for row in range(live, job.rows):
        index = first_index(job, step) + row
        clear_row(job.dx_gates + index * job.dgates_row, GATES * job.hidden)
        clear_row(job.du_gates + index * job.du_row, RECURRENT * job.hidden)
        clear_row(job.dparameters + index * job.dparameters_row, PARAMETERS * job.hidden)
        if job.dsignals:
            clear_row(job.dsignals + index * job.dsignals_row, SIGNALS * job.hidden)


def backward_turn(address, turn):
    """Turn 0 takes the gradients by the final states, turn n goes back through the n-th step from the last.

    The product that takes a step's gradients to the h that entered it wants all its gates, so it stands at the
    beginning of the next turn. The last turn gives the gradients by the initial states.
    """
    job = layer_at(address)
    h_stride = (job.width + LANES - 1) // LANES * VECTOR
    aux_stride = (job.hidden + LANES - 1) // LANES * VECTOR
    order = job.steps - turn
    if turn == 0:
        if job.first_block == 0:
            start_gradients(job, h_stride, aux_stride)
        return
    if order < -1:
        if job.first_block == 0:
            end_gradients(job, h_stride, aux_stride)
        return
    if turn == 1:
        fill_pointers(job.out_pointers, job.h_work, h_stride, job.rows)
    else:
        through_recurrent(job, order + 1, h_stride, aux_stride)
    if order >= 0:
        through_cell(job, order, h_stride, aux_stride)


def through_cell(job, order, h_stride, aux_stride):
    """From the gradients by a step's states to those by its gates."""
    step = step_at(job, order)
    live = live_rows(job, step)
    index = first_index(job, step)
    if job.starts == 0:
        clear_gradients(job, step, live)
    add_gradients(job, step, live, h_stride, aux_stride)
    if job.w_hr:
        fill_pointers(job.row_pointers, job.unprojected_work, aux_stride, live)
        rows = as_operands(live, job.out_pointers, job.width, job.operands)
        project_plain(live, rows, ACC_BYTES, job.w_hr, job.width, job.hidden, job.row_pointers, 0, job.tile, False)
        for row in range(live):
            out = job.dh_total + (index + row) * job.dh_total_row
            copy_row(job.h_work + row * h_stride, out, job.width)
    for row in range(live):
        differentiate_cell(job, order, step, row, h_stride, aux_stride)


def through_recurrent(job, order, h_stride, aux_stride):
    """From the gradients by a step's gates to those by the states that entered it."""
    step = step_at(job, order)
    live = live_rows(job, step)
    if RECURRENT > 0:
        fill_pointers(job.row_pointers, job.du_gates + first_index(job, step) * job.du_row, job.du_row, live)
        depth = RECURRENT * job.hidden
        row_pointers = as_operands(live, job.row_pointers, depth, job.operands)
        project_plain_blocks(
            live, row_pointers, ACC_BYTES, job.w_hh, depth, job.width, job.first_block, last_width_block(job),
            order % 2, job.out_pointers, 0, job.tile, job.w_hr == 0,
        )  # fmt: skip
    for row in range(live):
        if is_reset(job, step, row):
            clear_row(job.h_work + row * h_stride, job.width)
            for state in range(AUX):
                clear_row(job.aux_work + (state * job.rows + row) * aux_stride, job.hidden)


def layer_backward(address):
    """Run the slice back through all steps: gradients by the gates and, if wanted, by the initial states."""
    job = layer_at(address)
    run_turns(address, job.steps + (3 if job.dh_first else 1), True)
