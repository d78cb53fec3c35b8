"""The rules that let `torch.func.vmap` pass through the autograd Functions.

Where the weights are shared, the mapped dimension joins the batch: row b of member n becomes row b * N + n. Rows of a
step stay contiguous that way in every row layout, so one kernel call serves all members.

Where the weights differ from member to member, the mapped dimension joins the directions: direction d of member n
becomes number n * D + d, again one call, on backends that take ensembles. On others, and where members differ in what
an ensemble shares, they run one after another.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import wraps
from itertools import accumulate, pairwise
from typing import Any

import torch
from torch import Tensor

from rnnfast import _torch
from rnnfast.backends.dispatch import load
from rnnfast.context import is_tracked
from rnnfast.spec import Form, Layer, Needs, Weights, flatten, restore


def takes_batched_gradients(backward: Callable) -> Callable:
    """Let a Function's `backward` or `jvp` take what `torch.autograd.functional` hands it with `vectorize=True`.

    Those tensors belong to an older kind of vmap, which knows no rules for operators like ours: they are handed on as
    those of `torch.func.vmap`. `torch.autograd.grad(..., is_grads_batched=True)` makes them too.
    """

    @wraps(backward)
    def mapped(ctx, *grads):
        if torch.compiler.is_dynamo_compiling():
            return backward(ctx, *grads)
        is_batched = _torch.is_batched_gradient
        if not any(grad is not None and is_batched(grad) for grad in grads):
            return backward(ctx, *grads)
        level = _torch.enter_batches() - 1
        _torch.leave_batches()
        found: list[int] = []
        total = 0

        def those_that_there_are(*grads):
            nonlocal total
            results = backward(ctx, *grads)
            total = len(results)
            found[:] = [n for n, result in enumerate(results) if result is not None]
            return tuple(results[n] for n in found)

        dims = tuple(None if grad is None or not is_batched(grad) else 0 for grad in grads)
        members = [
            grad if dim is None else _torch.remove_batch_dim(grad, level, 0, 0)
            for grad, dim in zip(grads, dims, strict=True)
        ]
        results = torch.func.vmap(those_that_there_are, dims)(*members)
        batched = {
            n: _torch.add_batch_dim(result.contiguous(), 0, level) for n, result in zip(found, results, strict=True)
        }
        return tuple(batched.get(n) for n in range(total))

    return mapped


def fold(tensor: Any, dim: Any, size: int, at: int) -> Any:
    """Merge the mapped dimension of `tensor` behind the batch dimension `at`; expand it where it is not mapped."""
    if tensor is None:
        return None
    tensor = expand(tensor, at + 1, size) if dim is None else tensor.movedim(dim, at + 1)
    return tensor.flatten(at, at + 1)


def expand(tensor: Tensor, at: int, size: int) -> Tensor:
    """Insert a dimension of `size` equal members at position `at`."""
    return tensor.unsqueeze(at).expand(*tensor.shape[:at], size, *tensor.shape[at:])


def join(tensor: Any, dim: Any, size: int, at: int) -> Any:
    """Merge the mapped dimension of `tensor` before the dimension `at`; expand it where it is not mapped."""
    if tensor is None:
        return None
    tensor = expand(tensor, at, size) if dim is None else tensor.movedim(dim, at)
    return tensor.flatten(at, at + 1)


def unfold(tensor: Tensor, size: int, at: int) -> Tensor:
    """Split the batch dimension `at` into the batch and, behind it, the mapped dimension."""
    return tensor.unflatten(at, (-1, size))


def member(tensor: Tensor | None, dim: int | None, n: int) -> Tensor | None:
    """Take member n of a tensor that may not be mapped."""
    return tensor if tensor is None or dim is None else tensor.select(dim, n)


def each(apply, size: int, args: Sequence, dims: Sequence):
    """Apply a function to the members one after another and stack its results."""
    calls = [apply(*(member(a, d, n) for a, d in zip(args, dims, strict=True))) for n in range(size)]
    stacked = tuple(torch.stack(parts) for parts in zip(*calls, strict=True))
    return stacked, (0,) * len(stacked)


def part(tensor: Tensor, at: int | None, size: int) -> Tensor:
    """Undo `join`; a result that was not asked for has nothing to undo."""
    return tensor if at is None else tensor.unflatten(at, (size, tensor.shape[at] // size))


def is_ensemble(backend: str, form: Form, dims: Layer) -> bool:
    """Say whether members with weights of their own can run as one layer.

    dims: the mapped dimensions of a layer's tensors, in the layer's places.
    """
    shared = dims.batch_sizes is None and dims.resets is None and not form.signals
    return shared and is_mapped(dims.weights) and load(backend).TAKES_ENSEMBLES


def runs_one_by_one(form: Form, dims: Layer) -> bool:
    """Say whether members that are no ensemble run one after another: they differ in weights or lengths, or the layer
    has signals, which may be broadcast over the batch.
    """
    return form.signals > 0 or dims.batch_sizes is not None or is_mapped(dims.weights)


def is_mapped(dims) -> bool:
    """Say whether any of the dimensions of some weights is mapped."""
    return any(dim is not None for direction in dims for dim in direction)


def row_place(layer: Layer, dims: Layer) -> int:
    """Return where the batch stands in rows of every step: 1 in [T, B, *], 0 in packed rows [rows, *]."""
    return layer.x.dim() - (dims.x is not None) - 2


def fold_layer(layer: Layer, dims: Layer, size: int) -> Layer:
    """Let the mapped dimension of all but the weights join the batch."""
    return replace(
        layer,
        x=fold(layer.x, dims.x, size, row_place(layer, dims)),
        hx=fold_all(layer.hx, dims.hx, size, 1),
        batch_sizes=None if layer.batch_sizes is None else layer.batch_sizes * size,
        resets=fold(layer.resets, dims.resets, size, 1),
    )


def fold_all(tensors: Sequence, dims: Sequence, size: int, at: int) -> tuple:
    """Fold several tensors."""
    return tuple(fold(each, dim, size, at) for each, dim in zip(tensors, dims, strict=True))


def join_layer(layer: Layer, dims: Layer, size: int, own_x: bool) -> Layer:
    """Let the mapped dimension join the directions. own_x: whether each member has its own input."""
    weights = tuple(
        Weights(*(member(w, dim, n) for w, dim in zip(each, dim_of, strict=True)))
        for n in range(size)
        for each, dim_of in zip(layer.weights, dims.weights, strict=True)
    )
    return replace(
        layer,
        x=join(layer.x, dims.x, size, row_place(layer, dims) + 1) if own_x else layer.x,
        hx=join_all(layer.hx, dims.hx, size, 0),
        weights=weights,
        reverse=(*layer.reverse,) * size,
    )


def join_all(tensors: Sequence, dims: Sequence, size: int, at: int) -> tuple:
    """Join several tensors."""
    return tuple(join(each, dim, size, at) for each, dim in zip(tensors, dims, strict=True))


def map_layer(apply, backend: str, form: Form, size: int, tensors: Sequence[Tensor], dims: Sequence):
    """Map a layer. `apply` takes a form and tensors. Returns its results and their mapped dimensions."""
    layer, layer_dims = restore(form, tensors), restore(form, dims)
    at, states = row_place(layer, layer_dims), form.states
    if is_ensemble(backend, form, layer_dims):
        results = apply(*flatten(join_layer(layer, layer_dims, size, layer_dims.x is not None)))
        ats = [None if r.shape == (0,) else 0 if states <= n < 2 * states else at + 1 for n, r in enumerate(results)]
        return tuple(part(r, a, size) for r, a in zip(results, ats, strict=True)), tuple(ats)
    if runs_one_by_one(form, layer_dims):
        return each(lambda *members: apply(form, members), size, tensors, dims)
    results = apply(*flatten(fold_layer(layer, layer_dims, size)))
    # A tensor of shape [0] stands for a result that was not asked for.
    ats = [None if r.shape == (0,) else 1 if states <= n < 2 * states else at for n, r in enumerate(results)]
    return (
        tuple(r if a is None else unfold(r, size, a) for r, a in zip(results, ats, strict=True)),
        tuple(None if a is None else a + 1 for a in ats),
    )


def map_backward(
    apply, backend: str, form: Form, needs: Needs, groups: int, size: int, lists: Sequence[Sequence], dims: Sequence
):
    """Map a layer's backward. Each member gets its own gradients of the weights.

    lists: the layer's tensors, its states, what else it saved, and the gradients of states and final states; `apply`
    takes a form and the number of groups before them.
    """
    tensors, states, saved, gradients = lists
    layer, layer_dims = restore(form, tensors), restore(form, dims[0])
    at, count = row_place(layer, layer_dims), form.states
    ensemble = is_ensemble(backend, form, layer_dims)
    args, flat_dims = [t for each in lists for t in each], [d for each in dims for d in each]
    if not ensemble and (runs_one_by_one(form, layer_dims) or (needs.weights and is_tracked(args))):
        bounds = [0, *accumulate(map(len, lists))]

        def apply_to(*args):
            return apply(form, groups, *(args[a:b] for a, b in pairwise(bounds)))

        return each(apply_to, size, args, flat_dims)
    change_all, rows, first = (join_all, at + 1, 0) if ensemble else (fold_all, at, 1)
    others = (
        change_all(states, dims[1], size, rows),
        change_all(saved, dims[2], size, rows),
        (
            *change_all(gradients[:count], dims[3][:count], size, rows),
            *change_all(gradients[count:], dims[3][count:], size, first),
        ),
    )
    if ensemble:
        own_x = layer_dims.x is not None or needs.x
        results = apply(*on(flatten(join_layer(layer, layer_dims, size, own_x)), groups), *others)
        return split_ensemble(results, size, rows, form, needs)
    inner = groups * size if needs.weights else 1
    results = apply(*on(flatten(fold_layer(layer, layer_dims, size)), inner), *others)
    return split_gradients(results, size, groups, at, form, needs)


def on(flat: tuple[Form, list[Tensor]], groups: int) -> tuple[Form, int, list[Tensor]]:
    """Put the number of groups between a form and its tensors."""
    return flat[0], groups, flat[1]


def split_gradients(results, size: int, groups: int, at: int, form: Form, needs: Needs):
    """Give the gradients of x, hx and weights back their mapped dimension; what was not needed has none."""
    x, hx, weights = results[0], results[1 : 1 + form.states], results[1 + form.states :]
    if needs.weights and groups > 1:
        weights = tuple(w.unflatten(0, (groups, size)) for w in weights)
    elif needs.weights and size == 1:
        weights = tuple(w[None] for w in weights)
    outputs = (
        unfold(x, size, at) if needs.x else x,
        *(unfold(h, size, 1) if needs.hx else h for h in hx),
        *weights,
    )
    dims = (
        at + 1 if needs.x else None,
        *(2 if needs.hx else None for _ in hx),
        *(int(groups > 1) if needs.weights else None for _ in weights),
    )
    return outputs, dims


def split_ensemble(results, size: int, at: int, form: Form, needs: Needs):
    """Give the gradients of an ensemble back their mapped dimension."""
    count = form.differentiable - 1 - form.states  # weights of a member
    weights = results[1 + form.states :]
    stacked = tuple(torch.stack(weights[n::count]) if needs.weights else weights[n] for n in range(count))
    ats = (at if needs.x else None, *(0 if needs.hx else None,) * form.states)
    parts = (part(r, a, size) for r, a in zip(results[: 1 + form.states], ats, strict=True))
    return (*parts, *stacked), (*ats, *(0 if needs.weights else None,) * count)
