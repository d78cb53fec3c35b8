"""The time loops: one layer, one direction, a slice of the batch, all steps; generic over the cell.

Both are bound over a cell, a dtype and a target, and take the address of a record of `LAYER` fields. What they call
`state` is the cell's output state h and, apart from it, its `aux` states (c of an LSTM), which no product needs.
"""

# ruff: noqa: F821

from rnnfast_kernels.cpu.job import Record

# Sizes are in elements and rows, strides ("_row", "_step") in bytes, other fields addresses, of which 0 means absent.
LAYER = Record(
    # The slice of rows, and the steps: `sizes` the batch sizes, `starts` the index of each step's first row if packed.
    "steps", "batch", "first_row", "rows", "reverse", "sizes", "starts", "resets",
    "inputs", "hidden", "width",
    # Input, and the panels of the weights; if `unpacked`, the weights as they are, and their biases.
    "x", "x_row", "x_step", "w_ih", "w_hh", "w_hr", "unpacked", "b_ih", "b_hh",
    # Initial and final states.
    "h_first", "h_first_row", "aux_first", "aux_first_row", "aux_first_step",
    "h_final", "aux_final", "aux_final_step",
    # States after every step: h is [rows, width], each aux state [rows, hidden].
    "h", "h_row", "aux", "aux_row", "aux_step",
    # Gates, then what is saved, [rows, Cell.kept or G, hidden]; for all steps if `keep`, else for a chunk of steps.
    "gates", "gates_row", "gate_step", "keep", "chunk", "unprojected", "unprojected_row",
    # Gradients.
    "dh", "dh_row", "daux", "daux_row", "daux_step",
    "dh_final", "daux_final", "daux_final_step", "dh_first", "daux_first", "daux_first_step",
    "dx_gates", "du_gates", "dgates_row", "dh_total", "dh_total_row", "du_row",
    # Scratch of this job; `zeros` is a row of zeros.
    "tile", "row_pointers", "operands", "out_pointers", "h_work", "aux_work", "unprojected_work", "zeros",
    # Blocks of hidden units that this job computes. If these are not all, the slice has `workers` such jobs, the parts,
    # whose records follow one another from `parts` on. They share the slice's work space. `claimed` is the address of a
    # count of the phases of this part that a thread has taken, `finished` that of the phases of all parts that are done
    # (see `run_phases`). `sched_yield` is that function.
    "first_block", "last_block", "workers", "parts", "claimed", "finished", "sched_yield",
    # Where this record is of a layer's changes (see `second`): the record of the layer itself, and scratch for the
    # recurrent part of a step's gates, [rows, G, hidden].
    "around", "u_work", "u_row",
    # Parameters [P, hidden]; the records of signals (see `signals`); and gradients by both, [rows, P or N, hidden].
    "parameters", "signals", "dparameters", "dparameters_row", "dsignals", "dsignals_row",
)  # fmt: skip

# Bytes of a record.
LAYER_BYTES = 8 * len(LAYER.names)
# Looks at a counter, a fraction of a microsecond each, before a thread does the part of another one, before it does so
# where that one was absent the last time, and before it offers its core to other threads.
PATIENCE, SHORT_PATIENCE, REST = 48, 8, 64


def live_rows(job, step):
    """Rows of the slice that are valid at a step."""
    if job.sizes == 0:
        return job.rows
    return max(0, min(load_int(job.sizes + 8 * step) - job.first_row, job.rows))


def first_index(job, step):
    """Index of the slice's first row of a step among the rows of all steps."""
    if job.starts == 0:
        return step * job.batch + job.first_row
    return load_int(job.starts + 8 * step) + job.first_row


def x_address(job, step):
    if job.starts == 0:
        return job.x + step * job.x_step + job.first_row * job.x_row
    return job.x + first_index(job, step) * job.x_row


def is_reset(job, step, row):
    return job.resets != 0 and load_flag(job.resets + step * job.batch + job.first_row + row)


def step_at(job, order):
    """The step that comes at place `order` of the recurrence."""
    return job.steps - 1 - order if job.reverse else order


def gates_address(job, order, step):
    """Gates of the slice's first row at a step."""
    if job.keep:
        return job.gates + first_index(job, step) * job.gates_row
    return job.gates + (order % job.chunk) * job.rows * job.gates_row


def run_phases(address, phases, backward):
    """Run all phases of a part, and those of other parts whose threads do not come.

    A phase of a part is taken by whoever first adds one to the part's count `claimed`; phase n + 1 begins when all
    parts have finished phase n. Usually every thread takes its own part. One that the scheduler has stopped holds up
    the others only if that happens within a phase: elsewhere they take its part, and it skips what was done meanwhile.
    """
    job = layer_at(address)
    if job.workers == 1:
        for phase in range(phases):
            run_phase(address, phase, backward)
        return
    patience = PATIENCE
    for phase in range(phases):
        if claim(job.claimed, phase):
            run_phase(address, phase, backward)
            arrive(job.finished)
        goal = (phase + 1) * job.workers
        looks = 0
        while count_of(job.finished) < goal:
            pause()
            looks += 1
            if looks == patience:
                patience = PATIENCE
                for part in range(job.workers):
                    other = job.parts + part * LAYER_BYTES
                    if claim(layer_at(other).claimed, phase):
                        run_phase(other, phase, backward)
                        arrive(job.finished)
                        patience = SHORT_PATIENCE
            if looks > REST:
                call_address(job.sched_yield)


