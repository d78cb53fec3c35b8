"""What a backend receives and returns for a layer of a declared cell whose form torch's cells do not have.

The states of a layer are two tensors: h, which the recurrent product takes, and `extra`, the others side by side.
Dimensions: T steps, B rows, I input width, H hidden units, G gates, R gates with a recurrent part, S states,
P parameters, N signals, D directions; L is (T, B), or (rows,) when packed.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from rnnfast_kernels.cells import CELLS
from rnnfast_kernels.equations.cell import Cell
from torch import Tensor


class CellWeights(NamedTuple):
    """The parameters of one direction."""

    w_ih: Tensor  # [G*H, I]
    w_hh: Tensor | None  # [R*H, H]
    b_ih: Tensor | None  # [G*H]
    b_hh: Tensor | None  # [R*H]
    parameters: Tensor | None  # [P, H]


@dataclass
class Recurrence:
    """A layer. Rows are laid out as in `rnnfast.backends`.

    h: initial state [D, B, H]. extra: the other initial states [S-1, D, B, H]. signals: each [T or 1, B or 1, H or 1],
    by step and row whatever the layout of x.
    """

    cell: str
    x: Tensor
    h: Tensor
    extra: Tensor
    weights: tuple[CellWeights, ...]
    signals: tuple[Tensor, ...]
    reverse: tuple[bool, ...]
    batch_sizes: Tensor | None = None
    resets: Tensor | None = None

    @property
    def row(self) -> Cell:
        """Return the cell."""
        return CELLS[self.cell]

    @property
    def steps(self) -> int:
        """Return T."""
        if self.batch_sizes is not None and self.x.dim() == 2:
            return len(self.batch_sizes)
        return self.x.shape[0]


class Outcome(NamedTuple):
    """h [*L, D, H], the other states [S-1, *L, D, H], and both after each row's last step."""

    h: Tensor
    extra: Tensor
    h_final: Tensor
    extra_final: Tensor


def pack_weights(cell: Cell, flat: Sequence[Tensor], biased: bool, directions: int) -> tuple[CellWeights, ...]:
    """Name a flat list of weights, direction by direction, in the order of `CellWeights`."""
    there = presence(cell, biased)
    count = sum(there)
    named = []
    for d in range(directions):
        given = iter(flat[d * count : (d + 1) * count])
        named.append(CellWeights._make(next(given) if each else None for each in there))
    return tuple(named)


def presence(cell: Cell, biased: bool) -> tuple[bool, ...]:
    """Say which of `CellWeights` there are."""
    return (True, cell.recurrent > 0, biased, biased and cell.recurrent > 0, bool(cell.parameters))


def flat_weights(weights: Sequence[CellWeights]) -> list[Tensor]:
    """Undo `pack_weights`."""
    return [tensor for direction in weights for tensor in direction if tensor is not None]
