"""One layer of known sizes, forward and backward, laid out beforehand but for the tensors' addresses.

It is what `cpu_jobs` does for any call, for training with sizes that stay (`rnnfast.quick_training`).
"""

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import partial
from itertools import compress
from typing import NamedTuple

import torch
from rnnfast_kernels.cells import CELLS
from rnnfast_kernels.cpu import plan_backward, plan_forward, pool
from rnnfast_kernels.cpu.compiled import Kernel, kernel
from rnnfast_kernels.cpu.pages import WORTH_IT
from rnnfast_kernels.cpu.plan import zeros
from rnnfast_kernels.cpu.recipe import Recipe
from torch import Tensor

from rnnfast.backends import Needs, NoMemoryError
from rnnfast.backends.cpu_jobs import DTYPE_NAMES, WIDER, room
from rnnfast.backends.cpu_stack import Sizes, addresses_of, shape

Tensors = Sequence[Tensor]


class Pass(NamedTuple):
    """A recipe over tensors and results.

    results: shapes, and dtypes where they are not the layer's. scratch: elements of scratch memory. fixed: addresses
    that are always the same. large: whether large pages are worth asking for.
    """

    recipe: Recipe
    results: Sequence[tuple[Sequence[int], torch.dtype | None]]
    scratch: int
    fixed: list[int]
    large: bool

    def run(self, kernel: Kernel, tensors: Tensors) -> list[Tensor]:
        """Run over these tensors and return the results."""
        new = partial(room, tensors[0]) if self.large else tensors[0].new_empty
        results = [new(*size) if dtype is None else new(*size, dtype=dtype) for size, dtype in self.results]
        scratch = new(self.scratch)
        addresses = addresses_of(tensors)
        if 0 in addresses:
            raise NoMemoryError("rnnfast: a tensor has no memory: its storage has size 0")
        addresses += map(Tensor.data_ptr, results)
        addresses += self.fixed
        self.recipe.call(kernel, scratch.data_ptr(), addresses)
        return results