def run_phase(address, phase, backward):
    """Run one phase of a part."""
    if backward:
        backward_phase(address, phase)
    else:
        forward_phase(address, phase)


def run_forward_phase(address, phase, backward):
    """Stand in for `run_phase` where there is no backward pass."""
    forward_phase(address, phase)


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
        count, row_pointers, ACC_BYTES, job.w_ih, job.inputs, job.hidden, job.first_block, job.last_block,
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


def advance(job, step, live, gates, h_now, h_next, h_stride, aux_stride):
    """One step for all live rows: tile by tile the recurrent product, followed at once by the cell."""
    fill_pointers(job.row_pointers, h_now, h_stride, live)
    row_pointers = as_operands(live, job.row_pointers, job.width, job.operands)
    index = first_index(job, step)
    cell_out = job.unprojected_work if job.w_hr else h_next
    cell_stride = aux_stride if job.w_hr else h_stride
    block = job.first_block
    while block < job.last_block:
        blocks = 1 if job.unpacked else recurrent_blocks(job.last_block - block)
        panel = job.w_hh + block * (HEAD + lines(job.width)) * RECURRENT * VECTOR
        first = 0
        while first < live:
            count = recurrent_rows(live - first)
            if job.unpacked:
                multiply_block(count, row_pointers, job.w_hh, job.b_hh, job.width, job.hidden, block * LANES, job.tile)
            elif RECURRENT > 0:
                multiply(
                    blocks * RECURRENT, count, row_pointers + 8 * first, ACC_BYTES, panel, lines(job.width), job.tile
                )
            for row in range(first, first + count):
                for i in range(blocks):
                    unit = (block + i) * LANES
                    lanes = job.hidden - unit
                    place = unit * ACC_BYTES
                    u = load_recurrent(job.tile + ((row - first) * blocks + i) * RECURRENT * VECTOR, VECTOR, LANES)
                    x = load_gates(gates + row * job.gates_row + place, job.gate_step, lanes)
                    h = load(h_now + row * h_stride + place, LANES)
                    aux = job.aux_work + row * aux_stride + place
                    state = (h,) + load_aux(aux, job.rows * aux_stride, LANES)  # noqa: RUF005
                    p = load_parameters(job.parameters + unit * IO_BYTES, job.hidden * IO_BYTES, lanes)
                    s = load_signals(job.signals, step, job.first_row + row, unit, lanes)
                    new_state, kept = cell_forward(x, u, state, p, s)
                    store(cell_out + row * cell_stride + place, new_state[0], LANES)
                    store_tuple(aux, job.rows * aux_stride, new_state[1:], LANES)
                    if job.w_hr == 0:
                        store_io(job.h + (index + row) * job.h_row + unit * IO_BYTES, new_state[0], lanes)
                    elif job.unprojected:
                        store_io(
                            job.unprojected + (index + row) * job.unprojected_row + unit * IO_BYTES, new_state[0], lanes
                        )
                    if job.aux:
                        spot = job.aux + (index + row) * job.aux_row + unit * IO_BYTES
                        store_io_tuple(spot, job.aux_step, new_state[1:], lanes)
                    if job.keep:
                        store_tuple(gates + row * job.gates_row + place, job.gate_step, kept, lanes)
            first += count
        block += blocks


def project_output(job, step, live, h_next, h_stride, unprojected_stride):
    """h = W_hr times what the cell put out."""
    fill_pointers(job.row_pointers, job.unprojected_work, unprojected_stride, live)
    fill_pointers(job.out_pointers, h_next, h_stride, live)
    row_pointers = as_operands(live, job.row_pointers, job.hidden, job.operands)
    project_plain(live, row_pointers, ACC_BYTES, job.w_hr, job.hidden, job.width, job.out_pointers, 0, job.tile, False)
    h = job.h + first_index(job, step) * job.h_row
    for row in range(live):
        write_row(h_next + row * h_stride, h + row * job.h_row, job.width)


def forward_phase(address, phase):
    """Phase 0 takes the initial states, phase n the n-th step, and the last one gives the final states."""
    job = layer_at(address)
    h_stride = (job.width + LANES - 1) // LANES * VECTOR
    aux_stride = (job.hidden + LANES - 1) // LANES * VECTOR
    if phase == 0:
        if job.first_block == 0:
            start_states(job, h_stride, aux_stride)
        return
    order = phase - 1
    h_now = job.h_work + order % 2 * job.rows * h_stride
    h_next = job.h_work + phase % 2 * job.rows * h_stride
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
    advance(job, step, live, gates_address(job, order, step), h_now, h_next, h_stride, aux_stride)
    if job.w_hr:
        project_output(job, step, live, h_next, h_stride, aux_stride)


