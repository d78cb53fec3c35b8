"""The Numba backend: allocates tensors, and runs recorded programs of the kernels in `rnnfast_kernels.cpu`.

`available` says what can run, `arguments` turns tensors into a signature and addresses, `executable` records the passes
of a layer for a signature.
"""

from collections.abc import Callable, Sequence
from operator import attrgetter

import torch
from rnnfast_kernels.cpu.runtime import pool
from torch import Tensor

from rnnfast.backends.cpu import executable
from rnnfast.backends.cpu.arguments import addresses_of, apart, described, present, together
from rnnfast.backends.cpu.available import (
    WIDER,
    broken,
    describe,
    machine,
    obtain,
    unsupported,
)
from rnnfast.backends.cpu.tangents import hvp, jvp
from rnnfast.spec import Gradients, Layer, Needs, Result, Signature, States, Weights

__all__ = [
    "TAKES_ENSEMBLES",
    "backward",
    "broken",
    "compiled_layer",
    "describe",
    "forward",
    "hvp",
    "jvp",
    "machine",
    "obtain",
    "saved_like",
    "stack",
    "unsupported",
]

TAKES_ENSEMBLES = True
nbytes = attrgetter("nbytes")


def saved_like(layer: Layer) -> tuple[tuple[tuple[int, ...], torch.dtype], ...]:
    """Shape and dtype of each tensor that `forward(layer, save=True)` puts into `saved`, see `executable.residuals`."""
    lead, dtype = (*layer.x.shape[:-1], len(layer.reverse)), layer.x.dtype
    found = executable.residuals(layer.definition, lead, layer.hidden, dtype, layer.weights[0].w_hr is not None)
    return tuple((each.shape, each.dtype or dtype) for each in found.values())


def forward(layer: Layer, *, save: bool, all_states: bool) -> Result:
    """Run the layer. `save` asks for everything that `backward` needs, `all_states` for every entry of `states`."""
    signature, tensors = described(layer)
    found = executable.forward(signature, save, all_states).run_named(layer.x, tensors)
    others = signature.form.states - 1
    states = (found["h"], *apart(found.get("aux"), others, layer.x))
    finals = (found["h_final"], *apart(found.get("aux_final"), others, layer.x))
    return Result(states, finals, tuple(found[name] for name in ("gates", "unprojected") if name in found))


def backward(
    layer: Layer,
    states: States,
    saved: States,
    dstates: tuple[Tensor | None, ...],
    dfinals: tuple[Tensor | None, ...],
    needs: Needs,
    groups: int = 1,
) -> Gradients:
    """Differentiate the layer. `states` and `saved` are `forward`'s; a gradient of None is zero."""
    signature, tensors = described(layer)
    form = signature.form
    incoming = {
        "dh": dstates[0],
        "daux": together(dstates[1:], states[1:]),
        "dh_final": dfinals[0],
        "daux_final": together(dfinals[1:], layer.hx[1:]),
    }
    given = {name: each.contiguous() for name, each in incoming.items() if each is not None}
    tensors |= {"h": states[0].contiguous()} | given
    tensors |= zip(("aux",), present(together(states[1:], states[1:])), strict=False)
    tensors |= zip(executable.residual_buffers(signature), (each.contiguous() for each in saved), strict=True)
    found = executable.backward(signature, tuple(given), needs, groups).run_named(layer.x, tensors)
    found = {name: narrowed(each, layer.x.dtype) for name, each in found.items()}
    hx = (found.get("dh_first"), *apart(found.get("daux_first"), form.states - 1))
    signals: tuple[Tensor | None, ...] = (None,) * form.signals
    if needs.signals:
        parts = found["dsignals"].split(signature.hidden, -1)
        signals = tuple(reduced(layer, each, signal) for each, signal in zip(parts, layer.signals, strict=True))
    weights = tuple(
        Weights._make([found.get(f"d{name}{d}") for name in Weights._fields]) for d in range(len(form.reverse))
    )
    return Gradients(found.get("dx"), hx, weights, signals)


def narrowed(gradient: Tensor, dtype: torch.dtype) -> Tensor:
    """Return a gradient in the layer's dtype."""
    return gradient if gradient.dtype == dtype else gradient.to(dtype)


