"""Who runs a layer: the contract of a backend (its types are in `rnnfast.spec`).

A backend is a module with the functions of `Backend`: `forward` and `backward` over one recurrent layer in one or more
directions, and what it can run. `forward` and `backward` are called below autograd, with detached, validated tensors of
one floating dtype on one device. `SecondOrderBackend` adds `jvp` and `hvp`; without them torch's operators do that
work. `CompilingBackend` adds `stack` and `compiled_layer`, for the fast path.
"""

from collections.abc import Callable, Sequence
from typing import Literal, Protocol

import torch
from torch import Tensor

from rnnfast.spec import Gradients, Layer, Needs, OutputTangents, Result, Signature, Tangents, Weights

__all__ = [
    "Backend",
    "BackendName",
    "CompilingBackend",
    "Gradients",
    "Layer",
    "Needs",
    "NoMemoryError",
    "Result",
    "SecondOrderBackend",
    "Weights",
]


# What `rnnfast.use_backend` and RNNFAST_BACKEND take.
BackendName = Literal["auto", "triton", "numba", "reference", "torch"]


class NoMemoryError(RuntimeError):
    """A tensor has no memory to compute with: its storage was given back, or it never had one."""


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

    def broken(self, cell: str, dtype: torch.dtype) -> str | None:
        """Say what keeps this installation from running kernels, as far as is known without compiling one."""

    def obtain(self, cell: str, dtype: torch.dtype, derivatives: int = 1) -> str | None:
        """Load or compile the kernels of a case, once; say why that failed, or None. derivatives: 2 for second ones."""

    def describe(self, cell: str, hidden: int, projection: int, device: torch.device, dtype: torch.dtype) -> str:
        """Name the kernel that runs a layer of this size, for `rnnfast.explain`."""


class SecondOrderBackend(Backend, Protocol):
    """A backend with these functions too: the tangents of `forward` and `backward`.

    In both, `states` and `saved` are what `forward` left. The results share no memory with anything.
    """

    def jvp(
        self, layer: Layer, states: tuple[Tensor, ...], saved: tuple[Tensor, ...], tangents: Tangents
    ) -> OutputTangents:
        """Return the tangents of the states."""

    def hvp(
        self,
        layer: Layer,
        states: tuple[Tensor, ...],
        saved: tuple[Tensor, ...],
        dstates: tuple[Tensor | None, ...],
        dfinals: tuple[Tensor | None, ...],
        tangents: Tangents,
        needs: Needs,
    ) -> tuple[Gradients, OutputTangents]:
        """Return the tangents of the results of `backward`, at fixed dstates and dfinals; and of the states."""


class CompiledLayer(Protocol):
    """A layer of one signature, without lengths, resets and signals. Its tensors are contiguous, but for x.

    `tensors` are x, the initial states unless they are zero, and the weights that there are, direction by direction.
    """

    signature: Signature
    states: int  # S

    def forward(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Return the output [T, B, D*P], the other state of every step, what else backward wants, the final states."""

    def fits(self, saved: Sequence[Tensor]) -> bool:
        """Say whether tensors for `backward` have the sizes and the layout that `forward` had them in."""

    def backward(
        self, saved: Sequence[Tensor], grads: Sequence[Tensor | None], wanted: tuple[bool, ...]
    ) -> list[Tensor | None]:
        """Return the gradients of `tensors`.

        saved: the tensors, and what `forward` returned but for the final states. grads: of the output, the final
        states, and the other state of every step. wanted: whether each gradient is; the others may be None.
        """


class Stack(Protocol):
    """Layers on top of one another, with nothing kept for backward."""

    def __call__(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Return the output [T, B, D*P] and the final states.

        tensors: x, one [layers*D, B, P or H] tensor per state unless they are zero, and flat weights.
        """

    def repeat(self, tensors: Sequence[Tensor], results: Sequence[Tensor]) -> Callable[[], None]:
        """Return a function that runs over the same tensors again and again, with the weights packed once."""


class CompilingBackend(Backend, Protocol):
    """A backend with these functions too, for signatures that it may be asked for again and again.

    What they return raises `NoMemoryError` where a tensor has no memory.
    """

    def stack(self, signatures: tuple[Signature, ...], batched: bool = True) -> Stack:
        """Return layers on top of one another. batched: whether results have a batch dimension."""

    def compiled_layer(self, signature: Signature) -> CompiledLayer:
        """Return one layer."""
