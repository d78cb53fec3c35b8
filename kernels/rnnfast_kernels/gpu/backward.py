"""Backpropagation through time: all T steps of a layer in reverse, both directions, in one launch.

T steps, B batch rows, H hidden units, G gates, S state tensors, D directions, R rows of all steps together. Programs,
groups and weights are arranged as in the forward loop; what the members of a group exchange is du, the gradient by the
recurrent part of the gates, G times as much as h.

Where that is too much for each program to read, a group's programs form a grid of SLICES x COLUMNS, program by program
along its lines. A line's programs exchange the du of their own units, which is their slice of k, and multiply it for
all units of their columns; behind a second barrier the programs of a column add up what each slice gives.
"""

import triton
import triton.language as tl

from rnnfast_kernels.gpu.barrier import COUNTER_STRIDE, arrive, wait
from rnnfast_kernels.gpu.given import backward_cell, load_parameters, load_signals
from rnnfast_kernels.gpu.tiles import (
    add,
    add_parts,
    add_product,
    all_rows,
    clear,
    exchange_tile,
    finish_products,
    load_gates,
    load_operands,
    load_states,
    load_weights,
    place,
    resets_of_step,
    rows_of_step,
    select,
    store_gates,
    store_states,
    widen,
    zero_product,
)


@triton.jit
def load_step(p, span, previous, joined, k, reverse, b0, b, n, d, T, B, D, GATES: tl.constexpr, SAVED: tl.constexpr,
              STATES: tl.constexpr, H: tl.constexpr):  # fmt: skip
    """All that a step of backward reads: dstates, saved tiles, the states that entered it and those that left it.

    And, unless `joined` is None, dfinals of the rows from that number on, which begin here their way back in time.
    """
    whole = all_rows(d, b0, B)
    dstates = load_states(p.dstates, span, b, n, d, D, STATES, H)
    dfinals = ()
    if joined is not None:
        dfinals = load_states(p.dfinals, (whole[0], span[1]), b, n, 0, 1, STATES, H, joined)
    new_state = load_states(p.states, span, b, n, d, D, STATES, H)
    saved = ()
    if SAVED > 0:
        saved = load_gates(p.gates, span, b, n, d, D, GATES, H)
    if SAVED > GATES:
        saved = saved + load_gates(p.extra, span, b, n, d, D, SAVED - GATES, H)
    # A row that did not run at the step before has entered with its initial state.
    earlier = load_states(p.states, previous, b, n, d, D, STATES, H)
    initial = load_states(p.initial, (whole[0], span[1]), b, n, 0, 1, STATES, H)
    state = select((b < previous[1])[:, None], earlier, initial, STATES)
    if p.resets is not None:
        state = clear(resets_of_step(p, k, reverse, b0, b, span[1], T, B), state, STATES)
    return dstates, dfinals, saved, state, new_state


@triton.jit
def widen_step(step, SAVED: tl.constexpr, STATES: tl.constexpr, RAGGED: tl.constexpr, DTYPE: tl.constexpr):
    """What `load_step` has loaded, in the compute type, with dfinals added to dstates."""
    dstates, dfinals, saved, state, new_state = step
    dstates = widen(dstates, STATES, DTYPE)
    if RAGGED:
        dstates = add(dstates, widen(dfinals, STATES, DTYPE), STATES)
    return dstates, widen(saved, SAVED, DTYPE), widen(state, STATES, DTYPE), widen(new_state, STATES, DTYPE)


