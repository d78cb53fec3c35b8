"""Who runs a layer: the contract of a backend, and the table of backends.

A backend is two functions, `forward` and `backward`, over one recurrent layer in one or more directions. They are
called below autograd, with detached tensors of one floating dtype on one device, already validated. Two more, `push`
and `bend`, are for derivatives beyond the gradient; a backend may leave them out, and torch's operators do their work.

Dimensions: T steps, B batch rows, I input width, H hidden units, P width of the output state (H, or `proj_size`),
G gates, D directions. Everything is time-major.

Row layouts. The rows of step t are contiguous, and their number never grows with t:
    dense    x is [T, B, I], `batch_sizes` is None: every step has B rows
    padded   x is [T, B, I], `batch_sizes` is an int64 [T]: step t has its first batch_sizes[t] rows. The other rows
             hold anything, NaN included, and reach no result; in the results they are 0
    packed   x is [rows, I], `batch_sizes` is an int64 [T] on the CPU: the steps follow one another without gaps
A reverse direction runs from the last step to the first; a row joins, with its initial state, at its last valid step.

Ensembles. Layers of equal sizes that run over the same steps are one layer: the directions of one member after those of
another. Where each member has an input of its own, these stand side by side in x, [T, B, N*I] or [rows, N*I].
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor


class NoMemoryError(RuntimeError):
    """A tensor has no memory to compute with: its storage was given back, or it never had one."""


class Weights(NamedTuple):
    """The parameters of one direction, in torch's shapes and gate order."""

    w_ih: Tensor  # [G*H, I]
    w_hh: Tensor  # [G*H, P]
    b_ih: Tensor | None  # [G*H]
    b_hh: Tensor | None  # [G*H]
    w_hr: Tensor | None  # [P, H], with `proj_size`


@dataclass(slots=True)
class Layer:
    """One call of a layer, as backends receive it.

    x: the input, or N inputs side by side, each for its own D / N successive directions.
    hx: the initial states, one [D, B, P or H] tensor per state of the cell, the output state first.
    reverse: the direction of each of the D independent recurrences.
    resets: bool [T, B] or None; where it is true, the state that enters that step is zeroed first.
    """

    cell: str
    x: Tensor
    hx: tuple[Tensor, ...]
    weights: tuple[Weights, ...]
    reverse: tuple[bool, ...]
    batch_sizes: Tensor | None = None
    resets: Tensor | None = None

    @property
    def inputs(self) -> int:
        """Return the number of inputs, N."""
        width = self.weights[0].w_ih.shape[1]
        return self.x.shape[-1] // width if width else 1

    def input_of(self, d: int, x: Tensor) -> Tensor:
        """Take what direction `d` reads from x, or from something of x's shape."""
        inputs = self.inputs
        return x if inputs == 1 else x.chunk(inputs, -1)[d * inputs // len(self.reverse)]


class Result(NamedTuple):
    """What `forward` returns: tensors that share no memory with one another or with the inputs.

    The leading dimensions L are those of x: (T, B) or (rows,).

    states: one [*L, D, P or H] tensor per state: its value after every step. Those beyond the first are empty
        tensors, shape [0], unless they were asked for.
    finals: one [D, B, P or H] tensor per state, each row after its own last step.
    saved: whatever this backend's `backward` wants beside the states, each tensor with leading dimensions L, and behind
        them D where the backend takes ensembles; empty unless asked for.
    """

    states: tuple[Tensor, ...]
    finals: tuple[Tensor, ...]
    saved: tuple[Tensor, ...]


class Gradients(NamedTuple):
    """What `backward` returns, in the shapes of `Layer`. Entries that were not asked for are None."""

    x: Tensor | None
    hx: tuple[Tensor | None, ...]
    weights: tuple[Weights, ...]  # of gradients; each field None where not asked for


class Changes(NamedTuple):
    """A direction in which x, hx and the weights change, in the shapes of these; None for no change."""

    x: Tensor | None
    hx: Sequence[Tensor | None]
    weights: Sequence[Weights]


class Pushed(NamedTuple):
    """The change of every state after every step, [*L, D, P or H], and of the final states, [D, B, P or H]."""

    states: tuple[Tensor, ...]
    finals: tuple[Tensor, ...]


class Needs(NamedTuple):
    """Which gradients `backward` must compute; the weights' flags hold for every direction."""

    x: bool
    hx: bool
    weights: bool


class Backend(Protocol):
    """A module with these functions.

    TAKES_ENSEMBLES: whether a layer may have more than two directions, and more than one input.
    """

    TAKES_ENSEMBLES: bool

    def forward(self, layer: Layer, *, save: bool, all_states: bool) -> Result:
        """Run the layer. `save` asks for everything that `backward` needs, `all_states` for every entry of `states`."""

    def backward(
        self,
        layer: Layer,
        states: tuple[Tensor, ...],
        saved: tuple[Tensor, ...],
        dstates: tuple[Tensor | None, ...],
        dfinals: tuple[Tensor | None, ...],
        needs: Needs,
        groups: int = 1,
    ) -> Gradients:
        """Differentiate the layer. `states` and `saved` are `forward`'s; a gradient of None is zero.

        groups: row b of the batch belongs to group b % groups, and each group gets its own gradients of the weights:
        with more than one group these have a leading dimension [groups]. (Per-sample gradients are one call.)
        """

    def saved_like(self, layer: Layer) -> tuple[tuple[tuple[int, ...], torch.dtype], ...]:
        """Shape and dtype of each tensor that `forward(layer, save=True)` puts into `saved`.

        Called while a graph is traced: tensors are fake, sizes may be symbolic, no data may be read.
        """

    def unsupported(self, cell: str, device: torch.device, dtype: torch.dtype) -> str | None:
        """Say why this backend cannot run the case, or None where it can."""

    def describe(self, cell: str, hidden: int, projection: int, device: torch.device, dtype: torch.dtype) -> str:
        """Name the kernel that runs a layer of this size, for `rnnfast.explain`."""


class SecondOrderBackend(Backend, Protocol):
    """A backend with these functions too: the derivatives of `forward` and `backward` along changes of the tensors.

    In both, `states` and `saved` are what `forward` left. The results share no memory with anything.
    """

    def push(self, layer: Layer, states: tuple[Tensor, ...], saved: tuple[Tensor, ...], changes: Changes) -> Pushed:
        """Return what the changes do to the states."""

    def bend(
        self,
        layer: Layer,
        states: tuple[Tensor, ...],
        saved: tuple[Tensor, ...],
        dstates: tuple[Tensor | None, ...],
        dfinals: tuple[Tensor | None, ...],
        changes: Changes,
        needs: Needs,
    ) -> tuple[Gradients, Pushed]:
        """Return what the changes do to the results of `backward`, at fixed dstates and dfinals; and to the states."""
