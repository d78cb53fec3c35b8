"""One autograd Function for every cell, and one more for its second derivative.

`LayerFunction` runs the operators of `rnnfast.ops`. Its backward is itself a Function, whose own backward and
forward-mode derivatives are those of `rnnfast.second_order`.

Functions take flat positional arguments: first the constants that describe the layer, then its tensors
(x, the initial states, the weights), in the order of the operators.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from functools import partial
from typing import NamedTuple

import torch
from rnnfast_kernels.cells import CELLS
from torch import Tensor

from rnnfast import _torch, batching, flops, onnx_export, ops, reference, second_order
from rnnfast.backends import Changes, Gradients, Layer, Needs, Pushed
from rnnfast.backends.choice import differentiates_twice, load
from rnnfast.changes import unpack, versions

PLAIN = frozenset((Tensor, torch.nn.Parameter))


class Spec(NamedTuple):
    """The constants of a layer: the first arguments of both Functions."""

    cell: str
    backend: str
    reverse: tuple[bool, ...]
    all_states: bool

    @property
    def states(self) -> int:
        """Return the number of state tensors, S."""
        return len(CELLS[self.cell].states)


def layer(spec: Spec, x, hx, weights, batch_sizes, resets) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """Run one layer under autograd and return its states and final states.

    States beyond the first are usable only with `spec.all_states`.
    """
    tensors = (x, *hx, *weights)
    constants = (spec.cell, spec.backend, spec.reverse, False, spec.all_states)
    if torch.compiler.is_compiling():
        if ops.in_onnx_export():
            return onnx_export.layer(spec.cell, spec.reverse, spec.all_states, x, hx, weights, batch_sizes, resets)
        results = torch.ops.rnnfast.layer(*constants, x, hx, weights, batch_sizes, resets, ops.version())
    elif not is_differentiated(tensors):
        results = below_autograd("layer", tensors, *constants, x, hx, weights, batch_sizes, resets)
    elif _torch.forward_nesting() > 1:
        return reference.run(ops.make_layer(spec.cell, spec.reverse, x, hx, weights, batch_sizes, resets))
    elif _torch.is_functionalized():
        results = torch.ops.rnnfast.layer(*constants, x, hx, weights, batch_sizes, resets, ops.version())
    else:
        results = _torch.apply(LayerFunction, *spec, batch_sizes, resets, *tensors)
    count = len(hx)
    return tuple(results[:count]), tuple(results[count : 2 * count])


def layer_kernel(
    cell, backend, reverse, save, all_states, x, hx, weights, batch_sizes, resets, version=""
) -> list[Tensor]:
    """What autograd does on meeting the operator `layer` itself: in a traced graph, where Functions would be slow."""
    if not is_differentiated((x, *hx, *weights)):
        constants = (cell, backend, reverse, save, all_states)
        return below_autograd("layer", (x, *hx, *weights), *constants, x, hx, weights, batch_sizes, resets, version)
    if _torch.forward_nesting() > 1:
        raise RuntimeError(
            "rnnfast: torch.compile cannot trace nested forward-mode transforms (jvp of jvp, jacfwd of jacfwd); "
            "call them outside of torch.compile, or nest jacfwd over jacrev as torch.func.hessian does"
        )
    results = _torch.apply_here(LayerFunction, cell, backend, reverse, True, batch_sizes, resets, x, *hx, *weights)
    count = len(hx)
    hidden = () if save or all_states else results[1:count]
    shown = results if save else results[: 2 * count]
    return [x.new_empty(0) if 1 <= n <= len(hidden) else result for n, result in enumerate(shown)]


def backward_kernel(
    cell, backend, reverse, need_x, need_hx, need_weights, groups, x, hx, weights, batch_sizes, resets,
    states, saved, dstates, dfinals,
) -> list[Tensor]:  # fmt: skip
    """What autograd does on meeting the operator `layer_backward` itself."""
    counts = (1 + len(hx) + len(weights), len(saved))
    constants = (cell, backend, reverse, need_x, need_hx, need_weights, groups, *counts)
    tensors = (batch_sizes, resets, x, *hx, *weights, *states, *saved, *dstates, *dfinals)
    if is_differentiated(tensors):
        return list(_torch.apply_here(LayerBackward, *constants, *tensors))
    return list(LayerBackward.forward(*constants, *tensors))


def enabled_below() -> AbstractContextManager:
    """Let transforms below the current one differentiate what a Function's forward calls, though it is off for that.

    torch's own rule for Functions under transforms does the same; `_torch.apply_here` goes around it.
    """
    if torch.compiler.is_dynamo_compiling() or _torch.innermost_transform() is None:
        return nullcontext()
    stack = ExitStack()
    stack.enter_context(torch.enable_grad())
    stack.enter_context(_torch.set_forward_grad(True))
    return stack


def is_differentiated(tensors) -> bool:
    """Say whether a derivative may be taken through a call: backwards, or forwards inside `dual_level` and `jvp`."""
    if torch.is_grad_enabled():
        if any(t is not None and t.requires_grad for t in tensors):
            return True
        if _torch.innermost_transform() is not None and any(map(batching.requires_grad_below, tensors)):
            return True
    return _torch.in_dual_level() or _torch.forward_nesting() > 0


def below_autograd(name: str, tensors: Sequence[Tensor], *args) -> list[Tensor]:
    """Call an operator below autograd: through torch's dispatcher, unless nothing would happen there."""
    if torch.compiler.is_dynamo_compiling():
        return getattr(torch.ops.rnnfast, name)(*args)
    if is_plain(tensors):
        return getattr(ops, name)(*args)
    if _torch.count_dispatch_modes() > 0:
        flops.register()
    with _torch.below_autograd():
        return getattr(torch.ops.rnnfast, name)(*args)


