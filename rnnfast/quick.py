"""Small calls made quick: what a call of known sizes needs, kept from the one before.

A layer of few steps is over before Python has laid it out. On plain CPU tensors and for a contiguous layout, a call is
therefore known by its options and sizes, its `Kind`: the second of a kind is laid out once for all, and those after it
give addresses alone. Checks of arguments are not repeated: they depend on nothing but the kind. Outside of autograd a
call is prepared whole (`rnnfast.backends.cpu_stack`), under it layer by layer (`rnnfast.quick_training`).
"""

from collections.abc import Callable, Sequence
from operator import attrgetter
from typing import Any, NamedTuple

import torch
from rnnfast_kernels.cells import CELLS
from rnnfast_kernels.cpu import pool
from torch import Tensor

from rnnfast import _torch, autograd, native, quick_training
from rnnfast.backends import measured
from rnnfast.backends.choice import backend_of, load, setting

# Kinds that ran once, and calls of kinds that ran at least twice; both are forgotten when there are too many.
MOST = 512
once: set["Kind"] = set()
ready: dict["Kind | None", Callable] = {}

facts, requires_grad = attrgetter("shape", "dtype", "is_cpu"), attrgetter("requires_grad")
is_neg, new = Tensor.is_neg, tuple.__new__


class Kind(NamedTuple):
    """All that a call depends on, but for values and addresses.

    facts: of the input, the `given` initial states and the weights. asked: the setting of the backend.
    """

    options: Any  # rnnfast.functional.Options
    differentiated: bool
    threads: int
    strides: tuple[int, ...]
    given: int
    facts: tuple[tuple[torch.Size, torch.dtype, bool], ...]
    asked: str

    @property
    def shape(self) -> torch.Size:
        """Return the shape of the input."""
        return self.facts[0][0]

    @property
    def dtype(self) -> torch.dtype:
        """Return the dtype of the input, and, for a call that went well, of all others."""
        return self.facts[0][1]

    @property
    def weights(self) -> tuple[torch.Size, ...]:
        """Return the shapes of the weights."""
        return tuple(shape for shape, *_ in self.facts[1 + self.given :])


def states_of(options, hx) -> tuple[Tensor, ...] | None:
    """Return given initial states as a tuple, or None where they do not have the form that the cell takes."""
    if len(CELLS[options.cell].states) == 1:
        return (hx,) if isinstance(hx, Tensor) else None
    return tuple(hx) if isinstance(hx, tuple | list) else None


def kind_of(options, x: Tensor, states: Sequence[Tensor], weights: Sequence[Tensor]) -> Kind | None:
    """Return the kind of a call, or None if it is not one that can be made quick.

    That memory holds what tensors mean is checked here for views that negate what they show; what is prepared refuses
    tensors that have no memory.
    """
    tensors = (x, *states, *weights)
    if (
        not autograd.is_free(tensors)
        or True in map(is_neg, tensors)
        or _torch.is_profiled()
        or not x.is_cpu
        or (states and len(states) != len(CELLS[options.cell].states))
        or _torch.is_any_autocast_enabled()
        or _torch.in_dual_level()
        or (asked := setting()) not in ("auto", "numba")
        or not are_contiguous(tensors[1:])
    ):
        return None
    differentiated = torch.is_grad_enabled() and True in map(requires_grad, tensors)
    if not (quick_training.can_prepare if differentiated else can_prepare)(options, x):
        return None
    threads = torch.get_num_threads()
    if threads > pool.known_cores:  # what `usable` asks too, without a call
        threads = pool.usable(threads)
    return new(Kind, (options, differentiated, threads, x.stride(), len(states), tuple(map(facts, tensors)), asked))


def are_contiguous(tensors: Sequence[Tensor]) -> bool:
    """Say whether tensors are dense and contiguous."""
    try:
        return False not in map(Tensor.is_contiguous, tensors)
    except RuntimeError:  # what compressed sparse tensors answer
        return False


def can_prepare(options, x: Tensor) -> bool:
    """Say whether a call through which no derivative is taken can be made quick: nothing happens between its layers."""
    return options.dropout == 0 or not options.training


def remember(kind: Kind) -> bool:
    """Note that a call of a kind went well, prepare the kind if it is the second; return whether the kernels ran it."""
    sizes = measured.sizes_of_kind(kind)
    backend = backend_of(kind.options.cell, torch.device("cpu"), kind.dtype, False, sizes)
    if backend == "numba" or is_left_to_torch(kind, sizes):
        if kind not in once:
            if len(once) >= MOST:
                once.clear()
            once.add(kind)
        elif kind.strides[-1] == 1 and 0 not in (*kind.shape, *kind.weights[1]):
            if len(ready) >= MOST:
                ready.clear()
            ready[kind] = prepare(kind) if backend == "numba" else native.prepare(kind)
    return backend == "numba"


def is_left_to_torch(kind: Kind, sizes: measured.Sizes | None) -> bool:
    """Say whether torch runs a kind because it was measured faster, on input that its operator takes as it is."""
    auto = kind.asked == "auto" and len(kind.shape) == 3
    return auto and sizes is not None and measured.slower(kind.options.cell, sizes) is not None


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
        zero=kind.given == 0,
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
        """Return the output and the final states, as a module does, or None where a tensor has no memory."""
        output = x.new_empty(*self.output)
        finals = tuple([x.new_empty(*shape) for shape in self.finals])
        if not self.stack.run(x, output, finals, states, weights):
            return None
        return output.transpose(0, 1) if self.batch_first else output, finals if len(finals) > 1 else finals[0]
