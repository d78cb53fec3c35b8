"""One step of the time loop, for layers whose recurrent product is left to a library, one matrix product per step.

Forward, per step: u = h W_hh^T by the library, then `forward_step`. Backward: `backward_step`, then dh = du W_hh. The
state travels from step to step in the compute type, float32 or float64.
T steps, B batch rows, H hidden units, G gates, C gates with a recurrent part, S state tensors, D directions, R rows of
all steps together; P parameters of the cell.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from rnnfast_kernels.gpu.backward import load_step, widen_step
from rnnfast_kernels.gpu.given import backward_cell, forward_cell, load_parameters, load_signals
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


class ForwardCarry(NamedTuple):
    """What one step leaves to the next."""

    u: Any  # [D, B, C, H]: the recurrent product, compute type
    state: tuple  # S times [D, B, H], compute type: the state, updated in place
    h: Any  # [D, B, H]: the same h as the operand of the next product


class ShiftTensors(NamedTuple):
    source: Any  # [R, D, WIDTH]
    edge: Any  # [D, B, WIDTH] or None for zeros
    rows: Any  # int64 [T] or None
    first: Any  # int64 [T] or None
    resets: Any  # bool [T, B] or None

    @property
    def read(self) -> tuple[str, ...]:
        """The fields that the caller gives and the pass only reads."""
        return self._fields


class BackwardCarry(NamedTuple):
    dh: Any  # [D, B, H]: the recurrent part of dh, compute type
    dstate: tuple  # S times [D, B, H], compute type: the rest of the gradient by the state, updated in place
    du: Any  # [D, B, C, H]: operand of the next product
    dparameters: Any = None  # [D, B, P, H], compute type: the sum of what steps gave, updated in place


@triton.jit(do_not_specialize=["k", "T", "B", "D", "reversals"])
def forward_step(
    p, carry, k, T, B, D, reversals, CELL: tl.constexpr, GATES: tl.constexpr, RECURRENT: tl.constexpr,
    SAVED: tl.constexpr, STATES: tl.constexpr, PARAMETERS: tl.constexpr, SIGNALS: tl.constexpr, VARYING: tl.constexpr,
    H: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """The k-th step to run: state = cell(x, u + b_hh, state). See `forward_loop` for rows and resets.

    A reset clears the recurrent product along with the state, as its h had been 0.
    """
    MORE: tl.constexpr = PARAMETERS + SIGNALS > 0
    DTYPE: tl.constexpr = carry.u.dtype.element_ty
    d = tl.program_id(2)
    reverse = ((reversals >> d) & 1) != 0
    b0 = tl.program_id(1) * BLOCK_B
    b = tl.arange(0, BLOCK_B)
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    whole = all_rows(d, b0, B)
    span = rows_of_step(p, k, reverse, T, B, b0)
    x = widen(load_gates(p.gates, span, b, n, d, D, GATES, H), GATES, DTYPE)
    products = load_gates(carry.u, whole, b, n, 0, 1, RECURRENT, H)
    kept = load_states(carry.state, whole, b, n, 0, 1, STATES, H)
    state = kept
    if p.resets is not None:
        reset = resets_of_step(p, k, reverse, b0, b, span[1], T, B)
        products = clear(reset, products, RECURRENT)
        state = clear(reset, state, STATES)
    u = add(products, load_bias(p.b_hh, d, n, RECURRENT, H, DTYPE), RECURRENT)
    parameters = load_parameters(p.parameters, d, n, PARAMETERS, H, BLOCK_B, DTYPE)
    signals = load_signals(p.signals, k, reverse, span, b0, b, n, T, B, SIGNALS, VARYING, H)
    given = widen(signals, SIGNALS, DTYPE)
    new_state, saved = forward_cell(CELL, x, u, state, parameters, given, MORE)
    # Of a small tile several threads have each element: all of them have read it before one writes it.
    tl.debug_barrier()
    store_states(p.states, new_state, span, b, n, d, D, STATES, H)
    if SAVED > 0:
        store_gates(p.gates, saved, span, b, n, d, D, GATES, 0, H, SAVED)
    if SAVED > GATES:
        store_gates(p.extra, saved, span, b, n, d, D, SAVED - GATES, GATES, H)
    leaving = select((b < span[1])[:, None], new_state, kept, STATES)
    store_states(carry.state, leaving, whole, b, n, 0, 1, STATES, H)
    store_states((carry.h,), leaving, whole, b, n, 0, 1, 1, H)


@triton.jit(do_not_specialize=["k", "T", "B", "D", "reversals"])
def backward_step(
    p, carry, k, T, B, D, reversals, CELL: tl.constexpr, GATES: tl.constexpr, RECURRENT: tl.constexpr,
    SAVED: tl.constexpr, STATES: tl.constexpr, PARAMETERS: tl.constexpr, SIGNALS: tl.constexpr, VARYING: tl.constexpr,
    H: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """The k-th step of the way back: dx, du and the direct part of dstate; the library's product adds du W_hh to dh.

    A row that is not live, or that is reset, has du = 0 as far as the recurrence goes, so that dh stays, or is zero.
    """
    MORE: tl.constexpr = PARAMETERS + SIGNALS > 0
    DTYPE: tl.constexpr = carry.dh.dtype.element_ty
    d = tl.program_id(2)
    reverse = ((reversals >> d) & 1) == 0
    b0 = tl.program_id(1) * BLOCK_B
    b = tl.arange(0, BLOCK_B)
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    whole = all_rows(d, b0, B)
    span = rows_of_step(p, k, reverse, T, B, b0)
    previous = rows_of_step(p, k + 1, reverse, T, B, b0)
    step = load_step(p, span, previous, None, k, reverse, b0, b, n, d, T, B, D, GATES, SAVED, STATES, H)
    dstates, saved, state, new_state = widen_step(step, SAVED, STATES, False, DTYPE)
    recurrent = load_states((carry.dh,), whole, b, n, 0, 1, 1, H)
    carried = load_states(carry.dstate, whole, b, n, 0, 1, STATES, H)
    dstate = (carried[0] + recurrent[0],)
    for s in tl.static_range(1, STATES):
        dstate = dstate + (carried[s],)
    dnew = add(dstate, dstates, STATES)
    parameters = load_parameters(p.parameters, d, n, PARAMETERS, H, BLOCK_B, DTYPE)
    signals = load_signals(p.signals, k, reverse, span, b0, b, n, T, B, SIGNALS, VARYING, H)
    given = widen(signals, SIGNALS, DTYPE)
    dx, du, direct, dp, ds = backward_cell(CELL, dnew, saved, state, new_state, parameters, given, MORE)
    if PARAMETERS > 0:
        summed = load_gates(carry.dparameters, whole, b, n, 0, 1, PARAMETERS, H)
        summed = add(summed, clear((b >= span[1])[:, None], dp, PARAMETERS), PARAMETERS)
    # As in the forward step.
    tl.debug_barrier()
    store_gates(p.dx, dx, span, b, n, d, D, GATES, 0, H)
    if p.du is not None:
        store_gates(p.du, du, span, b, n, d, D, RECURRENT, 0, H)
    if p.dsignals is not None:
        store_gates(p.dsignals, ds, span, b, n, d, D, SIGNALS, 0, H)
    if PARAMETERS > 0:
        store_gates(carry.dparameters, summed, whole, b, n, 0, 1, PARAMETERS, 0, H)
    live = (b < span[1])[:, None]
    silent = live == 0
    dentering = direct
    if p.resets is not None:
        reset = resets_of_step(p, k, reverse, b0, b, span[1], T, B)
        dentering = clear(reset, dentering, STATES)
        silent = silent | reset
    dentering = select(live, dentering, dstate, STATES)
    store_states(carry.dstate, dentering, whole, b, n, 0, 1, STATES, H)
    store_gates(carry.du, clear(silent, du, RECURRENT), whole, b, n, 0, 1, RECURRENT, 0, H)


@triton.jit(do_not_specialize=["R", "T", "B", "D", "reversals"])
def shifted_rows(
    p, result, R, T, B, D, reversals, WIDTH: tl.constexpr, TOWARDS: tl.constexpr, BLOCK_B: tl.constexpr,
    BLOCK_N: tl.constexpr,
):  # fmt: skip
    """result[d, row of step k] = source[row of step k + TOWARDS, d]; `edge` for a row that does not run at that step.

    With TOWARDS = -1 and states as the source: what entered each step, zero where a reset cleared it. With TOWARDS = 1
    and gradients by what entered each step: the gradient by what left it, zero where a reset cut it off.
    """
    k = tl.program_id(0)
    d = tl.program_id(2) % D
    reverse = ((reversals >> d) & 1) != 0
    b0 = tl.program_id(1) * BLOCK_B
    b = tl.arange(0, BLOCK_B)
    n = tl.program_id(2) // D * BLOCK_N + tl.arange(0, BLOCK_N)
    first, count = rows_of_step(p, k, reverse, T, B, b0)
    other = rows_of_step(p, k + TOWARDS, reverse, T, B, b0)
    shifted = load_states((p.source,), other, b, n, d, D, 1, WIDTH)
    edge = load_states((p.edge,), (all_rows(d, b0, B)[0], count), b, n, 0, 1, 1, WIDTH)
    tile = select((b < other[1])[:, None], shifted, edge, 1)
    if p.resets is not None:
        if TOWARDS < 0:
            tile = clear(resets_of_step(p, k, reverse, b0, b, count, T, B), tile, 1)
        else:
            tile = clear(resets_of_step(p, k + 1, reverse, b0, b, other[1], T, B), tile, 1)
    store_states((result,), tile, (d.to(tl.int64) * R + first, count), b, n, 0, 1, 1, WIDTH)
