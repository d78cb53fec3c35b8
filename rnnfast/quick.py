"""Small calls made quick: what a call of known sizes needs, kept from the one before.

A layer of few steps is over before Python has laid it out. On plain CPU tensors and for a contiguous layout, a call is
therefore known by its options and sizes, its `Kind`: the second of a kind is laid out once for all, and those after it
give addresses alone. Checks of arguments are not repeated: they depend on nothing but the kind. Outside of autograd a
call is prepared whole (`rnnfast.backends.cpu_stack`), under it layer by layer (`rnnfast.quick_training`).
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from rnnfast_kernels.cells import CELLS
from torch import Tensor

from rnnfast import autograd, quick_training
from rnnfast.backends.choice import load, setting

# Kinds that ran once, and calls of kinds that ran at least twice; both are forgotten when there are too many.
MOST = 512
once: set["Kind"] = set()
ready: dict["Kind", Callable] = {}


class Kind(NamedTuple):
    """All that a call depends on, but for values and addresses."""

    options: Any  # rnnfast.functional.Options
    differentiated: bool
    threads: int
    dtype: torch.dtype
    shape: torch.Size
    strides: tuple[int, ...]
    states: tuple[torch.Size, ...]
    weights: tuple[torch.Size, ...]


def kind_of(options, x: Tensor, states: Sequence[Tensor], weights: Sequence[Tensor]) -> Kind | None:
    """Return the kind of a call, or None if it is not one that can be made quick."""
    tensors = (x, *states, *weights)
    differentiated = autograd.is_differentiated(tensors)
    if (
        len(states) not in (0, len(CELLS[options.cell].states))
        or not autograd.is_plain(tensors)
        or torch._C._is_any_autocast_enabled()
        or not (quick_training.can_prepare(options, x) if differentiated else options.dropout == 0 or not options.training)
        or setting() not in ("auto", "numba")
    ):
        return None
    dtype = x.dtype
    if not x.is_cpu:
        return None
    for each in tensors[1:]:
        if each.dtype is not dtype or not each.is_cpu or not each.is_contiguous():
            return None
    shapes = [each.shape for each in tensors]
    count = 1 + len(states)
    states, weights = tuple(shapes[1:count]), tuple(shapes[count:])
    return Kind(options, differentiated, torch.get_num_threads(), dtype, shapes[0], x.stride(), states, weights)


def remember(kind: Kind) -> None:
    """Note that a call of a kind went well, and prepare the kind if it is the second."""
    if kind not in once:
        if len(once) >= MOST:
            once.clear()
        once.add(kind)
    elif kind.strides[-1] == 1 and 0 not in kind.shape:
        if len(ready) >= MOST:
            ready.clear()
        ready[kind] = prepare(kind)


def prepare(kind: Kind) -> Callable:
    """Prepare a kind: a function of the input, the initial states and the weights."""
    sizes = sizes_of(kind)
    if not kind.differentiated:
        return Inference(kind, sizes)
    return quick_training.Training(kind.options, [load("numba").PreparedLayer(each) for each in sizes.each()])


def sizes_of(kind: Kind):
    """Describe a kind to the backend, time-major."""
    options = kind.options
    if len(kind.shape) == 2:
        (steps, inputs), (step, _) = kind.shape, kind.strides
        batch, row = 1, inputs
    elif options.batch_first:
        (batch, steps, inputs), (row, step, _) = kind.shape, kind.strides
    else:
        (steps, batch, inputs), (step, row, _) = kind.shape, kind.strides
    return load("numba").Sizes(
        options.cell,
        kind.dtype,
        (steps, batch, inputs),
        (step, row, 1),
        options.num_layers,
        options.directions,
        kind.weights,
        zero=not kind.states,
        threads=kind.threads,
    )


class Inference:
    """A call of one kind through which no derivative is taken."""

    def __init__(self, kind: Kind, sizes):
        batched = len(kind.shape) == 3
        self.batch_first = kind.options.batch_first and batched
        self.stack = load("numba").Stack(sizes)
        steps, batch, _ = sizes.x_shape
        columns = sizes.directions * sizes.width
        self.output = (steps, batch, columns) if batched else (steps, columns)
        self.finals = [shape if batched else (shape[0], shape[2]) for shape in sizes.finals]

    def __call__(self, x: Tensor, states: Sequence[Tensor], weights: Sequence[Tensor]):
        """Return the output and the final states, as a module does."""
        output = x.new_empty(self.output)
        finals = tuple([x.new_empty(shape) for shape in self.finals])
        self.stack.run(x, output, finals, states, weights)
        return output.transpose(0, 1) if self.batch_first else output, finals if len(finals) > 1 else finals[0]
