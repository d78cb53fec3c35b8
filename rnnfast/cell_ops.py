"""Layers of declared cells for torch: `rnnfast::cell_layer` and its gradient, and the autograd Function around them.

They are for cells whose form torch's do not have (`rnnfast_kernels.equations.cell.Cell.standard`) and run on the Numba
backend. Forward mode, `torch.func` transforms and derivatives of derivatives take the plain loop, which torch
differentiates any number of times.
"""

from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import NamedTuple

import torch
from rnnfast_kernels.cells import CELLS
from torch import Tensor

from rnnfast import _torch, ops, recurrence
from rnnfast.backends.choice import load, setting
from rnnfast.backends.recurrence import Outcome, Recurrence, flat_weights, pack_weights

LAYER_SCHEMA = (
    "cell_layer(str cell, bool[] reverse, bool biased, bool save, bool all_states, Tensor x, Tensor h, Tensor extra, "
    "Tensor[] weights, Tensor[] signals, Tensor? batch_sizes, Tensor? resets, str version='') -> Tensor[]"
)
BACKWARD_SCHEMA = (
    "cell_layer_backward(str cell, bool[] reverse, bool biased, bool need_x, bool need_hx, bool need_weights, "
    "bool need_signals, Tensor x, Tensor h, Tensor extra, Tensor[] weights, Tensor[] signals, Tensor? batch_sizes, "
    "Tensor? resets, Tensor states, Tensor extra_states, Tensor saved, Tensor? dh, Tensor? dextra, Tensor? dh_final, "
    "Tensor? dextra_final) -> Tensor[]"
)
for schema in (LAYER_SCHEMA, BACKWARD_SCHEMA):
    ops.library.define(schema, tags=(torch.Tag.pt2_compliant_tag,))


class Spec(NamedTuple):
    """The constants of a layer. counts: how many weights and signals there are."""

    cell: str
    reverse: tuple[bool, ...]
    biased: bool
    all_states: bool
    counts: tuple[int, int]


def run(layer: Recurrence, backend: str, all_states: bool) -> Outcome:
    """Run a layer on a backend, "numba" or "reference"; its states beside h are there with `all_states` only."""
    weights = flat_weights(layer.weights)
    biased = layer.weights[0].b_ih is not None
    tensors = (layer.x, layer.h, layer.extra, *weights, *layer.signals)
    if backend == "reference":
        return recurrence.run(layer)
    if needs_plain_loop(tensors):
        if setting() == "numba":
            raise RuntimeError(
                "the 'numba' backend cannot run this: it has no kernels for forward mode and torch.func transforms of "
                f"cells of other forms than torch's, such as {layer.cell}"
            )
        return recurrence.run(layer)
    constants = (layer.cell, layer.reverse, biased)
    groups = (layer.x, layer.h, layer.extra, weights, layer.signals, layer.batch_sizes, layer.resets)
    if torch.compiler.is_compiling():
        found = torch.ops.rnnfast.cell_layer(*constants, True, all_states, *groups, version_of(layer.cell))
    elif torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors):
        spec = Spec(layer.cell, layer.reverse, biased, all_states, (len(weights), len(layer.signals)))
        found = CellFunction.apply(spec, layer.batch_sizes, layer.resets, *tensors)
    else:
        with _torch.below_autograd():
            found = torch.ops.rnnfast.cell_layer(*constants, False, all_states, *groups)
    return Outcome(*found[:4])


def needs_plain_loop(tensors: Sequence[Tensor]) -> bool:
    """Say whether a transform or a forward derivative is under way, for which there are no kernels."""
    if torch.compiler.is_compiling():
        return False
    return _torch.innermost_transform() is not None or _torch.in_dual_level()


@_torch.constant_in_graphs
def version_of(cell: str) -> str:
    """Return what tells the graphs of this version from those of any other."""
    return ops.version()


def make(cell, reverse, biased, x, h, extra, weights, signals, batch_sizes, resets) -> Recurrence:
    """Build a layer from what the operators take."""
    if cell not in CELLS:
        from rnnfast.declare import found

        found(cell)
    named = pack_weights(CELLS[cell], weights, biased, len(reverse))
    return Recurrence(cell, x, h, extra, named, tuple(signals), tuple(reverse), batch_sizes, resets)


