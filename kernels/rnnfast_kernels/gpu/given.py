"""What a cell is given beside its gates and states: parameters, which stay the same, and signals, one of each step.

T steps, B batch rows, H hidden units, D directions. Where a cell has neither, nothing of this is compiled.
"""

import triton
import triton.language as tl


@triton.jit
def load_parameters(
    pointer, d, n, COUNT: tl.constexpr, H: tl.constexpr, BLOCK_B: tl.constexpr, DTYPE: tl.constexpr
):  # fmt: skip
    """COUNT tiles [BLOCK_B, BLOCK_N], all rows alike, of a tensor [D, COUNT, H]."""
    tiles = ()
    for i in tl.static_range(COUNT):
        row = tl.load(pointer + (d * COUNT + i) * H + n, mask=n < H, other=0.0).to(DTYPE)
        tiles = tiles + (tl.broadcast_to(row[None, :], BLOCK_B, n.shape[0]),)
    return tiles


@triton.jit
def load_signals(
    pointers, k, reverse, span, b0, b, n, T, B, COUNT: tl.constexpr, VARYING: tl.constexpr, H: tl.constexpr
):  # fmt: skip
    """One tile [BLOCK_B, BLOCK_N] per signal, at the rows of the k-th step to run.

    Bit 3 * i of VARYING says that signal i differs from step to step, the next two that it does from row to row and
    from unit to unit. Where it does not, its tensor has one entry.
    """
    t = tl.where(reverse, T - 1 - k, k).to(tl.int64)
    mask = (b < span[1])[:, None] & (n < H)[None, :]
    tiles = ()
    for i in tl.static_range(COUNT):
        place = tl.zeros([b.shape[0], n.shape[0]], tl.int32)
        row = 1
        if (VARYING >> (3 * i + 2)) & 1:
            place = place + n[None, :]
            row = H
        step = row
        if (VARYING >> (3 * i + 1)) & 1:
            place = place + b[:, None] * row
            step = B * row
        p_step = pointers[i]
        if (VARYING >> (3 * i)) & 1:
            p_step = p_step + t * step
        if (VARYING >> (3 * i + 1)) & 1:
            p_step = p_step + b0 * row
        tiles = tiles + (tl.load(p_step + place, mask=mask, other=0.0),)
    return tiles


@triton.jit
def forward_cell(CELL: tl.constexpr, x, u, state, parameters, signals, MORE: tl.constexpr):
    """The new states and what is saved. MORE: whether the cell takes parameters or signals."""
    if MORE:
        return CELL(x, u, state, parameters, signals)
    else:
        return CELL(x, u, state)


@triton.jit
def backward_cell(CELL: tl.constexpr, dstate, saved, state, new_state, parameters, signals, MORE: tl.constexpr):
    """The gradients by x, u, state, parameters and signals, none by the last two for a cell without either."""
    if MORE:
        return CELL(dstate, saved, state, new_state, parameters, signals)
    else:
        dx, du, direct = CELL(dstate, saved, state, new_state)
        return dx, du, direct, (), ()