class PreparedLayer:
    """A layer of known sizes, of which `Sizes` describes one. Tensors are contiguous, but for x.

    x is [T, B, I]. There is one initial state [D, B, P or H] for each state of the cell, or none if they are zero.
    Weights are flat, direction by direction.
    """

    def __init__(self, sizes: Sizes):
        self.sizes, self.shape = sizes, shape(sizes)
        self.kernel = kernel(sizes.cell, DTYPE_NAMES[sizes.dtype])
        self.wider = WIDER.get(sizes.dtype)
        self.biased = "b_ih" in sizes.fields
        self.weights = tuple(f"{name}{d}" for d in range(sizes.directions) for name in sizes.fields)
        self.states = ("h", "extra")[: len(sizes.finals)]
        self.initial = () if sizes.zero else self.named("{}_first")
        widths = {
            "extra": sizes.hidden * (len(self.states) - 1),
            "gates": sizes.hidden * CELLS[sizes.cell].kept,
            "unprojected": sizes.hidden * ("w_hr" in sizes.fields),
        }
        self.kept = tuple(name for name, width in widths.items() if width)
        self.saved = ("x", *self.initial, *self.weights, "h", *self.kept)
        lead = (*sizes.x_shape[:2], sizes.directions)
        self.forward_pass = self.prepare(
            partial(plan_forward.forward, self.shape, self.biased, self.kept),
            ("x", *self.initial, *self.weights),
            {"h": (*lead[:2], sizes.directions * sizes.width)}
            | {name: (*lead, widths[name]) for name in self.kept}
            | dict(zip(self.named("{}_final"), sizes.finals, strict=True)),
            wide=("gates",),
        )
        self.backward_passes: dict[tuple, tuple[Pass, tuple[int, ...]]] = {}

    def named(self, form: str) -> tuple[str, ...]:
        """Return a name for each state."""
        return tuple(form.format(state) for state in self.states)

    def prepare(
        self,
        plan: Callable[..., Recipe],
        tensors: Sequence[str],
        results: Mapping[str, Sequence[int]],
        wide: Collection[str],
    ) -> Pass:
        """Prepare a pass over tensors of these names. wide: names of the results that are of the wider dtype."""
        zero = () if self.initial else self.named("{}_first")
        recipe = plan(names=(*tensors, *results, *zero))
        item = self.sizes.dtype.itemsize
        fixed = [zeros(math.prod(size) * item) for _, size in zip(zero, self.sizes.finals, strict=False)]
        fixed += [0] * (len(recipe.named) - len(tensors) - len(results) - len(zero))
        return Pass(
            recipe,
            [(tuple(size), self.wider if name in wide else None) for name, size in results.items()],
            -(-recipe.scratch // item),
            fixed,
            max(recipe.scratch, *(math.prod(size) * item for size in results.values())) >= WORTH_IT,
        )

    def forward(self, x: Tensor, *tensors: Tensor) -> tuple[Tensor, list[Tensor], list[Tensor]]:
        """Return the output [T, B, D*P], the final states, and what else backward wants."""
        results = self.forward_pass.run(self.kernel, (x, *tensors))
        count = 1 + len(self.kept)
        return results[0], results[count:], results[1:count]

    def fits(self, saved: Tensors) -> bool:
        """Say whether tensors for `backward` are laid out as `forward` had them."""
        return saved[0].stride() == self.sizes.x_strides and all(map(Tensor.is_contiguous, saved[1:]))

    def backward(self, saved: Tensors, grads: Sequence[Tensor | None], wanted: tuple[bool, ...]) -> list[Tensor | None]:
        """Return gradients of x, the initial states and the weights.

        saved: x, the initial states, the weights, the output, and what `forward` kept. grads: of the output and the
        final states. wanted: for each of x, the initial states and the weights, whether its gradient is; the others are
        None, unless they come with a wanted one.
        """
        key = (wanted, tuple([grad is not None for grad in grads]), pool.usable(torch.get_num_threads()))
        known = self.backward_passes.get(key)
        if known is None:
            known = self.backward_passes[key] = self.prepare_backward(*key)
        backward_pass, absent = known
        incoming = [grad.contiguous() for grad in grads if grad is not None]
        results: list[Tensor | None] = backward_pass.run(self.kernel, (*saved, *incoming))  # type: ignore[assignment]
        if self.wider is not None:
            results = [each if each is None else each.to(self.sizes.dtype) for each in results]
        for place in absent:
            results.insert(place, None)
        return results

    def needs(self, wanted: Sequence[bool]) -> Needs:
        """Say whether the gradient of x, of any initial state, of any weight is wanted."""
        first = 1 + len(self.initial)
        return Needs(wanted[0], any(wanted[1:first]), any(wanted[first:]))

    def prepare_backward(
        self, wanted: tuple[bool, ...], given: tuple[bool, ...], threads: int
    ) -> tuple[Pass, tuple[int, ...]]:
        """Prepare the backward pass, and say which gradients it does not compute."""
        sizes, needs = self.sizes, self.needs(wanted)
        incoming = tuple(compress(("dh", *self.named("d{}_final")), given))
        of_states = self.named("d{}_first") if self.initial else ()
        of_weights = tuple(f"d{name}" for name in self.weights)
        shapes = (sizes.x_shape, *sizes.finals[: len(of_states)], *sizes.weights)
        there = (needs.x, *(needs.hx,) * len(of_states), *(needs.weights,) * len(of_weights))
        found = self.prepare(
            partial(
                plan_backward.backward,
                shape(sizes._replace(threads=threads)),
                self.kept,
                incoming,
                *needs,
                1,
                self.biased,
            ),
            (*self.saved, *incoming),
            dict(compress(zip(("dx", *of_states, *of_weights), shapes, strict=True), there)),
            wide=("dx", *of_weights),
        )
        return found, tuple(n for n, each in enumerate(there) if not each)
