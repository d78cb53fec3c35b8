"""The tensors that the fused kernels take, one named tuple per pass; a field of None is compiled away.

T steps, B batch rows, H hidden units, G gates, C gates with a recurrent part, S state tensors, D directions, R rows of
all steps together; P parameters and N signals of the cell.
"""

from typing import Any, NamedTuple


class ForwardTensors(NamedTuple):
    gates: Any  # [R, D, G, H]: W_ih x + b_ih on entry; where the pass is saved, the activated gates on return
    extra: Any  # [R, D, E, H]: what the cell saves beyond its G gates
    w_hh: Any  # [D, C*H, H]; for a fused loop [D, C, H, ROW]: by unit and unit of h, or the other way (Plan.k_last)
    b_hh: Any  # [D, C*H] or None
    initial: tuple  # S times [D, B, H]
    states: tuple  # S times [R, D, H]; None where not asked for
    finals: tuple  # S times [D, B, H]
    rows: Any  # int64 [T], or None for dense input: rows of each step
    first: Any  # int64 [T], or None for dense input: where each step's rows start
    resets: Any  # bool [T, B] or None
    # Triton: [2, groups, BLOCK_B, Plan.width], zero on entry. Gluon: int32 words, see `gluon_exchange`. None: resident
    exchange: Any
    counters: Any  # int32 [groups, 32], zero on entry; None for the resident loop
    parameters: Any = None  # [D, P, H]; None for cells without
    signals: Any = None  # N times [T or 1, B or 1, H or 1]; None for cells without

    @property
    def read(self) -> tuple[str, ...]:
        """The fields that the caller gives and the pass only reads."""
        return ("w_hh", "b_hh", "initial", "rows", "first", "resets", "parameters", "signals")


class BackwardTensors(NamedTuple):
    gates: Any  # [R, D, G, H]: as the forward pass left them
    extra: Any  # [R, D, E, H]
    w_hh: Any  # [D, C*H, H]; for a fused loop [D, C, H, ROW]: by unit and unit of du, or the other way
    initial: tuple  # S times [D, B, H]
    states: tuple  # S times [R, D, H]
    dstates: tuple  # S times [R, D, H] or None: gradients by every step's states
    dfinals: tuple  # S times [D, B, H] or None
    dx: Any  # [R, D, G, H]: written, gradient by the input part of the gates
    du: Any  # [R, D, C, H]: written, gradient by the recurrent part; None where it equals dx, or where C is 0
    dinitial: tuple  # S times [D, B, H]: written
    rows: Any
    first: Any
    resets: Any
    # Triton: [2, groups, slices, BLOCK_B, C, Plan.width]. Gluon: as in the forward pass, for each gate
    exchange: Any
    counters: Any  # int32 [groups, 32]; with several slices of k, [groups * slices + groups * columns, 32]
    parts: Any  # float32 [2, programs, slices, BLOCK_B, BLOCK_N], zero on entry; None where there is one slice
    parameters: Any = None  # as in the forward pass
    signals: Any = None
    dparameters: Any = None  # [D, B, P, H], compute type: written, summed over the steps of each row
    dsignals: Any = None  # [R, D, N, H], compute type: written; None where not asked for

    @property
    def read(self) -> tuple[str, ...]:
        """The fields that the caller gives and the pass only reads."""
        own = ("gates", "extra", "states", "dstates", "dfinals", "parameters", "signals")
        return ("w_hh", "initial", "rows", "first", "resets", *own)
