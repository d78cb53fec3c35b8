"""What was saved for backward, where it was changed in place before backward came.

A layer's output is saved, and the caller's too: `out += 1` is allowed with torch's layers. Torch raises when such a
tensor is unpacked. What can be recomputed is recomputed; without changes this costs nothing.
"""

from collections.abc import Callable, Sequence
from operator import attrgetter

from torch import Tensor

version_of = attrgetter("_version")


def versions(tensors: Sequence[Tensor]) -> list[int] | None:
    """Return how often each tensor was changed in place; None where one does not count that."""
    try:
        return [*map(version_of, tensors)]
    except RuntimeError:  # what tensors made in inference mode answer; torch refuses to save them
        return None


def unpack(ctx, known: Sequence[int] | None, repair: Callable[[list, list[int]], list | None]) -> Sequence:
    """Return the tensors that a Function saved.

    known: the versions that the first of them had then; the others were new. repair: takes the tensors and the numbers
    of those that were changed, and returns what they were as far as that is of use, or None where that is lost: then
    torch's error is raised.
    """
    try:
        return ctx.saved_tensors
    except RuntimeError:
        raw = getattr(ctx, "_raw_saved_tensors", None)  # raises if they are freed
        if known is None or not raw or not hasattr(raw[0], "data"):  # torch 2.6 does not show them
            raise
        tensors = [each.data for each in raw]
        # What comes behind those that are known was new then.
        before = [*known, *(0 for _ in tensors[len(known) :])]
        changed = [n for n, t in enumerate(tensors) if version_of(t) != before[n]]
        repaired = repair(tensors, changed) if changed else None
        if repaired is None:
            raise
        return repaired
