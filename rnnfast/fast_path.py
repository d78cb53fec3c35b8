"""The fast path: calls of sizes that were seen before pass pointers to recorded programs.

For small layers Python costs more than the kernel. A call on plain CPU tensors in a contiguous layout is therefore
found by a key of its options and sizes. The first call of a key has its arguments checked, which depends on nothing
else, and records what runs it and all later ones: outside of autograd one program for all layers, under autograd a
Function for each layer. What else may be asked of the graph afterwards (derivatives of derivatives, maps over incoming
gradients, tracing) goes to `rnnfast.gradients.gradients_of`, like that of any other layer.

Calls under transforms, hooks on saved tensors, checkpoints, dispatch modes, autocast or a profiler take the ordinary
path, `rnnfast.functional.run`.
"""

from collections.abc import Callable, Sequence
from functools import partial
from operator import attrgetter

import torch
from rnnfast_kernels.cpu.runtime import pool
from torch import Tensor

from rnnfast import _torch, autograd, context, native
from rnnfast.backends import CompiledLayer, NoMemoryError, measured
from rnnfast.backends.dispatch import backend_of, load, records, setting
from rnnfast.changes import unpack, versions
from rnnfast.gradients import Spec, gradients_of
from rnnfast.layers import through_layers
from rnnfast.spec import Form, Options, Signature, cell_named, group
from rnnfast.vmap import takes_batched_gradients

# Recorded calls by their keys; the oldest are forgotten when there are too many.
MOST = 512
recorded: dict[tuple | None, Callable] = {}

facts, requires_grad = attrgetter("shape", "dtype", "is_cpu"), attrgetter("requires_grad")
is_neg = Tensor.is_neg


def states_of(options: Options, hx) -> tuple[Tensor, ...] | None:
    """Return given initial states as a tuple, or None where they do not have the form that the cell takes."""
    count = len(cell_named(options.cell).states)
    if count == 1:
        return (hx,) if isinstance(hx, Tensor) else None
    return tuple(hx) if isinstance(hx, (tuple, list)) and len(hx) == count else None


def key_of(options: Options, x: Tensor, states: Sequence[Tensor], weights: Sequence[Tensor]) -> tuple | None:
    """Return the key of a call: all that it depends on but values and addresses; None off the fast path.

    Negated views are rejected here. Tensors without memory are rejected by the recorded call (`NoMemoryError`).
    """
    tensors = (x, *states, *weights)
    if (
        not context.is_free(tensors)
        or True in map(is_neg, tensors)
        or _torch.is_profiled()
        or not x.is_cpu
        or x.layout is not torch.strided
        or _torch.is_any_autocast_enabled()
        or _torch.in_dual_level()
        or (asked := setting()) not in ("auto", "numba")
        or not are_contiguous(tensors[1:])
    ):
        return None
    differentiated = torch.is_grad_enabled() and True in map(requires_grad, tensors)
    if differentiated:
        # Hooks on saved tensors, those of checkpoints among them, count what is saved, call by call.
        if x.dim() != 3 or options.recompute or _torch.saving_hooks(True) is not None:
            return None
    elif options.dropout and options.training:
        return None
    threads = torch.get_num_threads()
    if threads > pool.known_cores:  # what `usable` asks too, without a call
        threads = pool.usable(threads)
    return options, differentiated, threads, x.stride(), len(states), tuple(map(facts, tensors)), asked


def are_contiguous(tensors: Sequence[Tensor]) -> bool:
    """Say whether tensors are dense and contiguous."""
    try:
        return False not in map(Tensor.is_contiguous, tensors)
    except RuntimeError:  # what compressed sparse tensors answer
        return False


