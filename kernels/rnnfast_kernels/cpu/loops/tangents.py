"""The time loops of the second derivative: tangents of a layer, and of its gradients; generic over the cell.

The tensors of a layer have given tangents. `layer_jvp` runs from the first step to the last and finds the tangents of
the states and of what the forward loop saved; it is the derivative of `forward.layer_forward`. `layer_hvp` runs back
through time with the gradients and their tangents, side by side; it is the derivative of `backward.layer_backward`
(Pearlmutter, 1994, "Fast exact multiplication by the Hessian"). The cells' part of both is derived (see `equations`).

Each takes two `LAYER` records: `at`, of the layer itself, and `job`, of the tangents of the same tensors, whose field
`around` is the first. The tangent of a product has two terms, `at`'s panels by the tangents and `job`'s by the values;
a tangent that is zero is absent from `job`. Panels of `at` have no bias, those of `job` the bias' tangent. All tensors
are of the dtype computed in.
"""

# ruff: noqa: F821


def gather_inputs(job, source, first, last):
    """Fill in where the rows of the steps at places first to last stand in `source`, and where their gates do."""
    count = 0
    for order in range(first, last):
        step = step_at(job, order)
        live = live_rows(job, step)
        fill_pointers(job.row_pointers + 8 * count, x_address(source, step), source.x_row, live)
        fill_pointers(job.out_pointers + 8 * count, gates_address(job, order, step), job.gates_row, live)
        count += live
    return count


def jvp_inputs(job, at, first, last):
    """Tangent of the input part of the gates."""
    blocks = (job.hidden + LANES - 1) // LANES
    if job.x:
        count = gather_inputs(job, job, first, last)
        project_gate_blocks(
            count, job.row_pointers, ACC_BYTES, at.w_ih, job.inputs, job.hidden, 0, blocks, 0,
            job.out_pointers, job.gate_step, job.tile, False,
        )  # fmt: skip
    if job.w_ih:
        count = gather_inputs(job, at, first, last)
        project_gate_blocks(
            count, job.row_pointers, ACC_BYTES, job.w_ih, job.inputs, job.hidden, 0, blocks, 0,
            job.out_pointers, job.gate_step, job.tile, job.x != 0,
        )  # fmt: skip


def jvp_recurrent(job, at, order, step, live, h_now, h_stride):
    """Tangent of the recurrent part of the gates of one step."""
    blocks = (job.hidden + LANES - 1) // LANES
    fill_pointers(job.row_pointers, h_now, h_stride, live)
    fill_pointers(job.out_pointers, job.u_work, job.u_row, live)
    project_gate_blocks(
        live, job.row_pointers, ACC_BYTES, at.w_hh, job.width, job.hidden, 0, blocks, order % 2,
        job.out_pointers, job.gate_step, job.tile, False,
    )  # fmt: skip
    if job.w_hh:
        for row in range(live):
            store_int(job.row_pointers + 8 * row, entering_states(at, order, step, row)[0])
        project_gate_blocks(
            live, job.row_pointers, ACC_BYTES, job.w_hh, job.width, job.hidden, 0, blocks, order % 2,
            job.out_pointers, job.gate_step, job.tile, True,
        )  # fmt: skip


def jvp_cell(job, at, order, step, row, h_now, h_out):
    """Tangents of a row's states, in place but for h, and of what the cell saved."""
    index = first_index(job, step) + row
    h_before, aux_before, before_step = entering_states(at, order, step, row)
    h_after, aux_after = at.h + index * at.h_row, at.aux + index * at.aux_row
    if at.w_hr:
        h_before, h_after = at.zeros, at.unprojected + index * at.unprojected_row
    kept, u = at.gates + index * at.gates_row, job.u_work + row * job.u_row
    gates = gates_address(job, order, step) + row * job.gates_row
    aux = job.aux_work + row * padded_row(job.hidden)
    aux_step = job.rows * padded_row(job.hidden)
    for unit in range(0, job.hidden, LANES):
        offset, lanes = unit * ACC_BYTES, job.hidden - unit
        x_dot = load_gates(gates + offset, job.gate_step, lanes)
        u_dot = load_gates(u + offset, job.gate_step, lanes)
        state_dot = (load(h_now + offset, LANES),) + load_aux(aux + offset, aux_step, LANES)  # noqa: RUF005
        saved = load_kept(kept + offset, job.hidden * ACC_BYTES, lanes)
        state = (load(h_before + offset, lanes),) + load_aux(aux_before + offset, before_step, lanes)  # noqa: RUF005
        new_state = (load(h_after + offset, lanes),) + load_aux(aux_after + offset, at.aux_step, lanes)  # noqa: RUF005
        new_state_dot, saved_dot = cell_jvp(x_dot, u_dot, state_dot, saved, state, new_state)
        store(h_out + offset, new_state_dot[0], LANES)
        store_tuple(aux + offset, aux_step, new_state_dot[1:], LANES)
        if job.unprojected:
            store(job.unprojected + index * job.unprojected_row + offset, new_state_dot[0], lanes)
        store_tuple(job.aux + index * job.aux_row + offset, job.aux_step, new_state_dot[1:], lanes)
        if job.keep:
            store_tuple(gates + offset, job.gate_step, saved_dot, lanes)