def is_plain(tensors: Sequence[Tensor], known: Sequence[Tensor] = ()) -> bool:
    """Say whether nothing would happen to these in torch's dispatcher; small calls do well without its microseconds.

    known: further tensors, of which it is known that their memory holds what they mean.
    """
    return is_free((*tensors, *known) if known else tensors) and are_as_stored(tensors) and not _torch.is_profiled()


def is_concrete(tensors: Sequence[Tensor | None]) -> bool:
    """Say whether these hold numbers that no transform, mode or tracer stands before."""
    return is_free(tensors) and are_as_stored(tensors)  # type: ignore[arg-type]


def is_free(tensors: Sequence[Tensor | None]) -> bool:
    """Say whether no transform, mode or tracer stands before these."""
    return (
        PLAIN.issuperset(map(type, tensors))
        and _torch.count_dispatch_modes() == 0
        and _torch.innermost_transform() is None
        and not _torch.is_pre_dispatched()
        and not _torch.is_traced()
    )


def are_as_stored(tensors: Sequence[Tensor]) -> bool:
    """Say whether the memory of each tensor holds what the tensor means.

    A view may negate what it shows, a tensor of zeros have no memory, and a transform's wrapper outlive the transform.
    """
    return not (
        any(map(Tensor.is_neg, tensors))
        or any(map(_torch.is_zero_tensor, tensors))
        or any(map(_torch.is_wrapper, tensors))
    )


def no_more_derivatives(tensors: Sequence[Tensor | None]) -> bool:
    """Say whether nobody can differentiate or trace what is now computed from these, so that it may be opaque."""
    if torch.compiler.is_dynamo_compiling():
        return False
    present = [t for t in tensors if t is not None]
    if torch.is_grad_enabled() and any(t.requires_grad for t in present):
        return False
    pushing = _torch.in_dual_level() and _torch.pushes_forward()
    return is_concrete(present) and not pushing


def create_graph() -> bool:
    """Say whether what a backward pass computes may be differentiated again."""
    return torch.is_grad_enabled() or _torch.in_dual_level()


def backward_function() -> Callable[..., tuple[Tensor, ...]]:
    """Return what computes a layer's gradients.

    The second Function is there for `create_graph=True` and for forward mode over this; Dynamo traces without it and
    cannot follow one there.
    """
    if not create_graph():
        return LayerBackward.forward
    return by_operator if _torch.is_functionalized() else partial(_torch.apply, LayerBackward)


def by_operator(*args) -> tuple[Tensor, ...]:
    """Compute a layer's gradients by the operator, which takes the arguments of `LayerBackward` in lists."""
    tensor_count, saved_count = args[7:9]
    (x, hx, weights, *options), *others = split(args[0], tensor_count, saved_count, args[9:])
    return tuple(torch.ops.rnnfast.layer_backward(*args[:7], x, hx, weights, *options, *others))