def record(
    key: tuple, x: Tensor, states: Sequence[Tensor], weights: Sequence[Tensor], sizes: measured.Sizes | None
) -> Callable | None:
    """Record a call whose arguments are right: a function of the input, the initial states and the weights.

    Returns None where no backend records it. The function returns None where a tensor has no memory.
    """
    options, differentiated, threads, *_ = key
    extents = (*x.shape, options.hidden(weights), options.width(weights))
    if x.stride(-1) != 1 or 0 in extents or not can_stack(options):
        return None
    backend = backend_of(options.cell, x.device, x.dtype, False)
    if not records(backend):
        return None
    signatures, batched = signatures_of(options, x, weights, not states, threads), x.dim() == 3
    if backend_of(options.cell, x.device, x.dtype, False, sizes) == "torch":  # measured faster at these sizes
        if not batched:
            return None
        call: Callable = native.record_call(options, signatures[0].batch, options.width(weights))
    elif differentiated:
        call = Training(backend, options, signatures)
    else:
        call = Inference(backend, options, signatures, batched)
    keep(recorded, key, call, MOST)
    return call


def keep(calls: dict, key: tuple, call: Callable, most: int) -> None:
    """Add a call to those that are known, of which the oldest go where there are too many."""
    for oldest in [*calls][: max(0, len(calls) + 1 - most)]:
        calls.pop(oldest, None)  # another thread may have done that
    calls[key] = call


def can_stack(options: Options) -> bool:
    """Say whether layers of a cell on top of one another are recorded as one program."""
    cell = cell_named(options.cell)
    return len(cell.states) <= 2 and cell.output == 0


def stacked_weights(options: Options, weights: Sequence[Tensor]) -> Sequence[Tensor]:
    """Return the weights of all layers as they are recorded."""
    count = options.flat_count * options.directions
    parts = (flat_weights(options, weights[n : n + count]) for n in range(0, len(weights), count))
    return [each for part in parts for each in part]


def signatures_of(
    options: Options, x: Tensor, weights: Sequence[Tensor], zero: bool, threads: int
) -> tuple[Signature, ...]:
    """Describe every layer of a call, time-major. zero: whether no initial states are given."""
    form = Form(options.cell, options.reverse(), options.present)
    hidden, width = options.hidden(weights), options.width(weights)
    if x.dim() == 2:
        x = x.unsqueeze(1)
    elif options.batch_first:
        x = x.transpose(0, 1)
    steps, batch, _ = shape = tuple(x.shape)
    sizes = (steps, batch, hidden, width, 1, zero, threads)
    first = Signature(form, x.dtype, shape, (*x.stride()[:2], 1), *sizes)
    columns = options.directions * width
    later = first._replace(x_shape=(steps, batch, columns), x_strides=(batch * columns, columns, 1))
    return (first, *(later,) * (options.num_layers - 1))


def flat_weights(options: Options, weights: Sequence[Tensor]) -> list[Tensor]:
    """Return the weights of one layer as they are recorded: with the parameters of a cell in one tensor."""
    return [each for direction in group(options, weights) for each in direction if each is not None]


class Inference:
    """A call through which no derivative is taken."""

    def __init__(self, backend: str, options: Options, signatures: tuple[Signature, ...], batched: bool):
        self.options, self.parameters = options, options.present.parameters
        self.batch_first = options.batch_first and batched
        self.stack = load(backend).stack(signatures, batched)

    def __call__(self, x: Tensor, states: Sequence[Tensor], weights: Sequence[Tensor]):
        """Return the output and the final states, as a module does."""
        if self.parameters:
            weights = stacked_weights(self.options, weights)
        try:
            output, *finals = self.stack((x, *states, *weights))
        except NoMemoryError:
            return None
        return output.transpose(0, 1) if self.batch_first else output, tuple(finals) if len(finals) > 1 else finals[0]


class Training:
    """A call through which a derivative may be taken."""

    def __init__(self, backend: str, options: Options, signatures: tuple[Signature, ...]):
        self.options, self.backend, self.parameters = options, backend, options.present.parameters
        self.layers = [load(backend).compiled_layer(signature) for signature in signatures]

    def __call__(self, x: Tensor, states: Sequence[Tensor], weights: Sequence[Tensor]):
        """Return the output and the final states, as a module does."""
        options = self.options
        if options.batch_first:
            x = x.transpose(0, 1)
        try:
            output, finals, _ = through_layers(options, x, states, weights, self.run)
        except NoMemoryError:
            return None
        if options.batch_first:
            output = output.transpose(0, 1)
        return output, finals if len(finals) > 1 else finals[0]

    def run(self, n: int, x: Tensor, hx: Sequence[Tensor], weights: Sequence[Tensor]):
        """Run layer number n."""
        layer = self.layers[n]
        if self.parameters:
            weights = flat_weights(self.options, weights)
        output, *finals = apply(self.backend, layer, x, *hx, *weights)
        return output, finals[: layer.states], ()