def jvp_output(job, at, step, live, h_next, h_stride):
    """Tangent of h, from that of what the cell put out where a projection follows."""
    h = job.h + first_index(job, step) * job.h_row
    if at.w_hr:
        fill_pointers(job.out_pointers, h_next, h_stride, live)
        fill_pointers(job.row_pointers, job.unprojected_work, padded_row(job.hidden), live)
        project_plain(
            live, job.row_pointers, ACC_BYTES, at.w_hr, job.hidden, job.width, job.out_pointers, 0, job.tile, False
        )
        if job.w_hr:
            fill_pointers(
                job.row_pointers, at.unprojected + first_index(at, step) * at.unprojected_row, at.unprojected_row, live
            )
            project_plain(
                live, job.row_pointers, ACC_BYTES, job.w_hr, job.hidden, job.width, job.out_pointers, 0, job.tile, True
            )
    for row in range(live):
        copy_row(h_next + row * h_stride, h + row * job.h_row, job.width)


def padded_row(units):
    """Bytes of a row of whole vectors."""
    return (units + LANES - 1) // LANES * VECTOR


def layer_jvp(address):
    """Run the slice through all steps."""
    job = layer_at(address)
    at = layer_at(job.around)
    h_stride, aux_stride = padded_row(job.width), padded_row(job.hidden)
    h_now, h_next = job.h_work, job.h_work + job.rows * h_stride
    start_states(job, h_stride, aux_stride)
    for order in range(job.steps):
        if order % job.chunk == 0:
            jvp_inputs(job, at, order, min(order + job.chunk, job.steps))
        step = step_at(job, order)
        live = live_rows(job, step)
        if job.starts == 0:
            clear_padding(job, step, live)
        if job.resets:
            apply_resets(job, step, live, h_now, h_stride, aux_stride)
        jvp_recurrent(job, at, order, step, live, h_now, h_stride)
        for row in range(live):
            out = job.unprojected_work + row * aux_stride if at.w_hr else h_next + row * h_stride
            jvp_cell(job, at, order, step, row, h_now + row * h_stride, out)
        jvp_output(job, at, step, live, h_next, h_stride)
        staying = live_rows(job, step_at(job, order + 1)) if order + 1 < job.steps else 0
        for row in range(staying, live):
            copy_row(h_next + row * h_stride, job.h_final + row * job.width * ACC_BYTES, job.width)
        h_now, h_next = h_next, h_now
    for state in range(AUX):
        for row in range(job.rows):
            out = job.aux_final + state * job.aux_final_step + row * job.hidden * ACC_BYTES
            copy_row(job.aux_work + (state * job.rows + row) * aux_stride, out, job.hidden)


def cell_operands(job, projected, order, step, row, unit):
    """What a cell's backward takes, one vector of each: `dstate`, `saved`, `state`, `new_state`; or their tangents."""
    index = first_index(job, step) + row
    offset, lanes = unit * ACC_BYTES, job.hidden - unit
    h_before, aux_before, before_step = entering_states(job, order, step, row)
    h_after, dh = job.h + index * job.h_row, job.h_work + row * padded_row(job.width)
    if projected:
        h_before, h_after, dh = (
            job.zeros,
            job.unprojected + index * job.unprojected_row,
            job.unprojected_work + row * padded_row(job.hidden),
        )
    daux = job.aux_work + row * padded_row(job.hidden) + offset
    aux_after = job.aux + index * job.aux_row + offset
    dstate = (load(dh + offset, LANES),) + load_aux(daux, job.rows * padded_row(job.hidden), LANES)  # noqa: RUF005
    saved = load_kept(job.gates + index * job.gates_row + offset, job.hidden * ACC_BYTES, lanes)
    state = (load(h_before + offset, lanes),) + load_aux(aux_before + offset, before_step, lanes)  # noqa: RUF005
    new_state = (load(h_after + offset, lanes),) + load_aux(aux_after, job.aux_step, lanes)  # noqa: RUF005
    return dstate, saved, state, new_state


