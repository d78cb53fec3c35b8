"""What the time loops share: the record of a layer's job, the rows of a step, and the turns of threads.

A loop runs one direction of a layer over a slice of the batch, for all steps. The loops are bound over a cell, a dtype
and a target, and take the address of a record of `LAYER` fields. What they call `state` is the cell's output state h
and, apart from it, its `aux` states (c of an LSTM), which no product needs.
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
    # Initial and final states; `zero_first` where the initial ones are zero and the weights finite.
    "zero_first", "h_first", "h_first_row", "aux_first", "aux_first_row", "aux_first_step",
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
    # count of the turns of this part that a thread has taken, `finished` that of the turns of all parts that are done
    # (see `run_turns`). `sched_yield` is that function.
    "first_block", "last_block", "workers", "parts", "claimed", "finished", "sched_yield",
    # Where this record is of tangents (see `tangents`): the record of the layer itself, and scratch for the
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


def run_turns(address, turns, backward):
    """Run all turns of a part, and those of other parts whose threads do not come.

    A turn of a part is taken by whoever first adds one to the part's count `claimed`; turn n + 1 begins when all
    parts have finished turn n. Usually every thread takes its own part. One that the scheduler has stopped holds up
    the others only if that happens within a turn: elsewhere they take its part, and it skips what was done meanwhile.
    """
    job = layer_at(address)
    if job.workers == 1:
        for turn in range(turns):
            run_turn(address, turn, backward)
        return
    patience = PATIENCE
    for turn in range(turns):
        if claim(job.claimed, turn):
            run_turn(address, turn, backward)
            arrive(job.finished)
        expected = (turn + 1) * job.workers
        looks = 0
        while count_of(job.finished) < expected:
            pause()
            looks += 1
            if looks == patience:
                patience = PATIENCE
                for part in range(job.workers):
                    other = job.parts + part * LAYER_BYTES
                    if claim(layer_at(other).claimed, turn):
                        run_turn(other, turn, backward)
                        arrive(job.finished)
                        patience = SHORT_PATIENCE
            if looks > REST:
                call_address(job.sched_yield)


def run_turn(address, turn, backward):
    """Run one turn of a part."""
    if backward:
        backward_turn(address, turn)
    else:
        forward_turn(address, turn)


def run_forward_turn(address, turn, backward):
    """Stand in for `run_turn` where there is no backward pass."""
    forward_turn(address, turn)