def check(layer: Recurrence) -> None:
    """Raise RuntimeError where tensors do not fit together: kernels take addresses."""
    cell, x = layer.row, layer.x
    directions, hidden = len(layer.reverse), layer.weights[0].w_ih.shape[0] // cell.gates
    batch = layer.h.shape[1] if layer.h.dim() == 3 else -1
    inputs = layer.weights[0].w_ih.shape[-1]
    for d, weights in enumerate(layer.weights):
        columns = (cell.gates * hidden, cell.recurrent * hidden)
        shapes = ((columns[0], inputs), (columns[1], hidden), columns[:1], columns[1:], (len(cell.parameters), hidden))
        for name, weight, shape in zip(weights._fields, weights, shapes, strict=True):
            if weight is not None:
                ops.expect(f"{name} of direction {d}", weight, shape, x)
    ops.expect("h", layer.h, (directions, batch, hidden), x)
    ops.expect("extra", layer.extra, (len(cell.states) - 1, directions, batch, hidden), x)
    steps = layer.steps
    if layer.batch_sizes is None or x.dim() == 3:
        ops.expect("x", x, (steps, batch, inputs), None, layer.h.dtype)
    else:
        ops.expect("x", x, (x.shape[0], inputs), None, layer.h.dtype)
        sizes = layer.batch_sizes.tolist()
        if sum(sizes) != len(x) or any(a < b for a, b in zip([batch, *sizes], [*sizes, 0], strict=True)):
            raise RuntimeError(f"rnnfast: expected batch_sizes for {len(x)} rows of {batch} sequences, got {sizes}")
    if layer.batch_sizes is not None:
        ops.expect("batch_sizes", layer.batch_sizes, (steps,), None, torch.int64)
    if layer.resets is not None:
        ops.expect("resets", layer.resets, (steps, batch), None, torch.bool)
    if len(layer.signals) != len(cell.signals):
        raise RuntimeError(f"rnnfast: expected {len(cell.signals)} signals, got {len(layer.signals)}")
    for name, signal in zip(cell.signals, layer.signals, strict=True):
        full = (steps, batch, hidden)
        if signal.dim() != 3 or any(a not in (1, b) for a, b in zip(signal.shape, full, strict=True)):
            raise RuntimeError(
                f"rnnfast: expected the signal {name} to be broadcastable to {list(full)}, got {list(signal.shape)}"
            )
        ops.expect(f"the signal {name}", signal, signal.shape, x)


def as_given(x: Tensor) -> AbstractContextManager:
    return ops.as_given(x)


def cell_layer(
    cell, reverse, biased, save, all_states, x, h, extra, weights, signals, batch_sizes, resets, version=""
) -> list[Tensor]:
    """Run one layer: h and the other states at every step, both at the end, and what backward wants."""
    with as_given(x):
        layer = make(cell, reverse, biased, x, h, extra, weights, signals, batch_sizes, resets)
        check(layer)
        outcome, saved = load("numba cells").forward(layer, save=save, all_states=all_states)
    return [*outcome, saved]


def cell_layer_fake(
    cell, reverse, biased, save, all_states, x, h, extra, weights, signals, batch_sizes, resets, version=""
) -> list[Tensor]:
    """Shapes of `cell_layer`."""
    row = CELLS[cell]
    hidden = h.shape[-1]
    lead = (*x.shape[:-1], len(reverse))
    states = x.new_empty(lead + (hidden,))  # noqa: RUF005
    others = x.new_empty((extra.shape[0], *lead, hidden)) if save or all_states else x.new_empty(extra.shape[0], 0)
    wide = torch.promote_types(x.dtype, torch.float32)
    shape = (*lead, row.kept * hidden) if save and row.saved else (0,)
    return [states, others, torch.empty_like(h), torch.empty_like(extra), x.new_empty(shape, dtype=wide)]


def cell_layer_backward(
    cell, reverse, biased, need_x, need_hx, need_weights, need_signals, x, h, extra, weights, signals, batch_sizes,
    resets, states, extra_states, saved, dh, dextra, dh_final, dextra_final,
) -> list[Tensor]:  # fmt: skip
    """Differentiate one layer: gradients of x, h, extra, weights and signals, shape [0] where not needed."""
    with as_given(x):
        layer = make(cell, reverse, biased, x, h, extra, weights, signals, batch_sizes, resets)
        check(layer)
        given = Outcome(dh, dextra, dh_final, dextra_final)
        dx, dh_first, dextra_first, dweights, by_signal = load("numba cells").backward(
            layer, states, extra_states, saved, given, need_x, need_hx, need_weights, need_signals
        )
        nothing = x.new_empty(0)
        found = [nothing if each is None else each for each in (dx, dh_first, dextra_first)]
        found += flat_weights(dweights) if need_weights else [nothing.clone() for _ in weights]
        if need_signals:
            found += [reduced(layer, each, signal) for each, signal in zip(by_signal, signals, strict=True)]
        else:
            found += [nothing.clone() for _ in signals]
    return found


def reduced(layer: Recurrence, gradient: Tensor, signal: Tensor) -> Tensor:
    """Sum a gradient by a signal, [*L, D, H], over directions and over the dimensions along which the signal is the
    same."""
    gradient = gradient.sum(-2)
    if layer.x.dim() == 2:
        sizes = layer.batch_sizes
        assert sizes is not None
        padded = gradient.new_zeros(layer.steps, layer.h.shape[1], gradient.shape[-1])
        padded[torch.arange(layer.h.shape[1]) < sizes[:, None]] = gradient
        gradient = padded
    return gradient.sum_to_size(signal.shape).clone(memory_format=torch.contiguous_format)