def keep_gradients(job, projected, step, row, unit, dx, du, direct):
    """Keep the gradient by the gates and, in place, by the states that entered the step; or its tangent."""
    offset, lanes = unit * ACC_BYTES, job.hidden - unit
    dgates = (first_index(job, step) + row) * job.dgates_row + offset
    store_tuple(job.dx_gates + dgates, job.hidden * ACC_BYTES, dx, lanes)
    if job.du_gates != job.dx_gates:
        store_tuple(job.du_gates + dgates, job.hidden * ACC_BYTES, du, lanes)
    daux = job.aux_work + row * padded_row(job.hidden) + offset
    store_tuple(daux, job.rows * padded_row(job.hidden), direct[1:], LANES)
    if not projected:
        store(job.h_work + row * padded_row(job.width) + offset, direct[0], LANES)


def hvp_cell(job, at, order, step, row):
    """Gradient by a row's gates and by the states that entered the step, and the tangents of both."""
    projected = at.w_hr != 0
    for unit in range(0, job.hidden, LANES):
        dstate, saved, state, new_state = cell_operands(at, projected, order, step, row, unit)
        dstate_dot, saved_dot, state_dot, new_state_dot = cell_operands(job, projected, order, step, row, unit)
        found, found_dot = cell_hvp(dstate, saved, state, new_state, dstate_dot, saved_dot, state_dot, new_state_dot)
        keep_gradients(at, projected, step, row, unit, found[0], found[1], found[2])
        keep_gradients(job, projected, step, row, unit, found_dot[0], found_dot[1], found_dot[2])


def both_places(row_pointers, start, step, start_dot, step_dot, count):
    """Write the addresses of `count` rows, then those of their tangents."""
    fill_pointers(row_pointers, start, step, count)
    fill_pointers(row_pointers + 8 * count, start_dot, step_dot, count)


def hvp_projection(job, at, step, live):
    """Gradient by what the cell put out, from that by the projected h; and its tangent."""
    index, h_stride, stride = first_index(job, step), padded_row(job.width), padded_row(job.hidden)
    both_places(job.row_pointers, at.h_work, h_stride, job.h_work, h_stride, live)
    both_places(job.out_pointers, at.unprojected_work, stride, job.unprojected_work, stride, live)
    project_plain(
        2 * live, job.row_pointers, ACC_BYTES, at.w_hr, job.width, job.hidden, job.out_pointers, 0, job.tile, False
    )
    if job.w_hr:
        out_pointers = job.out_pointers + 8 * live
        project_plain(
            live, job.row_pointers, ACC_BYTES, job.w_hr, job.width, job.hidden, out_pointers, 0, job.tile, True
        )
    for row in range(live):
        offset = (index + row) * job.dh_total_row
        copy_row(at.h_work + row * h_stride, at.dh_total + offset, job.width)
        copy_row(job.h_work + row * h_stride, job.dh_total + offset, job.width)


def hvp_recurrent(job, at, step, live):
    """Send the gradient by the gates back to the h that entered the step, and its tangent."""
    start, row, h_stride = first_index(job, step) * job.dgates_row, job.dgates_row, padded_row(job.width)
    both_places(job.row_pointers, at.du_gates + start, row, job.du_gates + start, row, live)
    both_places(job.out_pointers, at.h_work, h_stride, job.h_work, h_stride, live)
    depth, direct = GATES * job.hidden, at.w_hr == 0
    project_plain(
        2 * live, job.row_pointers, ACC_BYTES, at.w_hh, depth, job.width, job.out_pointers, 0, job.tile, direct
    )
    if job.w_hh:
        out_pointers = job.out_pointers + 8 * live
        project_plain(live, job.row_pointers, ACC_BYTES, job.w_hh, depth, job.width, out_pointers, 0, job.tile, True)


def layer_hvp(address):
    """Run the slice back through all steps."""
    job = layer_at(address)
    at = layer_at(job.around)
    h_stride, aux_stride = padded_row(job.width), padded_row(job.hidden)
    start_gradients(at, h_stride, aux_stride)
    start_gradients(job, h_stride, aux_stride)
    for order in range(job.steps - 1, -1, -1):
        step = step_at(job, order)
        live = live_rows(job, step)
        if job.starts == 0:
            clear_gradients(at, step, live)
            clear_gradients(job, step, live)
        add_gradients(at, step, live, h_stride, aux_stride)
        if at.w_hr:
            hvp_projection(job, at, step, live)
        for row in range(live):
            hvp_cell(job, at, order, step, row)
        hvp_recurrent(job, at, step, live)
        if job.resets:
            apply_resets(at, step, live, at.h_work, h_stride, aux_stride)
            apply_resets(job, step, live, job.h_work, h_stride, aux_stride)
    end_gradients(job, h_stride, aux_stride)
