"""The forward time loop for NVIDIA's matrix instructions, with the weights on the chip for all steps.

T steps, B batch rows, H hidden units, G gates, S state tensors, D directions, R rows of all steps together. Programs
form groups as in `forward`; each of a group's MEMBERS holds the weights of BLOCK_N hidden units, its warps a part of k
each, in registers as far as they fit, the rest in shared memory. All exchange h by `gluon_exchange`.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

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
    load_bias,
    load_gates,
    load_states,
    resets_of_step,
    rows_of_step,
    select,
    store_gates,
    store_states,
    widen,
)


@gluon.jit(do_not_specialize=["T", "B", "D", "reversals"])
def forward_loop(
    p, T, B, D, reversals, CELL: gl.constexpr, GATES: gl.constexpr, SAVED: gl.constexpr, STATES: gl.constexpr,
    H: gl.constexpr, ROW: gl.constexpr, PRECISION: gl.constexpr, BLOCK_B: gl.constexpr, BLOCK_N: gl.constexpr,
    UNITS: gl.constexpr, KEPT_UNITS: gl.constexpr, WARPS: gl.constexpr, MEMBERS: gl.constexpr, POLLED: gl.constexpr,
):  # fmt: skip
    """What `forward.forward_loop` computes."""
    DTYPE: gl.constexpr = p.w_hh.dtype.element_ty
    EACH: gl.constexpr = 32 // DTYPE.primitive_bitwidth
    WIDTH: gl.constexpr = UNITS * UNIT * WARPS
    WORDS: gl.constexpr = WIDTH // EACH
    SIZES: gl.constexpr = piece_sizes(KEPT_UNITS * UNIT, UNITS * UNIT, BLOCK_B, EACH)
    KEPT: gl.constexpr = kept_pieces(KEPT_UNITS * UNIT, BLOCK_B, EACH)
    cell: gl.constexpr = gl.SliceLayout(0, sums_layout(WARPS, BLOCK_N))
    group = gl.program_id(0) // MEMBERS
    n0 = gl.program_id(0) % MEMBERS * BLOCK_N
    d = group % D
    b0 = group // D * BLOCK_B
    b = gl.arange(0, BLOCK_B, gl.SliceLayout(1, cell))
    n = n0 + gl.arange(0, BLOCK_N, gl.SliceLayout(0, cell))
    reverse = ((reversals >> d) & 1) != 0
    whole = all_rows(d, b0, B)

    p_w = p.w_hh + d.to(gl.int64) * (GATES * H * ROW)
    weights = load_weights(p_w, n0, GATES, H, ROW, WIDTH, SIZES, KEPT, BLOCK_N, WARPS)
    bias = load_bias(p.b_hh, d, n, GATES, H, gl.float32)
    memory = memory_for_sums(GATES, BLOCK_B, BLOCK_N, WARPS)

    # One step ahead throughout: nothing but h is waited for inside a step.
    span = rows_of_step(p, 0, reverse, T, B, b0)
    next_span = rows_of_step(p, 1, reverse, T, B, b0)
    x = load_gates(p.gates, span, b, n, d, D, GATES, H)
    state = widen(load_states(p.initial, whole, b, n, 0, 1, STATES, H), STATES, gl.float32)
    if p.resets is not None:
        state = clear(resets_of_step(p, 0, reverse, b0, b, span[1], T, B), state, STATES)
    tile = p.exchange + group.to(gl.int64) * (BLOCK_B * WORDS)
    slot = (gl.num_programs(0) // MEMBERS).to(gl.int64) * (BLOCK_B * WORDS)
    counter = p.counters + group * COUNTER_STRIDE
    words = to_words(state[0], DTYPE)
    own = own_places(words, n0, BLOCK_N, WORDS)
    publish(tile, 0, slot, own, words, BLOCK_B, BLOCK_N, WARPS, POLLED)
    finish_step(counter, words, BLOCK_B, BLOCK_N, WARPS, POLLED)

    for k in range(T):
        await_step(counter, k, MEMBERS, POLLED)
        p_slot = slot_of(tile, k, slot, POLLED)
        sums = zero_sums(GATES, BLOCK_B, BLOCK_N, WARPS)
        for j in gl.static_range(len(SIZES)):
            h = read_piece(p_slot, j, DTYPE, BLOCK_B, WORDS, SIZES, WARPS, POLLED)
            sums = add_products(h, weights, sums, j, KEPT, GATES, PRECISION)
        next_x = load_gates(p.gates, next_span, b, n, d, D, GATES, H)
        after_next = rows_of_step(p, k + 2, reverse, T, B, b0)
        if p.resets is not None:
            next_reset = resets_of_step(p, k + 1, reverse, b0, b, next_span[1], T, B)
        u = add(add_warps(memory, sums, GATES, BLOCK_N, WARPS), bias, GATES)
        new_state, saved = CELL(widen(x, GATES, gl.float32), u, state)
        state = select((b < span[1])[:, None], new_state, state, STATES) if p.rows is not None else new_state
        if p.resets is not None:
            state = clear(next_reset, state, STATES)
        words = to_words(state[0], DTYPE)
        publish(tile, k + 1, slot, own, words, BLOCK_B, BLOCK_N, WARPS, POLLED)
        finish_step(counter, words, BLOCK_B, BLOCK_N, WARPS, POLLED)
        store_states(p.states, new_state, span, b, n, d, D, STATES, H)
        if SAVED > 0:
            store_gates(p.gates, saved, span, b, n, d, D, GATES, 0, H, SAVED)
        if SAVED > GATES:
            store_gates(p.extra, saved, span, b, n, d, D, SAVED - GATES, GATES, H)
        x = next_x
        span = next_span
        next_span = after_next

    store_states(p.finals, state, whole, b, n, 0, 1, STATES, H)
