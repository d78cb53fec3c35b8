"""One layer of known sizes, forward and backward, laid out beforehand but for the tensors' addresses.

It is what `cpu_jobs` does for any call, for training with sizes that stay (`rnnfast.quick_training`).
"""

import math
from collections.abc import Callable, Collection, Sequence
from functools import partial
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
from rnnfast.backends.cpu_jobs import DTYPE_NAMES, WIDER, room
from rnnfast.backends.cpu_stack import Sizes, shape

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
        addresses = [*map(Tensor.data_ptr, tensors), *map(Tensor.data_ptr, results), *self.fixed]
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
        self.biased = "b_ih" in sizes.fields
        self.weights = tuple(f"{name}{d}" for d in range(sizes.directions) for name in sizes.fields)
        self.states = ("h", "extra")[: len(sizes.finals)]
        self.initial = () if sizes.zero else self.named("{}_first")
        widths = {
            "extra": sizes.hidden * (len(self.states) - 1),
            "gates": sizes.hidden * CELLS[sizes.cell].saved,
            "full": sizes.hidden * ("w_hr" in sizes.fields),
        }
        self.kept = tuple(name for name, width in widths.items() if width)
        lead = (*sizes.x_shape[:2], sizes.directions)
        self.forward_pass = self.prepare(
            partial(plan_forward.forward, self.shape, self.biased, self.kept),
            ("x", *self.initial, *self.weights),
            {"h": (*lead[:2], sizes.directions * sizes.width)}
            | {name: (*lead, widths[name]) for name in self.kept}
            | dict(zip(self.named("{}_final"), sizes.finals, strict=True)),
            wide=("gates",),
        )
        self.backward_passes: dict[tuple, Pass] = {}

    def named(self, form: str) -> tuple[str, ...]:
        """Return a name for each state."""
        return tuple(form.format(state) for state in self.states)

    def prepare(
        self,
        plan: Callable[..., Recipe],
        tensors: Sequence[str],
        results: dict[str, Sequence[int]],
        wide: Collection[str],
    ) -> Pass:
        """Prepare a pass over tensors of these names. wide: names of the results that are of the wider dtype."""
        zero = () if self.initial else self.named("{}_first")
        recipe = plan(names=(*tensors, *results, *zero))
        dtype, item = WIDER.get(self.sizes.dtype), self.sizes.dtype.itemsize
        fixed = [zeros(math.prod(size) * item) for _, size in zip(zero, self.sizes.finals, strict=False)]
        fixed += [0] * (len(recipe.named) - len(tensors) - len(results) - len(zero))
        return Pass(
            recipe,
            [(size, dtype if name in wide else None) for name, size in results.items()],
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
        results: list[Tensor | None] = [*known.run(self.kernel, (*saved, *incoming))]
        if self.sizes.dtype in WIDER:
            results = [each if each is None else each.to(self.sizes.dtype) for each in results]
        if not needs.x:
            results.insert(0, None)
        if not needs.hx:
            results[1:1] = (None,) * len(self.initial)
        return results if needs.weights else [*results, *(None,) * len(self.weights)]

    def prepare_backward(self, given: Sequence[int], needs: Needs, threads: int) -> Pass:
        """Prepare the backward pass for gradients of results number `given`, 0 being the output."""
        sizes = self.sizes
        incoming = tuple(("dh", *self.named("d{}_final"))[n] for n in given)
        of_weights = [f"d{name}" for name in self.weights]
        results: dict[str, Sequence[int]] = {}
        if needs.x:
            results["dx"] = sizes.x_shape
        if needs.hx:
            results |= zip(self.named("d{}_first"), sizes.finals, strict=True)
        if needs.weights:
            results |= zip(of_weights, sizes.weights, strict=True)
        planned = shape(sizes._replace(threads=threads))
        return self.prepare(
            partial(plan_backward.backward, planned, self.kept, incoming, *needs, 1, self.biased),
            ("x", *self.initial, *self.weights, "h", *self.kept, *incoming),
            results,
            wide=("dx", *of_weights),
        )