def cell_layer_backward_fake(
    cell, reverse, biased, need_x, need_hx, need_weights, need_signals, x, h, extra, weights, signals, batch_sizes,
    resets, states, extra_states, saved, dh, dextra, dh_final, dextra_final,
) -> list[Tensor]:  # fmt: skip
    """Shapes of `cell_layer_backward`."""
    pairs = [(x, need_x), (h, need_hx), (extra, need_hx)]
    pairs += [(each, need_weights) for each in weights] + [(each, need_signals) for each in signals]
    return [x.new_empty(tensor.shape if need else (0,)) for tensor, need in pairs]


class CellFunction(torch.autograd.Function):
    """A layer with what backward needs."""

    @staticmethod
    def forward(ctx, spec: Spec, batch_sizes, resets, x, h, extra, *tensors):
        weights, signals = tensors[: spec.counts[0]], tensors[spec.counts[0] :]
        results = torch.ops.rnnfast.cell_layer(
            spec.cell, spec.reverse, spec.biased, True, spec.all_states, x, h, extra, weights, signals, batch_sizes,
            resets,
        )  # fmt: skip
        ctx.spec = spec
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(results[4])
        ctx.save_for_backward(batch_sizes, resets, x, h, extra, *tensors, results[0], results[1], results[4])
        return tuple(results)

    @staticmethod
    def backward(ctx, *grads):
        spec, needs = ctx.spec, ctx.needs_input_grad[3:]
        batch_sizes, resets, *tensors, states, extra_states, saved = ctx.saved_tensors
        if all(grad is None for grad in grads[:4]):
            return (None,) * (3 + len(needs))
        if torch.is_grad_enabled():
            found = by_plain_loop(spec, batch_sizes, resets, tensors, grads[:4], needs)
        else:
            (x, h, extra, *others), count = tensors, spec.counts[0]
            wanted = needs[0], any(needs[1:3]), any(needs[3 : 3 + count]), any(needs[3 + count :])
            found = torch.ops.rnnfast.cell_layer_backward(
                spec.cell, spec.reverse, spec.biased, *wanted, x, h, extra, others[:count], others[count:],
                batch_sizes, resets, states, extra_states, saved, *grads[:4],
            )  # fmt: skip
        return (None,) * 3 + tuple(g if need else None for g, need in zip(found, needs, strict=True))


def by_plain_loop(spec: Spec, batch_sizes, resets, tensors, grads, needs) -> list[Tensor | None]:
    """Differentiate the plain loop, in a way that can be differentiated again."""
    x, h, extra, *others = tensors
    count = spec.counts[0]
    layer = make(spec.cell, spec.reverse, spec.biased, x, h, extra, others[:count], others[count:], batch_sizes, resets)
    pairs = [
        (result, grad)
        for result, grad in zip(recurrence.run(layer), grads, strict=True)
        if grad is not None and result.requires_grad
    ]
    wanted = [tensor for tensor, need in zip(tensors, needs, strict=True) if need]
    results, seeds = zip(*pairs, strict=True)
    found = iter(torch.autograd.grad(results, wanted, seeds, create_graph=True, allow_unused=True))
    return [next(found) if need else None for need in needs]


def setup_context(ctx, inputs, output):
    """Save what the backward operator takes, in a traced graph."""
    cell, reverse, biased, _, _, x, h, extra, weights, signals, batch_sizes, resets, _ = inputs
    ctx.constants = (cell, reverse, biased)
    ctx.count = len(weights)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(batch_sizes, resets, x, h, extra, *weights, *signals, output[0], output[1], output[4])


def traced_backward(ctx, grads):
    """Call the backward operator, in a traced graph."""
    batch_sizes, resets, x, h, extra, *others, states, extra_states, saved = ctx.saved_tensors
    count = ctx.count
    needs = ctx.needs_input_grad
    wanted = needs[5], needs[6] or needs[7], any(needs[8]), any(needs[9])
    found = torch.ops.rnnfast.cell_layer_backward(
        *ctx.constants, *wanted, x, h, extra, others[:count], others[count:], batch_sizes, resets, states,
        extra_states, saved, *grads[:4],
    )  # fmt: skip

    def kept(tensors, flags):
        return [each if flag else None for each, flag in zip(tensors, flags, strict=True)]

    first = kept(found[:3], needs[5:8])
    lists = kept(found[3 : 3 + count], needs[8]), kept(found[3 + count :], needs[9])
    return (*(None,) * 5, *first, *lists, None, None, None)


for name, implementation, fake in (
    ("cell_layer", cell_layer, cell_layer_fake),
    ("cell_layer_backward", cell_layer_backward, cell_layer_backward_fake),
):
    ops.library.impl(name, implementation, "CPU")
    torch.library.register_fake(f"rnnfast::{name}", fake, lib=ops.library)
torch.library.register_autograd("rnnfast::cell_layer", traced_backward, setup_context=setup_context, lib=ops.library)