def needed_by_engine(ctx) -> tuple[bool, ...]:
    """Take from `ctx.needs_input_grad` what the backward pass under way has no use for.

    That is worth much to `torch.autograd.grad(y, x, create_graph=True)`, which wants no gradients of the weights.
    """
    if torch.compiler.is_dynamo_compiling() or _torch.innermost_transform() is not None:
        return ctx.needs_input_grad
    nodes = (node for node, _ in ctx.next_functions if node is not None)
    return tuple(need and will_run(next(nodes)) for need in ctx.needs_input_grad)


def will_run(node) -> bool:
    try:
        return _torch.engine_will_run(node)
    except RuntimeError:  # what it says of a leaf that is asked for
        return True


class LayerFunction(torch.autograd.Function):
    """A layer with what backward needs: returns the states, the finals and the saved tensors."""

    @staticmethod
    def forward(cell, backend, reverse, all_states, batch_sizes, resets, x, *tensors):
        count = len(CELLS[cell].states)
        hx, weights = tensors[:count], tensors[count:]
        constants = (cell, backend, reverse, True, all_states)
        with enabled_below():
            results = below_autograd(
                "layer", (x, *tensors), *constants, x, hx, weights, batch_sizes, resets, ops.version()
            )
        return tuple(results)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.spec = Spec(*inputs[:4])
        count = ctx.spec.states
        states, saved = output[:count], output[2 * count :]
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(*saved)
        ctx.counts = (len(inputs) - 6, len(saved))
        ctx.save_for_backward(*inputs[4:], *states, *saved)
        traced = torch.compiler.is_dynamo_compiling() or _torch.innermost_transform() is not None
        ctx.versions = None if traced else versions([inputs[6] if t is None else t for t in inputs[4:]])
        ctx.save_for_forward(*inputs[4:], *states, *saved)

    @staticmethod
    @batching.takes_batched_gradients
    def backward(ctx, *grads):
        count = ctx.spec.states
        if all(g is None for g in grads):
            return (None,) * len(ctx.needs_input_grad)
        needs = (needed_by_engine(ctx) if create_graph() else ctx.needs_input_grad)[6:]
        flags = group_needs(needs, count)
        if torch.compiler.is_dynamo_compiling():
            saved = ctx.saved_tensors
        else:
            saved = unpack(ctx, ctx.versions, partial(repair, ctx.spec, ctx.counts[0], needs[0]))
        constants = (ctx.spec.cell, ctx.spec.backend, ctx.spec.reverse)
        results = backward_function()(*constants, *flags, 1, *ctx.counts, *saved, *grads[: 2 * count])
        return (None,) * 6 + tuple(g if need else None for g, need in zip(results, needs, strict=True))

    @staticmethod
    def jvp(ctx, *tangents):
        tensors = (*ctx.saved_tensors, *tangents[6:])
        if _torch.innermost_transform() is None:
            pushed = push_layer(ctx, tensors)
        else:
            pushed = below_one_jvp(partial(push_layer, ctx), tensors)
        return (*pushed.states, *pushed.finals, *(None,) * ctx.counts[1])

    @staticmethod
    def vmap(info, in_dims, *inputs):
        cell, backend, reverse, all_states = inputs[:4]

        def apply(reverse, *args):
            return LayerFunction.apply(cell, backend, reverse, all_states, *args)

        states = len(CELLS[cell].states)
        return batching.map_layer(apply, backend, reverse, info.batch_size, inputs[4:], in_dims[4:], states)


def repair(spec: Spec, tensor_count: int, need_x: bool, saved: list, changed: Sequence[int]) -> list | None:
    """Return what a layer saved, of which some were changed in place: see `rnnfast.changes.unpack`."""
    first, count = 2 + tensor_count, spec.states
    batch_sizes, resets, x, *tensors = saved[:first]
    hx, weights = tensors[:count], tensors[count:]
    if changed[-1] < first:
        each = len(weights) // len(spec.reverse)
        unused = {2, 3} if each > 3 else set()
        unused |= set() if need_x else {0}
        places = [n - first + len(weights) for n in changed]
        return saved if not create_graph() and all(n >= 0 and n % each in unused for n in places) else None
    if changed[0] < first:
        return None
    constants = (spec.cell, spec.backend, spec.reverse, True, spec.all_states)
    with torch.no_grad():
        found = below_autograd("layer", (x, *tensors), *constants, x, hx, weights, batch_sizes, resets, ops.version())
    return [*saved[:first], *found[:count], *found[2 * count :]]