@triton.jit
def slice_of_weights(
    p_w, BLOCK_N: tl.constexpr, H: tl.constexpr, ROW: tl.constexpr, K_LAST: tl.constexpr, COLUMNS: tl.constexpr,
    SLICES: tl.constexpr,
):  # fmt: skip
    """What a program of a grid multiplies with: the units of its column; where the weights of its slice of k begin, and
    how many values of k they are for."""
    SLICE: tl.constexpr = COLUMNS * BLOCK_N
    member = tl.program_id(0) % (SLICES * COLUMNS)
    first = member // COLUMNS * SLICE
    i = tl.arange(0, SLICES * BLOCK_N)
    n = (i // BLOCK_N * COLUMNS + member % COLUMNS) * BLOCK_N + i % BLOCK_N
    if K_LAST:
        # As it is for whole rows, an access of 16 bytes has all of its k or none.
        aligned: tl.constexpr = 128 // p_w.dtype.element_ty.primitive_bitwidth
        return n, p_w + first, tl.multiple_of(tl.minimum(ROW - first, SLICE), aligned)
    else:
        return n, p_w + first * ROW, tl.minimum(H - first, SLICE)


@triton.jit
def parts_tiles(p, BLOCK_B: tl.constexpr, BLOCK_N: tl.constexpr, COLUMNS: tl.constexpr, SLICES: tl.constexpr):
    """The second exchange: a program's tiles for its column, [BLOCK_B, SLICES * BLOCK_N], those of its column for it,
    [SLICES, BLOCK_B, BLOCK_N], the way to the second buffer, and the column's counter."""
    TILE: tl.constexpr = BLOCK_B * BLOCK_N
    program, programs = tl.program_id(0), tl.num_programs(0)
    line, column = program // COLUMNS, program % COLUMNS
    group, own_slice = line // SLICES, line % SLICES
    b, n = tl.arange(0, BLOCK_B), tl.arange(0, BLOCK_N)
    i = tl.arange(0, SLICES * BLOCK_N)
    receiver = (group * SLICES + i // BLOCK_N) * COLUMNS + column
    to_column = (receiver * SLICES + own_slice)[None, :] * TILE + b[:, None] * BLOCK_N + (i % BLOCK_N)[None, :]
    sender = (program * SLICES + tl.arange(0, SLICES))[:, None, None]
    from_column = sender * TILE + (b[:, None] * BLOCK_N + n[None, :])[None, :, :]
    counter = p.counters + (programs // COLUMNS + group * COLUMNS + column) * COUNTER_STRIDE
    return p.parts + to_column, p.parts + from_column, programs * SLICES * TILE, counter


@triton.jit(do_not_specialize=["T", "B", "D", "reversals"])
def backward_loop(
    p, T, B, D, reversals, CELL: tl.constexpr, GATES: tl.constexpr, RECURRENT: tl.constexpr, SAVED: tl.constexpr,
    STATES: tl.constexpr, PARAMETERS: tl.constexpr, SIGNALS: tl.constexpr, VARYING: tl.constexpr, H: tl.constexpr,
    ROW: tl.constexpr, K_LAST: tl.constexpr, PRECISION: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr, SPLIT: tl.constexpr, CHUNKS: tl.constexpr, MEMBERS: tl.constexpr, SLICES: tl.constexpr,
):  # fmt: skip
    """dx[t], du[t], dstate = cell's backward(dstate + dstates[t]); then dh = dh + sum over gates of du[t] W_hh.

    From the last step that ran to the first: `dstate` starts from `dfinals` and ends as `dinitial`, each row at its own
    steps. What a row sends back from a step where it is reset, or where it is not live, is 0.
    """
    RESIDENT: tl.constexpr = p.exchange is None
    RAGGED: tl.constexpr = p.rows is not None
    MORE: tl.constexpr = PARAMETERS + SIGNALS > 0
    DTYPE: tl.constexpr = tl.float64 if p.dx.dtype.element_ty == tl.float64 else tl.float32
    WIDTH: tl.constexpr = CHUNKS * SPLIT * BLOCK_K
    ENTRIES: tl.constexpr = RECURRENT * WIDTH
    COLUMNS: tl.constexpr = MEMBERS // SLICES
    REACH: tl.constexpr = SLICES * BLOCK_N
    _, d, b0, b, n = place(D, BLOCK_B, BLOCK_N, MEMBERS)
    # Step 0 of this loop is the last that ran.
    reverse = ((reversals >> d) & 1) == 0
    whole = all_rows(d, b0, B)

    if RECURRENT > 0:
        p_w = p.w_hh + d.to(tl.int64) * (RECURRENT * H * ROW)
        if SLICES > 1:
            n_column, p_w, count = slice_of_weights(p_w, BLOCK_N, H, ROW, K_LAST, COLUMNS, SLICES)
            p_to_column, p_from_column, parts_slot, column_counter = parts_tiles(p, BLOCK_B, BLOCK_N, COLUMNS, SLICES)
        else:
            n_column = n
            count: tl.constexpr = ROW if K_LAST else H
        weights = load_weights(p_w, n_column, count, RECURRENT, CHUNKS, H, ROW, K_LAST, SPLIT, BLOCK_K)
    parameters = load_parameters(p.parameters, d, n, PARAMETERS, H, BLOCK_B, DTYPE)
    dparameters = (tl.zeros([BLOCK_B, BLOCK_N], DTYPE),) * PARAMETERS
    if not RESIDENT:
        line, first = tl.program_id(0) // COLUMNS, tl.program_id(0) % COLUMNS * BLOCK_N
        tile, slot, own = exchange_tile(p, line, first + tl.arange(0, BLOCK_N), BLOCK_B, ENTRIES, COLUMNS)
        present = (b < whole[1])[:, None] & (n < H)[None, :]
        counter = p.counters + line * COUNTER_STRIDE

    # One step ahead throughout: nothing but du is waited for inside a step.
    span = rows_of_step(p, 0, reverse, T, B, b0)
    next_span = rows_of_step(p, 1, reverse, T, B, b0)
    after_next = rows_of_step(p, 2, reverse, T, B, b0)
    step = load_step(
        p, span, next_span, 0 if RAGGED else None, 0, reverse, b0, b, n, d, T, B, D, GATES, SAVED, STATES, H
    )
    signals = load_signals(p.signals, 0, reverse, span, b0, b, n, T, B, SIGNALS, VARYING, H)
    dstate = widen(load_states(p.dfinals, whole, b, n, 0, 1, STATES, H), STATES, DTYPE)
    if RAGGED:
        # Rows begin with their own last step; those that never run end as they would begin.
        most = rows_of_step(p, 0, False, T, B, b0)[1]
        store_states(p.dinitial, dstate, whole, b, n, 0, 1, STATES, H, most)
        dstate = clear((b < whole[1])[:, None], dstate, STATES)

    for k in range(T):
        joined = span[1] if RAGGED else None
        next_step = load_step(
            p, next_span, after_next, joined, k + 1, reverse, b0, b, n, d, T, B, D, GATES, SAVED, STATES, H
        )
        next_signals = load_signals(p.signals, k + 1, reverse, next_span, b0, b, n, T, B, SIGNALS, VARYING, H)
        third_span = rows_of_step(p, k + 3, reverse, T, B, b0)
        if p.resets is not None:
            reset = resets_of_step(p, k, reverse, b0, b, span[1], T, B)
        dstates, saved, state, new_state = widen_step(step, SAVED, STATES, RAGGED, DTYPE)
        dnew, given = add(dstate, dstates, STATES), widen(signals, SIGNALS, DTYPE)
        dx, du, direct, dp, ds = backward_cell(CELL, dnew, saved, state, new_state, parameters, given, MORE)
        # Before the product rather than after it, so that nothing is held meanwhile.
        sent = du
        if p.resets is not None:
            sent, direct = clear(reset, sent, RECURRENT), clear(reset, direct, STATES)
        if RAGGED:
            ended = (b >= span[1])[:, None]
            sent, direct = clear(ended, sent, RECURRENT), clear(ended, direct, STATES)
            dp = clear(ended, dp, PARAMETERS)
        dparameters = add(dparameters, dp, PARAMETERS)
        if not RESIDENT:
            p_slot = tile + k % 2 * slot
            for g in tl.static_range(RECURRENT):
                p_du = p_slot + g * WIDTH + own
                tl.store(p_du, sent[g].to(p.exchange.dtype.element_ty), mask=present)
            arrive(counter)
        store_gates(p.dx, dx, span, b, n, d, D, GATES, 0, H)
        if p.du is not None:
            store_gates(p.du, du, span, b, n, d, D, RECURRENT, 0, H)
        if p.dsignals is not None:
            store_gates(p.dsignals, ds, span, b, n, d, D, SIGNALS, 0, H)
        if not RESIDENT:
            wait(counter, (k + 1) * COLUMNS)
            operands = ()
            for g in tl.static_range(RECURRENT):
                p_gate = p_slot + g * WIDTH
                operands = operands + (load_operands(p_gate, whole[1], CHUNKS, BLOCK_B, ENTRIES, SPLIT, BLOCK_K),)
        elif RECURRENT > 0:
            operands = ()
            for g in tl.static_range(RECURRENT):
                operands = operands + ((sent[g].to(p.w_hh.dtype.element_ty),),)
        dh = zero_product(BLOCK_B, REACH, SPLIT)
        if BLOCK_B * REACH <= 2048:
            # A sum for each gate, so that products need not wait for one another.
            for g in tl.static_range(RECURRENT):
                product = zero_product(BLOCK_B, REACH, SPLIT)
                for j in tl.static_range(CHUNKS):
                    product = add_product(operands[g][j], weights[g][j], product, PRECISION)
                dh += product
        else:
            for j in tl.static_range(CHUNKS):
                for g in tl.static_range(RECURRENT):
                    dh = add_product(operands[g][j], weights[g][j], dh, PRECISION)
        (dh,) = finish_products((dh,), 1, BLOCK_B, REACH, SPLIT)
        if SLICES > 1:
            tl.store(p_to_column + k % 2 * parts_slot, dh, mask=(b < whole[1])[:, None])
            arrive(column_counter)
            wait(column_counter, (k + 1) * SLICES)
            dh = add_parts(tl.load(p_from_column + k % 2 * parts_slot, cache_modifier=".cg"), SLICES)
        dentering = direct
        if RECURRENT > 0:
            dentering = (direct[0] + dh,)
            for s in tl.static_range(1, STATES):
                dentering = dentering + (direct[s],)
        dstate = dentering
        if RAGGED:
            store_states(p.dinitial, dstate, (whole[0], span[1]), b, n, 0, 1, STATES, H, next_span[1])
        step = next_step
        signals = next_signals
        span = next_span
        next_span = after_next
        after_next = third_span

    if not RAGGED:
        store_states(p.dinitial, dstate, whole, b, n, 0, 1, STATES, H)
    if PARAMETERS > 0:
        store_gates(p.dparameters, dparameters, whole, b, n, 0, 1, PARAMETERS, 0, H)
