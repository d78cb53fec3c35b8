"""The rules that let `torch.func.vmap` pass through the autograd Functions.

Where the weights are shared, the mapped dimension joins the batch: row b of member n becomes row b * N + n. Rows of a
step stay contiguous that way in every row layout, so one kernel call serves all members.

Where the weights differ from member to member, the mapped dimension joins the directions: direction d of member n
becomes number n * D + d, again one call, on backends that take ensembles. On others, and where members differ in what
an ensemble shares, they run one after another.
"""

from collections.abc import Callable, Sequence
from functools import partial, wraps
from typing import NamedTuple

import torch
from torch import Tensor

from rnnfast import _torch
from rnnfast.backends.choice import load


def takes_batched_gradients(backward: Callable) -> Callable:
    """Let a Function's `backward` take what `torch.autograd.grad(..., is_grads_batched=True)` hands it.

    Those tensors belong to an older kind of vmap, which knows no rules for operators like ours: they are handed on as
    those of `torch.func.vmap`.
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

        def those_that_there_are(*grads):
            results = backward(ctx, *grads)
            found[:] = [n for n, result in enumerate(results) if result is not None]
            return tuple(results[n] for n in found)

        dims = tuple(None if grad is None or not is_batched(grad) else 0 for grad in grads)
        members = [
            grad if dim is None else _torch.remove_batch_dim(grad, level, 0, 0)
            for grad, dim in zip(grads, dims, strict=True)
        ]
        results = torch.func.vmap(those_that_there_are, dims)(*members)
        batched = {n: _torch.add_batch_dim(result, 0, level) for n, result in zip(found, results, strict=True)}
        return tuple(batched.get(n) for n in range(len(ctx.needs_input_grad)))

    return mapped


def fold(tensor: Tensor | None, dim: int | None, size: int, at: int) -> Tensor | None:
    """Merge the mapped dimension of `tensor` behind the batch dimension `at`; expand it where it is not mapped."""
    if tensor is None:
        return None
    tensor = expand(tensor, at + 1, size) if dim is None else tensor.movedim(dim, at + 1)
    return tensor.flatten(at, at + 1)


def expand(tensor: Tensor, at: int, size: int) -> Tensor:
    """Insert a dimension of `size` equal members at position `at`."""
    return tensor.unsqueeze(at).expand(*tensor.shape[:at], size, *tensor.shape[at:])


def join(tensor: Tensor | None, dim: int | None, size: int, at: int) -> Tensor | None:
    """Merge the mapped dimension of `tensor` before the dimension `at`; expand it where it is not mapped."""
    if tensor is None:
        return None
    tensor = expand(tensor, at, size) if dim is None else tensor.movedim(dim, at)
    return tensor.flatten(at, at + 1)


def unfold(tensor: Tensor, size: int, at: int) -> Tensor:
    """Split the batch dimension `at` into the batch and, behind it, the mapped dimension."""
    return tensor.unflatten(at, (-1 if tensor.shape[at] else 0, size))


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


def join_weights(weights: Sequence[Tensor], dims: Sequence[int | None], size: int) -> list[Tensor]:
    """List the weights of all members, one member after another."""
    unbound = [(w,) * size if d is None else w.unbind(d) for w, d in zip(weights, dims, strict=True)]
    return [members[n] for n in range(size) for members in unbound]


def is_ensemble(backend: str, dims: Sequence, weight_dims: Sequence) -> bool:
    """Say whether members with weights of their own can run as one layer. dims: of batch_sizes and resets."""
    weights_mapped = any(d is not None for d in weight_dims)
    return weights_mapped and all(d is None for d in dims) and load(backend).TAKES_ENSEMBLES


def map_layer(apply, backend: str, reverse: Sequence[bool], size: int, args: Sequence, dims: Sequence, states: int):
    """Map a layer. args: batch_sizes, resets, x, hx, weights; `apply` takes `reverse` before them.

    Returns its results and their mapped dimensions.
    """
    end = 3 + states
    if is_ensemble(backend, dims[:2], dims[end:]):
        return map_ensemble(apply, reverse, size, args, dims, states)
    if dims[0] is not None or any(d is not None for d in dims[end:]):
        return each(partial(apply, reverse), size, args, dims)
    batch_sizes, resets, x = args[:3]
    at = x.dim() - (dims[2] is not None) - 2  # where the batch stands: 1 in [T, B, I], 0 in packed rows [rows, I]
    results = apply(
        reverse,
        None if batch_sizes is None else batch_sizes * size,
        fold(resets, dims[1], size, 1),
        fold(x, dims[2], size, at),
        *(fold(a, d, size, 1) for a, d in zip(args[3:end], dims[3:end], strict=True)),
        *args[end:],
    )
    ats = [
        None if r.shape == (0,) else 1 if states <= n < 2 * states else at for n, r in enumerate(results)
    ]  # a tensor of shape [0] stands for a result that was not asked for
    return (
        tuple(r if a is None else unfold(r, size, a) for r, a in zip(results, ats, strict=True)),
        tuple(None if a is None else a + 1 for a in ats),
    )


def map_ensemble(apply, reverse: Sequence[bool], size: int, args: Sequence, dims: Sequence, states: int):
    """Map a layer with weights of their own for each member, as one layer."""
    end = 3 + states
    batch_sizes, resets, x = args[:3]
    at = x.dim() - (dims[2] is not None) - 1  # where the directions stand in [*L, D, P or H], the inputs in [*L, N, I]
    results = apply(
        (*reverse,) * size,
        batch_sizes,
        resets,
        x if dims[2] is None else join(x, dims[2], size, at),
        *(join(a, d, size, 0) for a, d in zip(args[3:end], dims[3:end], strict=True)),
        *join_weights(args[end:], dims[end:], size),
    )
    ats = [None if r.shape == (0,) else 0 if states <= n < 2 * states else at for n, r in enumerate(results)]
    return tuple(part(r, a, size) for r, a in zip(results, ats, strict=True)), tuple(ats)


class Backward(NamedTuple):
    """The constants of a layer's backward; needs: of x, hx and weights."""

    backend: str
    reverse: Sequence[bool]
    needs: tuple[bool, bool, bool]
    groups: int