def push_layer(ctx, tensors: Sequence[Tensor | None]) -> Pushed:
    """Return what changes do to a layer's states. tensors: what `LayerFunction` saved, and the changes."""
    (cell, backend, reverse, _), (tensor_count, saved_count) = ctx.spec, ctx.counts
    none = (None,) * 2 * ctx.spec.states
    args = split(cell, tensor_count, saved_count, (*tensors[:-tensor_count], *none))
    (x, hx, weights, *options), states, saved, *_ = args
    layer, changes = ops.make_layer(cell, reverse, x, hx, weights, *options), tensors[-tensor_count:]
    along = make_changes(cell, reverse, changes)
    kernels = load(backend)
    if no_more_derivatives(tensors) and differentiates_twice(backend, cell, x.dtype):
        with torch.no_grad():
            return kernels.push(layer, states, saved, along)
    return second_order.push_forward(layer, states, along)


def below_one_jvp(function: Callable[[Sequence[Tensor | None]], Pushed], tensors: Sequence[Tensor | None]) -> Pushed:
    """Call a function on what lies below `torch.func.jvp`, if that is the only transform around.

    A derivative by forward mode is not itself differentiated in the same level.
    """
    interpreter = _torch.current_transform() if _torch.lowers else None
    if interpreter is None or not _torch.is_jvp(interpreter) or interpreter.level() > 1:
        return function(tensors)
    level, unwrap, wrap = interpreter.level(), _torch.unwrap_for_grad, _torch.wrap_for_grad
    with interpreter.lower():
        pushed = function([t if t is None else unwrap(t, level) for t in tensors])
    return Pushed(*(tuple(wrap(t, level) for t in each) for each in pushed))


class LayerBackward(torch.autograd.Function):
    """The gradient of a layer by x, hx and weights, as a function of these and of the incoming gradients.

    The states and saved tensors are results of x, hx and weights, and the derivatives of this function are total ones:
    what they owe to the states is counted under x, hx and weights, and the states themselves enter as constants.
    """

    @staticmethod
    def forward(cell, backend, reverse, need_x, need_hx, need_weights, groups, tensor_count, saved_count, *args):
        layer_args, states, saved, dstates, dfinals = split(cell, tensor_count, saved_count, args)
        x, hx, weights, batch_sizes, resets = layer_args
        with enabled_below():
            results = below_autograd(
                "layer_backward", (*args[2:-2 * len(hx)], *(g for g in (*dstates, *dfinals) if g is not None)),
                cell, backend, reverse, need_x, need_hx, need_weights, groups, x, hx, weights, batch_sizes, resets,
                states, saved, dstates, dfinals,
            )  # fmt: skip
        return tuple(results)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.set_materialize_grads(False)
        ctx.constants = inputs[:9]
        ctx.save_for_backward(*inputs[9:])
        ctx.save_for_forward(*inputs[9:])

    @staticmethod
    @batching.takes_batched_gradients
    def backward(ctx, *grads):
        needs = needed_by_engine(ctx)[9:]
        _, _, _, need_x, need_hx, need_weights, _, tensor_count, _ = ctx.constants
        count = len(CELLS[ctx.constants[0]].states)
        given = (need_x, *(need_hx,) * count, *(need_weights,) * (tensor_count - 1 - count))
        changes = [g if need else None for g, need in zip(grads, given, strict=True)]
        bent, pushed = bend_gradients(ctx, changes, needs[2 : 2 + tensor_count])
        incoming = (*pushed.states, *pushed.finals)
        constants = (None,) * (len(needs) - 2 - len(bent) - len(incoming))
        found = (None, None, *bent, *constants, *incoming)
        return (None,) * 9 + tuple(g if need else None for g, need in zip(found, needs, strict=True))

    @staticmethod
    def jvp(ctx, *tangents):
        count, tensor_count = len(CELLS[ctx.constants[0]].states), ctx.constants[7]
        bent, _ = bend_gradients(ctx, tangents[11 : 11 + tensor_count], (True,) * tensor_count)
        along = LayerBackward.apply(*ctx.constants, *ctx.saved_tensors[: -2 * count], *tangents[-2 * count :])
        return tuple(map(add_change, along, bent))

    @staticmethod
    def vmap(info, in_dims, *inputs):
        cell, backend, reverse, *needs, groups, _, saved = inputs[:9]
        states = len(CELLS[cell].states)

        def apply(reverse, groups, *args):
            tensor_count = len(args) - 2 - 3 * states - saved
            return LayerBackward.apply(cell, backend, reverse, *needs, groups, tensor_count, saved, *args)

        constants = batching.Backward(backend, reverse, tuple(needs), groups)
        return batching.map_backward(apply, constants, info.batch_size, inputs[9:], in_dims[9:], states, saved)