class FastLayer(torch.autograd.Function):
    """A recorded layer, of x, the initial states if given, and weights.

    Returns the output [T, B, D*P], the final states, and the other state of every step if there is one: not for the
    caller, but because derivatives of the gradient go through it.
    """

    @staticmethod
    def forward(ctx, backend, layer, *tensors):
        results, states = layer.forward(tensors), layer.states
        ctx.backend, ctx.layer = backend, layer
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*tensors, *results[:-states])
        ctx.versions = versions(tensors)
        return results[0], *results[-states:], *results[1:states]

    @staticmethod
    @takes_batched_gradients
    def backward(ctx, *grads):
        given = [grad for grad in grads if grad is not None]
        if not given:
            return (None,) * len(ctx.needs_input_grad)
        backend, layer, wanted = ctx.backend, ctx.layer, ctx.needs_input_grad[2:]
        try:
            saved = ctx.saved_tensors
        except RuntimeError:
            saved = unpack(ctx, ctx.versions, partial(repair, layer, wanted[0], len(wanted)))
        if context.create_graph():
            return None, None, *by_operators(backend, layer, saved, grads, context.needed_by_engine(ctx)[2:])
        tracing = torch.compiler.is_dynamo_compiling()
        if tracing or not context.is_plain(given, saved) or not layer.fits(saved):
            return None, None, *by_operators(backend, layer, saved, grads, wanted)
        return None, None, *layer.backward(saved, grads, wanted)


# `Function.apply` without its look at the signature, and at transforms, which are not there.
apply = super(torch.autograd.Function, FastLayer).apply


def repair(layer: CompiledLayer, need_x: bool, count: int, saved: list, changed: Sequence[int]) -> list | None:
    """Return what a layer saved, of which some were changed in place: see `rnnfast.changes.unpack`.

    count: the number of the layer's tensors.
    """
    signature = layer.signature
    if changed[-1] < count:
        offset = signature.form.states if signature.zero else 0  # `unread_weights` counts initial states
        unused = autograd.unread_weights(signature.form, need_x)
        return saved if not context.create_graph() and unused.issuperset(n + offset for n in changed) else None
    if changed[0] < count or not layer.fits(saved):
        return None
    with torch.no_grad():
        results = layer.forward(saved[:count])
    return [*saved[:count], *results[: len(saved) - count]]


def by_operators(
    backend: str, layer: CompiledLayer, saved: Sequence[Tensor], grads: Sequence[Tensor | None], wanted: Sequence[bool]
) -> list[Tensor | None]:
    """Do what `layer.backward` does by the operator that is differentiable, mapped and traced."""
    signature = layer.signature
    form, count, states = signature.form, len(wanted), signature.form.states
    x, *tensors = saved[:count]
    output, *kept = saved[count:]
    absent = states if signature.zero else 0
    rows = (len(form.reverse), signature.batch)
    hx = [x.new_zeros(*rows, width) for width in signature.widths[:absent]]
    h, dh = (each if each is None else each.unflatten(-1, (len(form.reverse), -1)) for each in (output, grads[0]))
    asked = (wanted[0], *(False,) * absent, *wanted[1:])
    args = (x, *hx, *tensors, h, *kept, dh, *grads[1 + states :], *grads[1 : 1 + states])
    results = gradients_of(Spec(backend, form, False), args[: form.total], args[form.total :], asked)
    found = (results[0], *results[1 + absent :])
    return [grad if want else None for grad, want in zip(found, wanted, strict=True)]
