"""Layers with frozen weights as calls of the Numba kernels: packing once, then calls that name one buffer of panels.

A `FrozenStack` says all of a stack but its numbers. Panels of all its layers stand in one uint8 tensor, one layer after
another (see `rnnfast_kernels.cpu.plan.panels`). Their layout depends on the form and the processor, not on the calls.
"""

import functools
from array import array
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from struct import Struct
from typing import NamedTuple

import numpy as np
import torch
from rnnfast_kernels.cpu.plan import forward as plan_forward
from rnnfast_kernels.cpu.plan import panels as plan_panels
from rnnfast_kernels.cpu.plan import shape as plan
from rnnfast_kernels.cpu.plan.recipe import ADDRESSES, Recipe
from rnnfast_kernels.cpu.runtime import pool
from rnnfast_kernels.cpu.runtime.compiled import Kernel, kernel
from rnnfast_kernels.cpu.target import Target, target
from torch import Tensor

from rnnfast.backends.cpu.arguments import addresses_of, apart, as_signal, present, row_cuts, strides_of, together
from rnnfast.backends.cpu.executable import STATES, empty, repeat, shape_of
from rnnfast.spec import Form, Present, Signature, cell_named, parameter_name

# Elements of the scratch memory that a prepared call keeps.
MOST_SPARE = 1 << 18


class FrozenStack(NamedTuple):
    """What a stack of frozen layers is. weights: the format. width: P. inputs: I of the first layer."""

    cell: str
    weights: str
    layers: int
    directions: int
    inputs: int
    hidden: int
    width: int
    projected: bool
    biased: bool

    def each(self) -> Iterator["FrozenStack"]:
        """Yield each layer by itself."""
        inputs = self.inputs
        for _ in range(self.layers):
            yield self._replace(layers=1, inputs=inputs)
            inputs = self.directions * self.width

    @property
    def target(self) -> Target:
        """Return how the processor computes it."""
        return target("float32", self.weights)

    @property
    def state_sizes(self) -> tuple[int, ...]:
        """Return the width of each state."""
        return (self.width, *[self.hidden] * (len(cell_named(self.cell).states) - 1))

    @property
    def stacks(self) -> bool:
        """Say whether all layers run in one program: cells of at most two states, without signals."""
        cell = cell_named(self.cell)
        return len(cell.states) <= 2 and cell.output == 0 and not cell.signals


@functools.lru_cache(maxsize=1024)
def layout(form: FrozenStack) -> plan_panels.Layout:
    """Where the panels of one layer are."""
    return plan_panels.layout(
        form.target, form.cell, form.inputs, form.hidden, form.width, form.projected, form.directions
    )


@functools.lru_cache(maxsize=1024)
def offsets(form: FrozenStack) -> tuple[int, ...]:
    """Where each layer's panels begin, and where the last ones end."""
    found = [0]
    for one in form.each():
        found.append(found[-1] + layout(one).size)
    return tuple(found)


def as_array(tensor: Tensor) -> np.ndarray:
    """Return a tensor as an array that shares its memory; bfloat16 as int16."""
    tensor = tensor.detach().contiguous()
    return (tensor.view(torch.int16) if tensor.dtype == torch.bfloat16 else tensor).numpy()


def widened(array: np.ndarray) -> np.ndarray:
    """Return bfloat16, as int16, in float32, and other arrays as they are."""
    return (array.view(np.uint16).astype(np.uint32) << 16).view(np.float32) if array.dtype == np.int16 else array


def pack(form: FrozenStack, weights: Sequence[dict[str, Tensor]]) -> Tensor:
    """Pack all layers. weights: for each layer and direction w_ih, w_hh, b_ih, b_hh, w_hr, what of them there is.

    Of scaled formats also w_ih_scale, w_hh_scale and w_hr_scale. The cell's own parameters are under `parameter_name`.
    """
    buffer = empty(torch.empty(0, device="cpu"), offsets(form)[-1], dtype=torch.uint8).zero_()
    for n, (one, offset) in enumerate(zip(form.each(), offsets(form), strict=False)):
        for matrix in layout(one).matrices:
            named = weights[n * form.directions + matrix.direction]
            bias, scale = named.get(matrix.name.replace("w_", "b_")), named.get(f"{matrix.name}_scale")
            plan_panels.pack(
                form.target,
                matrix,
                buffer[offset:].numpy(),
                as_array(named[matrix.name]),
                None if bias is None else as_array(bias),
                None if scale is None else as_array(scale),
            )
        for direction, each in enumerate(parameters_of(one, buffer[offset:].numpy())):
            named = weights[n * form.directions + direction]
            for out, name in zip(each, cell_named(form.cell).parameters, strict=True):
                out[:] = as_array(named[parameter_name(name)])
    return buffer


