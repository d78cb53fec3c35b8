"""What torch does around a call: transforms, modes and tracers, and who may take derivatives of what is computed."""

from collections.abc import Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext

import torch
from torch import Tensor

from rnnfast import _torch

PLAIN = frozenset((Tensor, torch.nn.Parameter))


def is_free(tensors: Sequence[Tensor | None]) -> bool:
    """Say whether no transform, mode or tracer stands before these."""
    return PLAIN.issuperset(map(type, tensors)) and is_undisturbed()


def is_undisturbed() -> bool:
    """Say whether no transform, mode or tracer is at work."""
    return (
        _torch.count_dispatch_modes() == 0
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


def is_plain(tensors: Sequence[Tensor], known: Sequence[Tensor] = ()) -> bool:
    """Say whether nothing would happen to these in torch's dispatcher; small calls do well without its microseconds.

    known: further tensors, of which it is known that their memory holds what they mean.
    """
    return is_free((*tensors, *known) if known else tensors) and are_as_stored(tensors) and not _torch.is_profiled()


def is_concrete(tensors: Sequence[Tensor | None]) -> bool:
    """Say whether these hold numbers that no transform, mode or tracer stands before."""
    return is_free(tensors) and are_as_stored(tensors)  # type: ignore[arg-type]


def is_differentiated(tensors: Sequence[Tensor | None]) -> bool:
    """Say whether a derivative may be taken through a call: backwards, or forwards inside `dual_level` and `jvp`."""
    if torch.is_grad_enabled():
        if any(t is not None and t.requires_grad for t in tensors):
            return True
        if _torch.innermost_transform() is not None and any(map(requires_grad_below, tensors)):
            return True
    return _torch.in_dual_level()


def requires_grad_below(tensor: Tensor | None) -> bool:
    """Say whether a tensor wants a gradient outside of the transforms that wrap it; a mapped tensor does not tell."""
    while tensor is not None and _torch.is_wrapper(tensor):
        tensor = _torch.get_unwrapped(tensor)
        if tensor.requires_grad:
            return True
    return False


def is_tracked(args: Sequence) -> bool:
    """Say whether a derivative may be taken of what is computed from these, backwards or forwards, at any level.

    Derivatives of gradients in groups are not known: `second_order` sums the weights' over the whole batch.
    """
    if _torch.in_dual_level():
        return True
    tensors = [a for a in args if isinstance(a, Tensor)]
    if torch.is_grad_enabled() and any(t.requires_grad for t in tensors):
        return True
    return _torch.innermost_transform() is not None and any(map(requires_grad_below, tensors))


def no_more_derivatives(tensors: Sequence[Tensor | None]) -> bool:
    """Say whether nobody can differentiate or trace what is now computed from these, so that it may be opaque."""
    if torch.compiler.is_dynamo_compiling():
        return False
    present = [t for t in tensors if t is not None]
    if torch.is_grad_enabled() and any(t.requires_grad for t in present):
        return False
    pushing = _torch.in_dual_level() and _torch.forward_grad_enabled()
    return is_concrete(present) and not pushing


def create_graph() -> bool:
    """Say whether what a backward pass computes may be differentiated again."""
    return torch.is_grad_enabled() or _torch.in_dual_level()


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