def write_aux_finals(job, aux_stride):
    for state in range(AUX):
        for row in range(job.rows):
            goal = job.aux_final + state * job.aux_final_step + row * job.hidden * IO_BYTES
            write_row(job.aux_work + (state * job.rows + row) * aux_stride, goal, job.hidden)


def layer_forward(address):
    """Run the slice through all steps."""
    run_phases(address, layer_at(address).steps + 2, False)


def start_gradients(job, h_stride, aux_stride):
    """The gradient by a row's final state is where its recurrence back in time starts."""
    for row in range(job.rows):
        goal = job.h_work + row * h_stride
        source = job.dh_final + row * job.width * IO_BYTES if job.dh_final else job.zeros
        read_row(source, goal, job.width)
        for state in range(AUX):
            goal = job.aux_work + (state * job.rows + row) * aux_stride
            source = job.daux_final + state * job.daux_final_step + row * job.hidden * IO_BYTES
            read_row(source if job.daux_final else job.zeros, goal, job.hidden)


def end_gradients(job, h_stride, aux_stride):
    """What has come back to the first step is the gradient by the initial state."""
    for row in range(job.rows):
        write_row(job.h_work + row * h_stride, job.dh_first + row * job.width * IO_BYTES, job.width)
        for state in range(AUX):
            goal = job.daux_first + state * job.daux_first_step + row * job.hidden * IO_BYTES
            write_row(job.aux_work + (state * job.rows + row) * aux_stride, goal, job.hidden)


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
                goal = job.aux_work + (state * job.rows + row) * aux_stride
                add_io_row(source + start * IO_BYTES, goal + start * ACC_BYTES, units)


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
        place, given, lanes = unit * ACC_BYTES, unit * IO_BYTES, job.hidden - unit
        dstate = (load(dh_in + place, LANES),) + load_aux(daux + place, job.rows * aux_stride, LANES)  # noqa: RUF005
        kept = load_kept(gates + place, gate_step, lanes)
        aux = load_io_aux(aux_before + given, before_step, lanes)
        state = (load_io(h_before + given, lanes),) + aux  # noqa: RUF005
        aux = load_io_aux(aux_after + given, job.aux_step, lanes)
        new_state = (load_io(h_after + given, lanes),) + aux  # noqa: RUF005
        p = load_parameters(job.parameters + given, job.hidden * IO_BYTES, lanes)
        s = load_signals(job.signals, step, job.first_row + row, unit, lanes)
        dx, du, direct, dp, ds = cell_backward(dstate, kept, state, new_state, p, s)
        store_tuple(job.dx_gates + dgates + place, gate_step, dx, lanes)
        if job.du_gates != job.dx_gates:
            store_tuple(job.du_gates + index * job.du_row + place, gate_step, du, lanes)
        store_tuple(job.dparameters + index * job.dparameters_row + place, gate_step, dp, lanes)
        if job.dsignals:
            store_tuple(job.dsignals + index * job.dsignals_row + place, gate_step, ds, lanes)
        store(dh_in + place, direct[0], LANES)
        store_tuple(daux + place, job.rows * aux_stride, direct[1:], LANES)


def clear_gradients(job, step, live):
    """Zero the gates' gradients in the rows that a step of the padded layout does not have."""
    for row in range(live, job.rows):
        index = first_index(job, step) + row
        clear_row(job.dx_gates + index * job.dgates_row, GATES * job.hidden)
        clear_row(job.du_gates + index * job.du_row, RECURRENT * job.hidden)
        clear_row(job.dparameters + index * job.dparameters_row, PARAMETERS * job.hidden)
        if job.dsignals:
            clear_row(job.dsignals + index * job.dsignals_row, SIGNALS * job.hidden)


def backward_phase(address, phase):
    """Phase 0 takes the gradients by the final states, phase n goes back through the n-th step from the last.

    The product that takes a step's gradients to the h that entered it wants all its gates, so it stands at the
    beginning of the next phase. The last phase gives the gradients by the initial states.
    """
    job = layer_at(address)
    h_stride = (job.width + LANES - 1) // LANES * VECTOR
    aux_stride = (job.hidden + LANES - 1) // LANES * VECTOR
    order = job.steps - phase
    if phase == 0:
        if job.first_block == 0:
            start_gradients(job, h_stride, aux_stride)
        return
    if order < -1:
        if job.first_block == 0:
            end_gradients(job, h_stride, aux_stride)
        return
    if phase == 1:
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
            goal = job.dh_total + (index + row) * job.dh_total_row
            copy_row(job.h_work + row * h_stride, goal, job.width)
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
            job.out_pointers, 0, job.tile, job.w_hr == 0,
        )  # fmt: skip
    for row in range(live):
        if is_reset(job, step, row):
            clear_row(job.h_work + row * h_stride, job.width)
            for state in range(AUX):
                clear_row(job.aux_work + (state * job.rows + row) * aux_stride, job.hidden)


def layer_backward(address):
    """Run the slice back through all steps: gradients by the gates and, if wanted, by the initial states."""
    job = layer_at(address)
    run_phases(address, job.steps + (3 if job.dh_first else 1), True)
