"""A layer as the Triton backend sees it: its sizes, and where each step's rows are, without waiting for the device.

T steps, B batch rows, H hidden units, D directions, R rows of all steps together.
"""

from dataclasses import dataclass

import torch
from rnnfast_kernels.equations.cell import Cell
from rnnfast_kernels.gpu.launch import Extent
from torch import Tensor

from rnnfast.backends import Layer
from rnnfast.backends.gpu_launch import Recurrence


@dataclass(frozen=True)
class Rows:
    """count, first: int64 [T] on the layer's device; None for dense input, whose kernels compute them.

    padded: rows beyond a step's count exist, hold anything and must come out as 0.
    """

    count: Tensor | None
    first: Tensor | None
    T: int
    B: int
    total: int
    padded: bool

    def starts(self, reverse: bool, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
        """Where each batch row starts to run: step [B], row [B], and whether it runs at all [B]."""
        b = torch.arange(self.B, device=device)
        if self.count is None or self.first is None:
            step = torch.full_like(b, self.T - 1 if reverse else 0)
            return step, step * self.B + b, torch.ones_like(b, dtype=torch.bool)
        steps = (self.count[:, None] > b).sum(0)
        step = (steps - 1).clamp(min=0) if reverse else torch.zeros_like(b)
        return step, (self.first[step] + b).clamp(max=self.total - 1), steps > 0

    def live(self) -> Tensor | None:
        """Which rows of a padded layer count: bool [R, 1]; None where all do."""
        if not self.padded or self.count is None:
            return None
        return (torch.arange(self.B, device=self.count.device) < self.count[:, None]).view(-1, 1)


def find_rows(layer: Layer) -> Rows:
    """Lay out the rows of each step."""
    sizes, x, B = layer.batch_sizes, layer.x, layer.hx[0].shape[1]
    if sizes is None:
        return Rows(None, None, x.shape[0], B, x.shape[0] * B, False)
    if x.dim() == 3:
        T = x.shape[0]
        return Rows(sizes.to(x.device), torch.arange(T, device=x.device) * B, T, B, T * B, True)
    both = torch.stack((sizes, sizes.cumsum(0) - sizes)).to(x.device, non_blocking=True)
    return Rows(both[0], both[1], sizes.shape[0], B, x.shape[0], False)


@dataclass(frozen=True)
class LaidOutLayer:
    """A layer with its sizes."""

    layer: Layer
    cell: Cell
    rows: Rows
    H: int

    @property
    def D(self) -> int:
        return len(self.layer.reverse)

    @property
    def projected(self) -> bool:
        return self.layer.weights[0].w_hr is not None

    @property
    def recurrence(self) -> Recurrence:
        reversals = sum(1 << d for d, reverse in enumerate(self.layer.reverse) if reverse)
        return Recurrence(self.cell, self.H, Extent(self.rows.T, self.rows.B, self.D, reversals))

    @property
    def resets(self) -> Tensor | None:
        return None if self.layer.resets is None else self.layer.resets.contiguous()

    def parameters(self) -> Tensor | None:
        """The cell's parameters, [D, P, H], or None."""
        own = [w.parameters for w in self.layer.weights]
        return torch.stack(own) if self.cell.parameters else None

    def signals(self) -> tuple[Tensor, ...] | None:
        """The cell's signals, [T or 1, B or 1, H or 1] each, or None; one entry where all along a dimension are one."""
        found = []
        for signal in self.layer.signals:
            for dim, stride in enumerate(signal.stride()):
                signal = signal.narrow(dim, 0, 1) if stride == 0 and signal.shape[dim] > 1 else signal
            found.append(signal.contiguous())
        return tuple(found) or None

    def padded(self, rows: Tensor) -> Tensor:
        """A packed tensor [R, ...] by step and row, [T, B, ...], 0 where no row is."""
        found = rows.new_zeros(self.rows.T, self.rows.B, *rows.shape[1:])
        if self.rows.count is not None:
            found[torch.arange(self.rows.B, device=rows.device) < self.rows.count[:, None]] = rows
        return found

    def initial(self) -> tuple[Tensor, ...]:
        """The initial states of the time loop, whose h is as wide as the layer and starts from 0 with a projection."""
        hx = tuple(h.contiguous() for h in self.layer.hx)
        return (hx[0].new_zeros(self.D, self.rows.B, self.H), *hx[1:]) if self.projected else hx

    def new(self, *shape: int) -> Tensor:
        """Room for results by row; rows that never run are 0."""
        lead = self.layer.x.shape[:-1]
        return self.layer.x.new_zeros(*lead, *shape) if self.rows.padded else self.layer.x.new_empty(*lead, *shape)

    def input_rows(self) -> Tensor:
        """The input as [R, I], with 0 in the padding.

        A library's product may read past the end of a row, into the next one, and multiply that by 0: NaN in the
        padding would then reach the row in front of it (bfloat16 products of odd width on CPUs do so).
        """
        x, live = self.layer.x.reshape(self.rows.total, self.layer.x.shape[-1]), self.rows.live()
        return x if live is None else x.masked_fill(~live, 0)

    def by_row(self, tensor: Tensor) -> Tensor:
        """The leading dimensions as one: [R, ...]."""
        return tensor.reshape(self.rows.total, *tensor.shape[self.layer.x.dim() - 1 :])


def lay_out(layer: Layer) -> LaidOutLayer:
    cell = layer.definition
    return LaidOutLayer(layer, cell, find_rows(layer), layer.weights[0].w_ih.shape[0] // cell.gates)