def parameters_of(form: FrozenStack, buffer: np.ndarray) -> list[np.ndarray]:
    """Return where one layer's buffer has the parameters of each direction, [P, H]."""
    count = len(cell_named(form.cell).parameters)
    size = count * form.hidden * plan_panels.PARAMETER_BYTES
    return [
        buffer[offset : offset + size].view(np.float32).reshape(count, form.hidden)
        for offset in layout(form).parameters
    ]


def unpack(form: FrozenStack, buffer: np.ndarray) -> list[dict[str, Tensor]]:
    """Return what `pack` was given."""
    found = []
    for arrays in unpacked(form, buffer):
        named = {name: torch.from_numpy(array) for name, array in arrays.items()}
        found.append(
            {name: each.view(torch.bfloat16) if each.dtype == torch.int16 else each for name, each in named.items()}
        )
    return found


def unpacked(form: FrozenStack, buffer: np.ndarray) -> list[dict[str, np.ndarray]]:
    """Return the same as arrays, bfloat16 as int16."""
    found = []
    for one, offset in zip(form.each(), offsets(form), strict=False):
        named: list[dict[str, np.ndarray]] = [{} for _ in range(form.directions)]
        for matrix in layout(one).matrices:
            weight, bias, scale = plan_panels.unpack(form.target, matrix, buffer[offset:])
            own = named[matrix.direction]
            own[matrix.name] = weight
            if scale is not None:
                own[f"{matrix.name}_scale"] = scale
            if form.biased and matrix.name != "w_hr":
                own[matrix.name.replace("w_", "b_")] = bias
        for own, each in zip(named, parameters_of(one, buffer[offset:]), strict=False):
            own |= {
                parameter_name(name): row.copy()
                for name, row in zip(cell_named(form.cell).parameters, each, strict=True)
            }
        found += named
    return found


def kernel_of(form: FrozenStack) -> Kernel:
    """Load or compile a stack's kernels: those of an ordinary layer where the panels are like its own."""
    if form.target.format is None:
        return kernel(form.cell, "float32", 1)
    return kernel(form.cell, "float32", 0, form.weights)


@functools.lru_cache(maxsize=4096)
def shape(
    form: FrozenStack,
    x_shape: tuple[int, ...],
    x_strides: tuple[int, ...],
    steps: int,
    batch: int,
    threads: int,
    options: tuple[bool, bool] = (False, False),
    cuts: tuple[int, ...] | None = None,
) -> plan.Shape:
    """The plan's shape of one layer. options: whether there are batch_sizes, and resets."""
    reverse, biased, cell = (False, True)[: form.directions], form.biased, cell_named(form.cell)
    recurrent = cell.recurrent > 0
    present = (True, recurrent, biased, biased and recurrent, form.projected, bool(cell.parameters), *options)
    layer = Form(form.cell, reverse, Present(*present))
    sizes = (steps, batch, form.hidden, form.width, 1, False, threads)
    signature = Signature(layer, torch.float32, x_shape, x_strides, *sizes, cuts=cuts, repeated=True)
    return replace(shape_of(signature), weights=form.weights)