def reduced(layer: Layer, gradient: Tensor, signal: Tensor) -> Tensor:
    """Sum a signal's gradient, [*L, D, H], over directions and over the dimensions that the signal is broadcast in."""
    gradient = gradient.sum(-2)
    sizes = layer.batch_sizes
    if sizes is not None and layer.x.dim() == 2:
        batch = layer.hx[0].shape[1]
        padded = gradient.new_zeros(layer.steps, batch, gradient.shape[-1])
        padded[torch.arange(batch, device=sizes.device) < sizes[:, None]] = gradient
        gradient = padded
    return gradient.sum_to_size(signal.shape).clone(memory_format=torch.contiguous_format)


def stack(signatures: tuple[Signature, ...], batched: bool = True) -> "Stack":
    """Return layers on top of one another (`rnnfast.backends`). batched: whether results have a batch dimension."""
    return Stack(executable.stack(signatures, batched))


class Stack:
    """Layers on top of one another, see `rnnfast.backends.Stack`."""

    def __init__(self, recorded: executable.Executable):
        self.executable = recorded

    def __call__(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Return the output and the final states."""
        return self.executable.run(tensors[0], addresses_of(tensors))

    def repeat(self, tensors: Sequence[Tensor], results: Sequence[Tensor]) -> Callable[[], None]:
        """Return a function that runs over the same tensors again and again, with the weights packed once."""
        addresses = [*addresses_of((*tensors, *results)), *self.executable.fixed]
        return executable.repeat(self.executable.recipe, self.executable.kernel, addresses, (*tensors, *results))


class CompiledLayer:
    """One layer, see `rnnfast.backends.CompiledLayer`."""

    def __init__(self, signature: Signature):
        self.signature, self.states = signature, signature.form.states
        self.forward_pass = executable.forward(signature, True, False, flat=True)
        self.initial = 0 if signature.zero else min(2, signature.form.states)
        self.backward_passes: dict[tuple, tuple[executable.Executable, tuple[int, ...]]] = {}
        self.sizes: list[int] = []

    def forward(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Return the output [T, B, D*P], the other state of every step, what else backward wants, the final states."""
        results = self.forward_pass.run(tensors[0], addresses_of(tensors))
        if not self.sizes:
            self.sizes = [*map(nbytes, (*tensors, *results[: -self.states]))]
        return results

    def fits(self, saved: Sequence[Tensor]) -> bool:
        """Say whether tensors for `backward` are as `forward` had them; `weight.data = other` may have come between."""
        x, signature = saved[0], self.signature
        return (
            x.stride() == signature.x_strides
            and x.shape == signature.x_shape
            and all(map(Tensor.is_contiguous, saved[1:]))
            and [*map(nbytes, saved)] == self.sizes
        )

    def backward(
        self, saved: Sequence[Tensor], grads: Sequence[Tensor | None], wanted: tuple[bool, ...]
    ) -> list[Tensor | None]:
        """Return the gradients of x, the initial states if they are given, and the weights."""
        key = (wanted, tuple([grad is not None for grad in grads]), pool.usable(torch.get_num_threads()))
        known = self.backward_passes.get(key)
        if known is None:
            known = self.backward_passes[key] = self.record_backward(*key)
        recorded, absent = known
        incoming = [grad.contiguous() for grad in grads if grad is not None]
        results: list[Tensor | None] = recorded.run(saved[0], addresses_of((*saved, *incoming)))  # type: ignore[assignment]
        if self.signature.dtype in WIDER:
            results = [narrowed(each, self.signature.dtype) for each in results]  # type: ignore[arg-type]
        for n in absent:
            results.insert(n, None)
        return results

    def record_backward(
        self, wanted: tuple[bool, ...], given: tuple[bool, ...], threads: int
    ) -> tuple[executable.Executable, tuple[int, ...]]:
        """Record the backward pass, and say which gradients it does not compute."""
        first = 1 + self.initial
        needs = Needs(wanted[0], any(wanted[1:first]), any(wanted[first:]))
        names = ("dh", *executable.state_names(self.signature, "d{}_final"))
        names += executable.state_names(self.signature, "d{}")[1:]
        incoming = tuple(name for name, there in zip(names, given, strict=True) if there)
        recorded = executable.backward(self.signature._replace(threads=threads), incoming, needs)
        there = (needs.x, *(needs.hx,) * self.initial, *(needs.weights,) * (len(wanted) - first))
        return recorded, tuple(n for n, each in enumerate(there) if not each)


def compiled_layer(signature: Signature) -> CompiledLayer:
    """Return one layer (`rnnfast.backends`)."""
    return CompiledLayer(signature)
