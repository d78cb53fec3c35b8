"""Layers on top of one another as one call of machine code, laid out beforehand but for the tensors' addresses.

`Stack` is for inference with sizes that stay: small calls (`rnnfast.quick`) and single steps (`rnnfast.Stream`).
"""

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from rnnfast_kernels.cells import CELLS
from rnnfast_kernels.cpu import plan, plan_forward
from rnnfast_kernels.cpu.compiled import kernel
from rnnfast_kernels.cpu.pages import WORTH_IT
from rnnfast_kernels.cpu.pool import NO_TEAM
from torch import Tensor

from rnnfast.backends.cpu_jobs import DTYPE_NAMES, room, shape_of

Tensors = Sequence[Tensor]


class Sizes(NamedTuple):
    """What a stack depends on.

    x_shape: [T, B, I]; x_strides: its strides in elements, of which the last is 1. weights: shapes of the flat weights.
    zero: whether the initial states are zero, and not given. repeated: whether it runs again and again with the same
    weights.
    """

    cell: str
    dtype: torch.dtype
    x_shape: tuple[int, int, int]
    x_strides: tuple[int, int, int]
    layers: int
    directions: int
    weights: Sequence[Sequence[int]]
    zero: bool
    threads: int
    repeated: bool = False

    @property
    def width(self) -> int:
        """Return P."""
        return self.weights[1][1]

    @property
    def hidden(self) -> int:
        """Return H."""
        return self.weights[1][0] // CELLS[self.cell].gates

    @property
    def fields(self) -> tuple[str, ...]:
        """Return the names of a direction's weights."""
        count = len(self.weights) // (self.layers * self.directions)
        return plan.WEIGHTS[: 4 if count >= 4 else 2] + plan.WEIGHTS[4:] * (count % 2)

    @property
    def finals(self) -> list[tuple[int, int, int]]:
        """Return the shapes of the final states."""
        count = len(CELLS[self.cell].states)
        return [(self.layers * self.directions, self.x_shape[1], size) for size in (self.width, self.hidden)[:count]]

    def each(self) -> Iterator["Sizes"]:
        """Yield the sizes of each layer by itself."""
        count = len(self.weights) // self.layers
        (steps, batch, _), columns = self.x_shape, self.directions * self.width
        x_shape, x_strides = self.x_shape, self.x_strides
        for n in range(self.layers):
            weights = self.weights[n * count : (n + 1) * count]
            yield self._replace(x_shape=x_shape, x_strides=x_strides, layers=1, weights=weights)
            x_shape, x_strides = (steps, batch, columns), (batch * columns, columns, 1)


def addresses_of(tensors: Tensors) -> list[int]:
    """Return where the memory of tensors begins; 0 among them says that one has none.

    Zeros that torch made without memory are such, and wrappers of torch.func that have outlived their transform.
    """
    try:
        return [*map(Tensor.data_ptr, tensors)]
    except RuntimeError:  # what such a wrapper answers
        return [0]


class Stack:
    """A call of known sizes. Tensors are contiguous, but for x.

    finals and initial are [layers*D, B, P or H] tensors, one per state; weights are flat, as in `torch.nn.LSTM`.
    """

    def __init__(self, sizes: Sizes):
        weights = [
            plan_forward.layer_name(name, d, n)
            for n in range(sizes.layers)
            for d in range(sizes.directions)
            for name in sizes.fields
        ]
        states = ("h", "extra")[: len(sizes.finals)]
        names = ["x", "h", *(f"{state}_final" for state in states)]
        if not sizes.zero:
            names += [f"{state}_first" for state in states]
        shapes = tuple(map(shape, sizes.each()))
        self.recipe = plan_forward.stack(shapes, (*names, *weights), "b_ih" in sizes.fields, sizes.zero)
        self.scratch = -(-self.recipe.scratch // sizes.dtype.itemsize)
        self.large = self.recipe.scratch >= WORTH_IT
        self.kernel = kernel(sizes.cell, DTYPE_NAMES[sizes.dtype])

    def run(self, x: Tensor, output: Tensor, finals: Tensors, initial: Tensors, weights: Tensors) -> bool:
        """Run over these tensors; or do nothing and return False if one has no memory (`addresses_of`)."""
        addresses = addresses_of((x, output, *finals, *initial, *weights))
        if 0 in addresses:
            return False
        scratch = room(x, self.scratch) if self.large else x.new_empty(self.scratch)
        self.recipe.call(self.kernel, scratch.data_ptr(), addresses)
        return True

    def stepper(
        self, x: Tensor, output: Tensor, finals: Tensors, initial: Tensors, weights: Tensors
    ) -> Callable[[], None]:
        """Return a function that runs over these tensors again and again, with the weights packed once."""
        tensors = (x, output, *finals, *initial, *weights)
        scratch = x.new_empty(self.recipe.scratch, dtype=torch.uint8)
        addresses = [each.data_ptr() for each in tensors]
        records = self.recipe.start(self.kernel, scratch.data_ptr(), addresses, NO_TEAM)
        self.kernel.run(records + self.recipe.preparation.place.offset)

        def step(run=self.kernel.run, program=records + self.recipe.repeated.place.offset, _kept=(scratch, tensors)):
            run(program)

        return step


def shape(sizes: Sizes) -> plan.Shape:
    """The plan's shape of a layer."""
    return shape_of(
        sizes.cell,
        sizes.dtype,
        torch.Size(sizes.x_shape),
        sizes.x_strides,
        1,
        torch.Size((sizes.directions, sizes.x_shape[1], sizes.width)),
        sizes.weights[1][0],
        (False, True)[: sizes.directions],
        projected="w_hr" in sizes.fields,
        plain=True,
        packed_steps=None,
        threads=sizes.threads,
        cuts=None,
        repeated=sizes.repeated,
    )