class Prepared:
    """A call of known sizes over the whole stack (see `FrozenStack.stacks`): dense, without lengths and resets.

    x: an input of these sizes, [T, B, I] or [B, T, I] or [T, I], with a last stride of 1. zero: whether the initial
    states are zero, and not given.
    """

    def __init__(self, form: FrozenStack, panels: Tensor, x: Tensor, batch_first: bool, zero: bool, threads: int):
        batched = x.dim() == 3
        self.transposed, self.panels, self.panels_address = batched and batch_first, panels, panels.data_ptr()
        x = x.transpose(0, 1) if self.transposed else x if batched else x[:, None]
        x_shape, x_strides = tuple(x.shape), (*x.stride()[:2], 1)
        steps, batch, shapes = *x_shape[:2], []
        for one in form.each():
            shapes.append(shape(one, x_shape, x_strides, steps, batch, threads))
            columns = form.directions * form.width
            x_shape, x_strides = (steps, batch, columns), (batch * columns, columns, 1)
        states = STATES[: len(form.state_sizes)]
        names = ["x", "h", *(f"{state}_final" for state in states)]
        names += [] if zero else [f"{state}_first" for state in states]
        self.recipe = plan_forward.stack(tuple(shapes), (*names, "panels"), False, zero)
        self.kernel = kernel_of(form)
        self.start, self.serial = self.kernel.start, self.recipe.whole.serial
        self.write = Struct(f"{len(self.recipe.named)}q").pack_into
        self.scratch = -(-self.recipe.scratch // 4)
        # Scratch memory of earlier calls, with the record of a call over it.
        self.spare: list[tuple[Tensor, array, int]] = []
        rows = form.layers * form.directions
        sizes = [(steps, batch, x_shape[2]), *((rows, batch, size) for size in form.state_sizes)]
        self.sizes = sizes if batched else [(first, last) for first, _, last in sizes]

    def __call__(self, x: Tensor, initial: Sequence[Tensor]) -> tuple[Tensor, Tensor | tuple[Tensor, ...]]:
        """Return the output and the final states in the layout of x.

        Raises:
            NoMemoryError: a tensor has none.
        """
        new = x.new_empty
        results = [new(*size) for size in self.sizes]
        addresses = addresses_of((x, *results, *initial))
        try:
            spare = self.spare.pop()
        except IndexError:  # the first call, or one beside another in another thread
            spare = self.new_spare(x)
        scratch, call, address = spare
        if self.serial:
            self.write(call, 8 * ADDRESSES, *addresses, self.panels_address)
            self.start(address)
        else:
            self.recipe.call(self.kernel, scratch.data_ptr(), [*addresses, self.panels_address])
        if self.scratch <= MOST_SPARE:
            self.spare.append(spare)
        output, *finals = results
        return output.transpose(0, 1) if self.transposed else output, tuple(finals) if len(finals) > 1 else finals[0]

    def new_spare(self, x: Tensor) -> tuple[Tensor, "array[int]", int]:
        """Return scratch memory, the record of a call over it, and the address of that."""
        scratch, recipe = empty(x, self.scratch), self.recipe
        call = recipe.filled(scratch.data_ptr(), [0] * len(recipe.named), pool.NO_TEAM, recipe.whole)
        return scratch, call, call.buffer_info()[0]

    def stepper(
        self, x: Tensor, output: Tensor, finals: Sequence[Tensor], initial: Sequence[Tensor]
    ) -> Callable[[], None]:
        """Return a function that runs over these tensors again and again, on one thread."""
        tensors = (x, output, *finals, *initial, self.panels)
        return repeat(self.recipe, self.kernel, [each.data_ptr() for each in tensors], tensors)


@functools.lru_cache(maxsize=1024)
def record_layer(planned: plan.Shape, kept: tuple[str, ...]) -> Recipe:
    """Record a layer. kept: names of what it leaves beside h."""
    return plan_forward.forward(planned, False, kept)


def run_layer(
    form: FrozenStack,
    x: Tensor,
    initial: Sequence[Tensor],
    panels: Tensor,
    batch_sizes: Tensor | None,
    resets: Tensor | None,
    all_states: bool,
    signals: Sequence[Tensor] = (),
) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """Run one layer: h [*L, D, P], with `all_states` the other states [*L, D, H], else empty ones, and final states."""
    x = x if x.shape[-1] == 1 or x.stride(-1) == 1 else x.contiguous()
    batch, directions = initial[0].shape[1], form.directions
    sizes = starts = cuts = None
    threads = pool.usable(torch.get_num_threads())
    if batch_sizes is not None:
        sizes = batch_sizes.contiguous()
        starts = None if x.dim() == 3 else sizes.cumsum(0) - sizes
        cuts = row_cuts(sizes, batch, -(-threads // directions)) if threads > 1 else None
    steps = x.shape[0] if starts is None else len(starts)
    options = sizes is not None, resets is not None
    planned = shape(form, tuple(x.shape), x.stride(), steps, batch, threads, options, cuts)
    output = empty(x, *x.shape[:-1], directions, form.width)
    first = [initial[0].contiguous(), *present(together(initial[1:], initial[1:]))]
    finals = [torch.empty_like(state) for state in first]
    aux: Tensor | None = None
    kept: tuple[str, ...] = ()
    if all_states and planned.aux:
        lead = (planned.aux,) if planned.aux > 1 else ()
        aux, kept = empty(x, *lead, *x.shape[:-1], directions, form.hidden), ("aux",)
    tensors = {"x": x, "h": output, "aux": aux, "panels": panels, "sizes": sizes, "starts": starts}
    tensors["resets"] = None if resets is None else resets.contiguous()
    tensors |= zip((f"{state}_first" for state in STATES), first, strict=False)
    tensors |= zip((f"{state}_final" for state in STATES), finals, strict=False)
    signals = [as_signal(each) for each in signals]
    tensors |= zip((f"signal{n}" for n in range(len(signals))), signals, strict=True)
    recipe = record_layer(planned, kept)
    addresses = recipe.addresses(tensors)
    for n, signal in enumerate(signals):
        for name, stride in zip(("step", "row", "unit"), strides_of(signal), strict=True):
            addresses[recipe.named.index(f"signal{n}_{name}")] = stride
    scratch = empty(x, recipe.scratch, dtype=torch.uint8)
    recipe.call(kernel_of(form), scratch.data_ptr(), addresses)
    others = apart(finals[1] if planned.aux else None, planned.aux)
    return output, apart(aux, planned.aux, x), [finals[0], *others]


@functools.cache
def panel_layout_name(form: FrozenStack) -> str:
    """Name all that the layout of panels depends on beside the form."""
    chosen = form.target
    return f"{chosen.lanes} lanes, {chosen.registers} registers, {chosen.terms} terms, {chosen.dot or 'fma'}"
