"""One layer of known sizes, forward and backward, laid out beforehand but for the tensors' addresses.

It is what `cpu_jobs` does for any call, for training with sizes that stay (`rnnfast.quick_training`).
"""

import math
from collections.abc import Callable, Sequence
from functools import partial
from itertools import accumulate
from typing import NamedTuple

import torch
from rnnfast_kernels.cells import CELLS
from rnnfast_kernels.cpu import plan_backward, plan_forward
from rnnfast_kernels.cpu.compiled import Kernel, kernel
from rnnfast_kernels.cpu.pages import WORTH_IT
from rnnfast_kernels.cpu.plan import zeros
from rnnfast_kernels.cpu.recipe import Recipe
from torch import Tensor

from rnnfast.backends import Needs
from rnnfast.backends.cpu_jobs import DTYPE_NAMES, room
from rnnfast.backends.cpu_stack import Sizes, shape

Tensors = Sequence[Tensor]
Shapes = Sequence[tuple[int, ...]]


class Pass(NamedTuple):
    """A recipe and all of its addresses that are not those of tensors.

    results: shapes of the tensors that it fills. scratch: elements of scratch memory. dropped: offsets, in that memory, of
    results that nobody wants. fixed: addresses that are always the same. large: whether large pages are worth asking for.
    """

    recipe: Recipe
    results: Shapes
    scratch: int
    dropped: Sequence[int]
    fixed: Sequence[int]
    large: bool

    def run(self, kernel: Kernel, tensors: Tensors) -> list[Tensor]:
        """Run over these tensors and return the results."""
        new = partial(room, tensors[0]) if self.large else tensors[0].new_empty
        results = [new(*size) for size in self.results]
        scratch = new(self.scratch)
        place = scratch.data_ptr()
        addresses = [*map(Tensor.data_ptr, (*tensors, *results)), *[place + offset for offset in self.dropped]]
        self.recipe.call(kernel, place, addresses + self.fixed)
        return results


class PreparedLayer:
    """A layer of known sizes, of which `Sizes` describes one. Tensors are contiguous, but for x.

    x is [T, B, I]. There is one initial state [D, B, P or H] for each state of the cell, or none if they are zero.
    Weights are flat, direction by direction.
    """

    def __init__(self, sizes: Sizes):
        cell = CELLS[sizes.cell]
        self.sizes, self.shape = sizes, shape(sizes)
        self.kernel = kernel(sizes.cell, DTYPE_NAMES[sizes.dtype])
        self.biased = "b_ih" in sizes.fields
        self.states = ("h", "extra")[: len(cell.states)]
        self.initial = () if sizes.zero else self.named("{}_first")
        self.weights = tuple(f"{name}{d}" for d in range(sizes.directions) for name in sizes.fields)
        widths = {"extra": sizes.hidden * (len(self.states) - 1), "gates": sizes.hidden * cell.saved}
        widths["full"] = sizes.hidden * ("w_hr" in sizes.fields)
        self.kept = tuple(name for name, width in widths.items() if width)
        lead = sizes.x_shape[:2]
        output = (*lead, sizes.directions * sizes.width)
        kept = [(*lead, sizes.directions, widths[name]) for name in self.kept]
        self.forward_pass = self.prepare(
            plan_forward.forward,
            (self.shape, self.biased, self.kept),
            ("x", *self.initial, *self.weights),
            ("h", *self.kept, *self.named("{}_final")),
            (output, *kept, *sizes.finals),
        )
        self.backward_passes: dict[tuple, Pass] = {}

    def named(self, form: str) -> tuple[str, ...]:
        """Return a name for each state."""
        return tuple(form.format(state) for state in self.states)

    def prepare(
        self, plan: Callable[..., Recipe], args: tuple, tensors: Sequence[str], results: Sequence[str], shapes: Shapes
    ) -> Pass:
        """Prepare a pass over tensors and results of these names."""
        unwanted = [name for name in self.named("d{}_first") if plan is plan_backward.backward and name not in results]
        zero = [] if self.initial else self.named("{}_first")
        recipe = plan(*args, names=(*tensors, *results, *unwanted, *zero))
        sizes = [math.prod(size) * self.shape.item for size in self.sizes.finals]
        *dropped, scratch = accumulate(sizes[: len(unwanted)], initial=recipe.scratch)
        fixed = [zeros(size) for size in sizes[: len(zero)]]
        absent = len(recipe.named) - len(tensors) - len(results) - len(unwanted) - len(zero)
        large = max(scratch, *(math.prod(size) * self.shape.item for size in shapes)) >= WORTH_IT
        return Pass(recipe, tuple(shapes), -(-scratch // self.shape.item), dropped, fixed + [0] * absent, large)

    def forward(self, x: Tensor, *tensors: Tensor) -> tuple[Tensor, list[Tensor], list[Tensor]]:
        """Return the output [T, B, D*P], the final states, and what else backward wants."""
        results = self.forward_pass.run(self.kernel, (x, *tensors))
        count = 1 + len(self.kept)
        return results[0], results[count:], results[1:count]

    def fits(self, saved: Tensors) -> bool:
        """Say whether tensors for `backward` are laid out as `forward` had them."""
        return saved[0].stride() == self.sizes.x_strides and all(map(Tensor.is_contiguous, saved[1:]))

    def backward(self, saved: Tensors, grads: Sequence[Tensor | None], needs: Needs) -> list[Tensor | None]:
        """Return gradients of x, the initial states and the weights, None where not needed.

        saved: x, the initial states, the weights, the output, and what `forward` kept. grads: of the output and the
        final states.
        """
        given = tuple([n for n, grad in enumerate(grads) if grad is not None])
        key = (given, needs, torch.get_num_threads())
        known = self.backward_passes.get(key)
        if known is None:
            known = self.backward_passes[key] = self.prepare_backward(*key)
        incoming = [grad.contiguous() for grad in grads if grad is not None]
        results = known.run(self.kernel, (*saved, *incoming))
        if not needs.x:
            results.insert(0, None)
        if not needs.hx:
            results[1:1] = (None,) * len(self.initial)
        return results if needs.weights else [*results, *(None,) * len(self.weights)]

    def prepare_backward(self, given: Sequence[int], needs: Needs, threads: int) -> Pass:
        """Prepare the backward pass for gradients of results number `given`, 0 being the output."""
        sizes = self.sizes
        incoming = tuple(("dh", *self.named("d{}_final"))[n] for n in given)
        wanted = (
            (needs.x, ["dx"], [sizes.x_shape]),
            (needs.hx, self.named("d{}_first"), sizes.finals),
            (needs.weights, [f"d{name}" for name in self.weights], sizes.weights),
        )
        return self.prepare(
            plan_backward.backward,
            (shape(sizes._replace(threads=threads)), self.kept, incoming, needs.x, needs.weights, 1, self.biased),
            ("x", *self.initial, *self.weights, "h", *self.kept, *incoming),
            [name for want, names, _ in wanted if want for name in names],
            [size for want, _, shapes in wanted if want for size in shapes],
        )