def is_tracked(args: Sequence) -> bool:
    """Say whether a derivative may be taken of what is computed from these, backwards or forwards, at any level.

    Derivatives of gradients in groups are not known: `second_order` sums the weights' over the whole batch.
    """
    if _torch.in_dual_level() or _torch.forward_nesting() > 0:
        return True
    tensors = [a for a in args if isinstance(a, Tensor)]
    if torch.is_grad_enabled() and any(t.requires_grad for t in tensors):
        return True
    return _torch.innermost_transform() is not None and any(map(requires_grad_below, tensors))


def requires_grad_below(tensor: Tensor | None) -> bool:
    """Say whether a tensor wants a gradient outside of the transforms that wrap it; a mapped tensor does not tell."""
    while tensor is not None and _torch.is_wrapper(tensor):
        tensor = _torch.get_unwrapped(tensor)
        if tensor.requires_grad:
            return True
    return False


def map_backward(apply, constants: Backward, size: int, args: Sequence, dims: Sequence, states: int, saved: int):
    """Map a layer's backward. args: batch_sizes, resets, x, hx, weights, states, saved, dstates, dfinals.

    `apply` takes `reverse` and `groups` before them. Each member gets its own gradients of the weights.
    """
    backend, reverse, needs, groups = constants
    end = len(args) - 3 * states - saved
    need_weights = needs[2]
    weight_dims = dims[3 + states : end]
    if is_ensemble(backend, dims[:2], weight_dims):
        return map_ensemble_backward(apply, constants, size, args, dims, states, saved)
    tracked = is_tracked(args)
    weights_mapped = any(d is not None for d in weight_dims)
    if dims[0] is not None or weights_mapped or (need_weights and tracked):
        return each(partial(apply, reverse, groups), size, args, dims)
    batch_sizes, resets, x = args[:3]
    at = x.dim() - (dims[2] is not None) - 2
    ats = (1,) * states + (at,) * (2 * states + saved) + (1,) * states  # of hx, states, saved, dstates, dfinals
    rows = (*range(3, 3 + states), *range(end, len(args)))
    folded = {n: fold(args[n], dims[n], size, a) for n, a in zip(rows, ats, strict=True)}
    results = apply(
        reverse,
        groups * size if need_weights else 1,
        None if batch_sizes is None else batch_sizes * size,
        fold(resets, dims[1], size, 1),
        fold(x, dims[2], size, at),
        *(folded.get(n, args[n]) for n in range(3, len(args))),
    )
    return split_gradients(results, size, groups, at, states, needs)


def split_gradients(results, size: int, groups: int, at: int, states: int, needs: tuple[bool, bool, bool]):
    """Give the gradients of x, hx and weights back their mapped dimension; what was not needed has none."""
    need_x, need_hx, need_weights = needs
    x, hx, weights = results[0], results[1 : 1 + states], results[1 + states :]
    if need_weights and groups > 1:
        weights = tuple(w.unflatten(0, (groups, size)) for w in weights)
    elif need_weights and size == 1:
        weights = tuple(w[None] for w in weights)
    outputs = (
        unfold(x, size, at) if need_x else x,
        *(unfold(h, size, 1) if need_hx else h for h in hx),
        *weights,
    )
    dims = (
        at + 1 if need_x else None,
        *(2 if need_hx else None for _ in hx),
        *(int(groups > 1) if need_weights else None for _ in weights),
    )
    return outputs, dims


def map_ensemble_backward(
    apply, constants: Backward, size: int, args: Sequence, dims: Sequence, states: int, saved: int
):
    """Map the backward of a layer with weights of their own for each member, as one layer."""
    _, reverse, (need_x, need_hx, need_weights), groups = constants
    end = len(args) - 3 * states - saved
    batch_sizes, resets, x = args[:3]
    at = x.dim() - (dims[2] is not None) - 1
    ats = (at,) * (2 * states + saved) + (0,) * states  # of states, saved, dstates, dfinals
    results = apply(
        (*reverse,) * size,
        groups,
        batch_sizes,
        resets,
        x if dims[2] is None and not need_x else join(x, dims[2], size, at),
        *(join(a, d, size, 0) for a, d in zip(args[3 : 3 + states], dims[3 : 3 + states], strict=True)),
        *join_weights(args[3 + states : end], dims[3 + states : end], size),
        *(join(a, d, size, n) for a, d, n in zip(args[end:], dims[end:], ats, strict=True)),
    )
    count = end - 3 - states
    weights = results[1 + states :]
    stacked = tuple(torch.stack(weights[n::count]) if need_weights else weights[n] for n in range(count))
    ats = (at if need_x else None, *(0 if need_hx else None,) * states)
    parts = (part(r, a, size) for r, a in zip(results[: 1 + states], ats, strict=True))
    return (*parts, *stacked), (*ats, *(0 if need_weights else None,) * count)
