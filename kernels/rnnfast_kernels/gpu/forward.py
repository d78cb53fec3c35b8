"""The forward time loop: all T steps of a layer, both directions, in one launch.

T steps, B batch rows, H hidden units, G gates, S state tensors, D directions, R rows of all steps together.

Resident (nothing exchanged): a program holds all recurrent weights and runs a tile of batch rows alone. So do the
MEMBERS programs of a cell without a recurrent product, with BLOCK_N hidden units each and no weights.
Cooperative: MEMBERS programs form a group that shares a tile of batch rows; each holds the weights of BLOCK_N hidden
units, and after each step the members exchange their parts of h through global memory, behind a barrier.
"""

import triton
import triton.language as tl

from rnnfast_kernels.gpu.barrier import COUNTER_STRIDE, arrive, wait
from rnnfast_kernels.gpu.given import forward_cell, load_parameters, load_signals
from rnnfast_kernels.gpu.tiles import (
    add,
    add_product,
    all_rows,
    clear,
    exchange_tile,
    finish_products,
    load_bias,
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


@triton.jit(do_not_specialize=["T", "B", "D", "reversals"])
def forward_loop(
    p, T, B, D, reversals, CELL: tl.constexpr, GATES: tl.constexpr, RECURRENT: tl.constexpr, SAVED: tl.constexpr,
    STATES: tl.constexpr, PARAMETERS: tl.constexpr, SIGNALS: tl.constexpr, VARYING: tl.constexpr, H: tl.constexpr,
    ROW: tl.constexpr, K_LAST: tl.constexpr, PRECISION: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr, SPLIT: tl.constexpr, CHUNKS: tl.constexpr, MEMBERS: tl.constexpr,
):  # fmt: skip
    """state[t] = cell(x[t], W_hh h[t-1] + b_hh, state[t-1]) for every step, from `initial` to `finals`.

    A row that is not live at a step keeps its state: it has ended, or, in reverse, has not begun. A reset clears the
    state that enters a step. Bit d of `reversals` says that direction d runs from the last step to the first.
    RECURRENT of the gates have a recurrent part. SAVED is the number of the cell's saved tiles, or 0 where backward
    will not follow.
    """
    RESIDENT: tl.constexpr = p.exchange is None
    MORE: tl.constexpr = PARAMETERS + SIGNALS > 0
    DTYPE: tl.constexpr = tl.float64 if p.gates.dtype.element_ty == tl.float64 else tl.float32
    WIDTH: tl.constexpr = CHUNKS * SPLIT * BLOCK_K
    group, d, b0, b, n = place(D, BLOCK_B, BLOCK_N, MEMBERS)
    reverse = ((reversals >> d) & 1) != 0
    whole = all_rows(d, b0, B)

    if RECURRENT > 0:
        p_w = p.w_hh + d.to(tl.int64) * (RECURRENT * H * ROW)
        count: tl.constexpr = ROW if K_LAST else H
        weights = load_weights(p_w, n, count, RECURRENT, CHUNKS, H, ROW, K_LAST, SPLIT, BLOCK_K)
    bias = load_bias(p.b_hh, d, n, RECURRENT, H, DTYPE)
    parameters = load_parameters(p.parameters, d, n, PARAMETERS, H, BLOCK_B, DTYPE)

    # One step ahead throughout: nothing but h is waited for inside a step.
    span = rows_of_step(p, 0, reverse, T, B, b0)
    next_span = rows_of_step(p, 1, reverse, T, B, b0)
    x = load_gates(p.gates, span, b, n, d, D, GATES, H)
    signals = load_signals(p.signals, 0, reverse, span, b0, b, n, T, B, SIGNALS, VARYING, H)
    state = widen(load_states(p.initial, whole, b, n, 0, 1, STATES, H), STATES, DTYPE)
    if p.resets is not None:
        state = clear(resets_of_step(p, 0, reverse, b0, b, span[1], T, B), state, STATES)
    if not RESIDENT:
        tile, slot, own = exchange_tile(p, group, n, BLOCK_B, WIDTH, MEMBERS)
        present = (b < whole[1])[:, None] & (n < H)[None, :]
        counter = p.counters + group * COUNTER_STRIDE
        tl.store(tile + own, state[0].to(p.exchange.dtype.element_ty), mask=present)
        arrive(counter)

    for k in range(T):
        if not RESIDENT:
            wait(counter, (k + 1) * MEMBERS)
            h = load_operands(tile + k % 2 * slot, whole[1], CHUNKS, BLOCK_B, WIDTH, SPLIT, BLOCK_K)
        elif RECURRENT > 0:
            h = (state[0].to(p.w_hh.dtype.element_ty),)
        products = (zero_product(BLOCK_B, BLOCK_N, SPLIT),) * RECURRENT
        for j in tl.static_range(CHUNKS):
            sums = ()
            for g in tl.static_range(RECURRENT):
                sums = sums + (add_product(h[j], weights[g][j], products[g], PRECISION),)
            products = sums
        # Behind the products, so that the loads' layout, which spreads a tile over all threads, prevails in the cell.
        next_x = load_gates(p.gates, next_span, b, n, d, D, GATES, H)
        next_signals = load_signals(p.signals, k + 1, reverse, next_span, b0, b, n, T, B, SIGNALS, VARYING, H)
        after_next = rows_of_step(p, k + 2, reverse, T, B, b0)
        if p.resets is not None:
            next_reset = resets_of_step(p, k + 1, reverse, b0, b, next_span[1], T, B)
        u = add(finish_products(products, RECURRENT, BLOCK_B, BLOCK_N, SPLIT), bias, RECURRENT)
        given = widen(signals, SIGNALS, DTYPE)
        new_state, saved = forward_cell(CELL, widen(x, GATES, DTYPE), u, state, parameters, given, MORE)
        state = select((b < span[1])[:, None], new_state, state, STATES) if p.rows is not None else new_state
        if p.resets is not None:
            state = clear(next_reset, state, STATES)
        if not RESIDENT:
            tl.store(tile + (k + 1) % 2 * slot + own, state[0].to(p.exchange.dtype.element_ty), mask=present)
            arrive(counter)
        store_states(p.states, new_state, span, b, n, d, D, STATES, H)
        if SAVED > 0:
            store_gates(p.gates, saved, span, b, n, d, D, GATES, 0, H, SAVED)
        if SAVED > GATES:
            store_gates(p.extra, saved, span, b, n, d, D, SAVED - GATES, GATES, H)
        x = next_x
        signals = next_signals
        span = next_span
        next_span = after_next

    store_states(p.finals, state, whole, b, n, 0, 1, STATES, H)