def add_change(along: Tensor, bent: Tensor | None) -> Tensor:
    """Add both parts of a gradient's change. A gradient that was not asked for has shape [0], and no change."""
    if bent is None or along.shape == (0,) != bent.shape:
        return along
    if along.shape != bent.shape:
        raise RuntimeError(
            f"rnnfast: parts of a gradient's change have shapes {[*along.shape]} and {[*bent.shape]}: "
            "gradients in groups have no forward derivative"
        )
    return along + bent


def bend_gradients(ctx, changes, wanted: Sequence[bool]) -> tuple[list[Tensor | None], Pushed]:
    """Differentiate the gradients that `LayerBackward` computes along changes of x, hx and weights.

    wanted: which of the results will be used, in the order of x, hx and weights.
    """
    cell, backend, reverse, _, _, _, groups, tensor_count, saved_count = ctx.constants
    args = split(cell, tensor_count, saved_count, ctx.saved_tensors)
    (x, hx, weights, *options), states, saved, dstates, dfinals = args
    count = len(hx)
    layer = ops.make_layer(cell, reverse, x, hx, weights, *options)
    along = make_changes(cell, reverse, changes)
    kernels = load(backend)
    if groups > 1:
        raise RuntimeError("rnnfast: gradients in groups have no derivative")
    if no_more_derivatives((*ctx.saved_tensors, *changes)) and differentiates_twice(backend, cell, x.dtype):
        with torch.no_grad():
            found, pushed = kernels.bend(layer, states, saved, dstates, dfinals, along, group_needs(wanted, count))
        return flatten(layer, found), pushed

    def backward(dstates):
        constants = (cell, backend, reverse, True, True, True, 1, tensor_count, saved_count)
        return LayerBackward.apply(*constants, *ctx.saved_tensors[: -2 * count], *dstates, *(None,) * count)

    bent, pushed = second_order.bend(layer, states, dstates, dfinals, along, backward)
    return [*bent], pushed


def group_needs(needs: Sequence[bool], states: int) -> Needs:
    """Sum up which of x, hx and weights need a gradient."""
    return Needs(needs[0], any(needs[1 : 1 + states]), any(needs[1 + states :]))


def flatten(layer: Layer, gradients: Gradients) -> list[Tensor | None]:
    """List gradients in the order of x, hx and the weights that there are."""
    pairs = zip(layer.weights, gradients.weights, strict=True)
    weights = (g for given, found in pairs for w, g in zip(given, found, strict=True) if w is not None)
    return [gradients.x, *gradients.hx, *weights]


def make_changes(cell: str, reverse: tuple[bool, ...], changes) -> Changes:
    """Name the changes of x, hx and weights."""
    count = len(CELLS[cell].states)
    return Changes(changes[0], changes[1 : 1 + count], ops.pack_weights(changes[1 + count :], len(reverse)))


def split(cell: str, tensor_count: int, saved_count: int, args: Sequence):
    """Undo the flattening of `LayerBackward`'s tensors."""
    count = len(CELLS[cell].states)
    batch_sizes, resets, x = args[:3]
    end = 2 + tensor_count
    hx, weights = args[3 : 3 + count], args[3 + count : end]
    states, saved = args[end : end + count], args[end + count : end + count + saved_count]
    dstates, dfinals = args[-2 * count : -count], args[-count:]
    return (x, hx, weights, batch_sizes, resets), states, saved, dstates, dfinals


ops.library.impl("layer", layer_kernel, "Autograd")
ops.library.impl("layer_backward", backward_kernel, "Autograd")
