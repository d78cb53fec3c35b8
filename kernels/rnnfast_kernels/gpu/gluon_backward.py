"""Backpropagation through time for NVIDIA's matrix instructions, with the weights on the chip for all steps.

T steps, B batch rows, H hidden units, G gates, S state tensors, D directions, R rows of all steps together. Programs,
groups and weights are arranged as in `gluon_forward`. What the members of a group exchange is du, the gradient by the
recurrent part of the gates: G * H values of k of one product.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from rnnfast_kernels.gpu.backward import load_step, widen_step
from rnnfast_kernels.gpu.barrier import COUNTER_STRIDE
from rnnfast_kernels.gpu.gluon_exchange import (
    await_step,
    finish_step,
    own_places,
    publish,
    read_piece,
    slot_of,
    to_words,
)
from rnnfast_kernels.gpu.gluon_tiles import (
    UNIT,
    add_products,
    add_warps,
    kept_pieces,
    load_weights,
    memory_for_sums,
    piece_sizes,
    sums_layout,
    zero_sums,
)
from rnnfast_kernels.gpu.tiles import (
    add,
    all_rows,
    clear,
    load_states,
    resets_of_step,
    rows_of_step,
    store_gates,
    store_states,
    widen,
)


@gluon.jit(do_not_specialize=["T", "B", "D", "reversals"])
def backward_loop(
    p, T, B, D, reversals, CELL: gl.constexpr, GATES: gl.constexpr, SAVED: gl.constexpr, STATES: gl.constexpr,
    H: gl.constexpr, ROW: gl.constexpr, PRECISION: gl.constexpr, BLOCK_B: gl.constexpr, BLOCK_N: gl.constexpr,
    UNITS: gl.constexpr, KEPT_UNITS: gl.constexpr, WARPS: gl.constexpr, MEMBERS: gl.constexpr, POLLED: gl.constexpr,
):  # fmt: skip
    """What `backward.backward_loop` computes."""
    DTYPE: gl.constexpr = p.w_hh.dtype.element_ty
    EACH: gl.constexpr = 32 // DTYPE.primitive_bitwidth
    WIDTH: gl.constexpr = UNITS * UNIT * WARPS
    WORDS: gl.constexpr = GATES * WIDTH // EACH
    SIZES: gl.constexpr = piece_sizes(GATES * KEPT_UNITS * UNIT, GATES * UNITS * UNIT, BLOCK_B, EACH)
    KEPT: gl.constexpr = kept_pieces(GATES * KEPT_UNITS * UNIT, BLOCK_B, EACH)
    RAGGED: gl.constexpr = p.rows is not None
    cell: gl.constexpr = gl.SliceLayout(0, sums_layout(WARPS, BLOCK_N))
    group = gl.program_id(0) // MEMBERS
    n0 = gl.program_id(0) % MEMBERS * BLOCK_N
    d = group % D
    b0 = group // D * BLOCK_B
    b = gl.arange(0, BLOCK_B, gl.SliceLayout(1, cell))
    n = n0 + gl.arange(0, BLOCK_N, gl.SliceLayout(0, cell))
    # Step 0 of this loop is the last that ran.
    reverse = ((reversals >> d) & 1) == 0
    whole = all_rows(d, b0, B)

    p_w = p.w_hh + d.to(gl.int64) * (GATES * H * ROW)
    weights = load_weights(p_w, n0, 1, H, ROW, WIDTH, SIZES, KEPT, BLOCK_N, WARPS)
    memory = memory_for_sums(1, BLOCK_B, BLOCK_N, WARPS)
    tile = p.exchange + group.to(gl.int64) * (BLOCK_B * WORDS)
    slot = (gl.num_programs(0) // MEMBERS).to(gl.int64) * (BLOCK_B * WORDS)
    counter = p.counters + group * COUNTER_STRIDE

    # One step ahead throughout: nothing but du is waited for inside a step.
    span = rows_of_step(p, 0, reverse, T, B, b0)
    next_span = rows_of_step(p, 1, reverse, T, B, b0)
    after_next = rows_of_step(p, 2, reverse, T, B, b0)
    step = load_step(
        p, span, next_span, 0 if RAGGED else None, 0, reverse, b0, b, n, d, T, B, D, GATES, SAVED, STATES, H
    )
    dstate = widen(load_states(p.dfinals, whole, b, n, 0, 1, STATES, H), STATES, gl.float32)
    if RAGGED:
        # Rows begin with their own last step; those that never run end as they would begin.
        most = rows_of_step(p, 0, False, T, B, b0)[1]
        store_states(p.dinitial, dstate, whole, b, n, 0, 1, STATES, H, most)
        dstate = clear((b < whole[1])[:, None], dstate, STATES)

    for k in range(T):
        if p.resets is not None:
            reset = resets_of_step(p, k, reverse, b0, b, span[1], T, B)
        dstates, saved, state, new_state = widen_step(step, SAVED, STATES, RAGGED, gl.float32)
        dx, du, direct = CELL(add(dstate, dstates, STATES), saved, state, new_state)
        sent = du
        if p.resets is not None:
            sent, direct = clear(reset, sent, GATES), clear(reset, direct, STATES)
        if RAGGED:
            ended = (b >= span[1])[:, None]
            sent, direct = clear(ended, sent, GATES), clear(ended, direct, STATES)
        for g in gl.static_range(GATES):
            words = to_words(sent[g], DTYPE)
            own = own_places(words, g * WIDTH + n0, BLOCK_N, WORDS)
            publish(tile, k, slot, own, words, BLOCK_B, BLOCK_N, WARPS, POLLED)
        finish_step(counter, words, BLOCK_B, BLOCK_N, WARPS, POLLED)
        # What nobody waits for.
        store_gates(p.dx, dx, span, b, n, d, D, GATES, 0, H)
        if p.du is not None:
            store_gates(p.du, du, span, b, n, d, D, GATES, 0, H)
        joined = span[1] if RAGGED else None
        next_step = load_step(
            p, next_span, after_next, joined, k + 1, reverse, b0, b, n, d, T, B, D, GATES, SAVED, STATES, H
        )
        third_span = rows_of_step(p, k + 3, reverse, T, B, b0)
        await_step(counter, k, MEMBERS, POLLED)
        p_slot = slot_of(tile, k, slot, POLLED)
        sums = zero_sums(1, BLOCK_B, BLOCK_N, WARPS)
        for j in gl.static_range(len(SIZES)):
            operand = read_piece(p_slot, j, DTYPE, BLOCK_B, WORDS, SIZES, WARPS, POLLED)
            sums = add_products(operand, weights, sums, j, KEPT, 1, PRECISION)
        dentering = (direct[0] + add_warps(memory, sums, 1, BLOCK_N, WARPS)[0],)
        for s in gl.static_range(1, STATES):
            dentering = dentering + (direct[s],)
        dstate = dentering
        if RAGGED:
            store_states(p.dinitial, dstate, (whole[0], span[1]), b, n, 0, 1, STATES, H, next_span[1])
        step = next_step
        span = next_span
        next_span = after_next
        after_next = third_span

    if not RAGGED:
        store_states(p.dinitial, dstate, whole, b, n, 0, 1, STATES, H)
