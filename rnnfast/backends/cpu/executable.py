"""A pass over one layer, recorded for a signature: afterwards a call allocates its results and passes addresses.

The names are those of the fields of `rnnfast_kernels.cpu.loops.steps.LAYER`, where it says what they are.
"""

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import chain, compress
from typing import NamedTuple

import torch
from rnnfast_kernels.cpu.plan import backward as plan_backward
from rnnfast_kernels.cpu.plan import forward as plan_forward
from rnnfast_kernels.cpu.plan import policy
from rnnfast_kernels.cpu.plan import shape as plan
from rnnfast_kernels.cpu.plan.recipe import Recipe
from rnnfast_kernels.cpu.runtime import pool
from rnnfast_kernels.cpu.runtime.compiled import Kernel, kernel
from rnnfast_kernels.cpu.runtime.pages import WORTH_IT, ask_for_large_pages
from rnnfast_kernels.cpu.target import MOST_UNPACKED_ROWS
from rnnfast_kernels.equations.cell import Cell
from torch import Tensor

from rnnfast.backends.cpu.available import DTYPE_NAMES, WIDER
from rnnfast.spec import Needs, Signature, Weights

STATES = ("h", "aux")


class Buffer(NamedTuple):
    """A result to allocate. dtype: where it is not the layer's. zeroed: where kernels leave parts as they are."""

    shape: tuple[int, ...]
    dtype: torch.dtype | None = None
    zeroed: bool = False

    def bytes(self, dtype: torch.dtype) -> int:
        """Return its size in a layer of a dtype."""
        return math.prod(self.shape) * (self.dtype or dtype).itemsize

    def allocate(self, x: Tensor, new: Callable[..., Tensor]) -> Tensor:
        """Allocate it like x, by `new` where it may be uninitialised."""
        return (x.new_zeros if self.zeroed else new)(*self.shape, dtype=self.dtype or x.dtype)


class Executable:
    """A recorded program and the kernel that runs it.

    tensors, results: names of what it takes and gives, in order.
    """

    def __init__(
        self,
        code: Kernel,
        dtype: torch.dtype,
        record: Callable[..., Recipe],
        tensors: Sequence[str],
        results: Mapping[str, Buffer],
        fixed: Mapping[str, int],
    ):
        """record: takes the names of tensors and results. fixed: addresses, and strides, that are always the same."""
        self.kernel, self.dtype, self.tensors = code, dtype, tuple(tensors)
        self.results, self.buffers = tuple(results), tuple(results.values())
        self.shapes = [each.shape for each in self.buffers]
        self.plain = all(each.dtype is None and not each.zeroed for each in self.buffers)
        self.recipe = record(names=(*self.tensors, *self.results))
        self.fixed = [fixed.get(name, 0) for name in self.recipe.named[len(self.tensors) + len(self.results) :]]
        self.scratch = -(-self.recipe.scratch // dtype.itemsize)
        self.large = max([self.recipe.scratch, *(each.bytes(dtype) for each in self.buffers)]) >= WORTH_IT

    def run(self, x: Tensor, addresses: list[int]) -> list[Tensor]:
        """Allocate results like x, and run. addresses: of the tensors, in their order."""
        new = partial(empty, x) if self.large else x.new_empty
        if self.plain:
            results = [new(*shape) for shape in self.shapes]
        else:
            results = [each.allocate(x, new) for each in self.buffers]
        scratch = new(self.scratch)
        self.recipe.call(self.kernel, scratch.data_ptr(), [*addresses, *map(Tensor.data_ptr, results), *self.fixed])
        return results

    def run_named(self, x: Tensor, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Run over tensors by name, and return results by name."""
        results = self.run(x, [tensors[name].data_ptr() for name in self.tensors])
        return dict(zip(self.results, results, strict=True))


def empty(like: Tensor, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
    """Return an uninitialised tensor, where it is large in large pages."""
    tensor = like.new_empty(*shape) if dtype is None else like.new_empty(*shape, dtype=dtype)
    if tensor.nbytes >= WORTH_IT:
        ask_for_large_pages(tensor.data_ptr(), tensor.nbytes)
    return tensor


def repeat(recipe: Recipe, code: Kernel, addresses: Sequence[int], tensors: Sequence[Tensor]) -> Callable[[], None]:
    """Return a function that runs a recipe over the same tensors again and again, on one thread, packing weights once.

    tensors: what the addresses are of; they live as long as the function.
    """
    scratch = tensors[0].new_empty(recipe.scratch, dtype=torch.uint8)
    records = recipe.start(code, scratch.data_ptr(), addresses, pool.NO_TEAM)
    code.run(records + recipe.preparation.record.offset)

    def step(run=code.run, program=records + recipe.repeated.record.offset, _kept=(scratch, tensors)):
        run(program)

    return step


def code_of(signature: Signature, derivatives: int = 1) -> Kernel:
    """Return the machine code for a signature."""
    return kernel(signature.form.cell, DTYPE_NAMES[signature.dtype], derivatives)


def shape_of(signature: Signature) -> plan.Shape:
    """Return what a plan depends on."""
    form, cell, threads = signature.form, signature.cell, signature.threads
    directions, batch, dtype = len(form.reverse), signature.batch, signature.dtype
    input_width, hidden, width = signature.x_shape[-1] // signature.inputs, signature.hidden, signature.width
    present = form.present
    rows = math.prod(signature.x_shape[:-1])
    work = rows * directions * policy.work_per_row(cell, input_width, hidden, width)
    step_work = batch * policy.work_per_row(cell, 0, hidden, width)
    shared = not (present.w_hr or present.batch_sizes or present.resets)
    workers = policy.workers_for(batch, work, step_work, directions, threads) if shared else 1
    slices = 1 if workers > 1 else policy.slices_for(work, batch, directions, threads)
    repeated = signature.repeated or not cell.standard
    return plan.Shape(
        cell=form.cell,
        dtype=DTYPE_NAMES[dtype],
        steps=signature.steps,
        batch=batch,
        rows=rows,
        inputs=input_width,
        sharing=directions // signature.inputs,
        hidden=hidden,
        width=width,
        reverse=form.reverse,
        x_row=distance(signature, -2),
        x_step=distance(signature, 0),
        projected=present.w_hr,
        threads=threads,
        cuts=signature.cuts if signature.cuts is not None and slices > 1 else policy.even_cuts(batch, slices),
        workers=workers,
        unpacked=rows <= MOST_UNPACKED_ROWS and not present.w_hr and not repeated,
    )


def distance(signature: Signature, dim: int) -> int:
    """Return the stride of x in bytes; 0 along a dimension of size 1, whose stride may be any number."""
    return signature.x_strides[dim] * signature.dtype.itemsize if signature.x_shape[dim] > 1 else 0


def state_names(signature: Signature, form: str) -> tuple[str, ...]:
    """Return a name for h, and for the other states if there are any."""
    return tuple(form.format(state) for state in STATES[: signature.form.states])


def weight_names(signature: Signature, prefix: str = "") -> tuple[str, ...]:
    """Name the weights that there are, direction by direction; or, with the prefix d, their gradients."""
    fields = tuple(compress(Weights._fields, signature.form.present.weights))
    return tuple(f"{prefix}{name}{d}" for d in range(len(signature.form.reverse)) for name in fields)


def tensor_names(signature: Signature) -> tuple[str, ...]:
    """Name the tensors of a layer in the order of `rnnfast.spec.flatten`, with the packed steps' starts at the end."""
    initial = () if signature.zero else state_names(signature, "{}_first")
    signals = (f"signal{n}" for n in range(signature.form.signals))
    options = compress(("sizes", "resets"), signature.form.present.options)
    starts = ("starts",) * (signature.form.present.batch_sizes and not signature.padded)
    return ("x", *initial, *signals, *weight_names(signature), *options, *starts)


def fixed_values(signature: Signature) -> dict[str, int]:
    """Return addresses of zeros for initial states that are not given, and the strides of signals."""
    fixed = {}
    if signature.zero:
        rows = len(signature.form.reverse) * signature.batch * signature.dtype.itemsize
        others = max(1, signature.form.states - 1)
        fixed = {
            "h_first": plan.zeros(rows * signature.width),
            "aux_first": plan.zeros(rows * others * signature.hidden),
        }
    for n, strides in enumerate(signature.signals):
        fixed |= zip((f"signal{n}_step", f"signal{n}_row", f"signal{n}_unit"), strides, strict=True)
    return fixed


def state_buffers(signature: Signature, form: str, lead: tuple[int, ...]) -> dict[str, Buffer]:
    """Describe h, [*lead, P], and the other states together, [*lead, H], with S-1 in front if there are several."""
    others = signature.form.states - 1
    shapes = (*lead, signature.width), ((others,) if others > 1 else ()) + (*lead, signature.hidden)
    return {name: Buffer(shape) for name, shape in zip(state_names(signature, form), shapes, strict=False)}


def residuals(
    cell: Cell, lead: Sequence[int], hidden: int, dtype: torch.dtype, projected: bool, zeroed: bool = False
) -> dict[str, Buffer]:
    """Describe what backward wants beside the states.

    gates [*lead, kept * H]: what the cell wants back, gate by gate, in float32 at least. unprojected [*lead, H].
    """
    found = {"gates": Buffer((*lead, cell.kept * hidden), WIDER.get(dtype), zeroed)} if cell.saved else {}
    return found | {"unprojected": Buffer((*lead, hidden), None, zeroed)} if projected else found


def residual_buffers(signature: Signature) -> dict[str, Buffer]:
    """Describe the residuals of a signature, zeroed where kernels skip padding."""
    projected = signature.form.present.w_hr
    return residuals(signature.cell, signature.lead, signature.hidden, signature.dtype, projected, signature.padded)


@functools.lru_cache(maxsize=1024)
def forward(signature: Signature, save: bool, all_states: bool, flat: bool = False) -> Executable:
    """Record the forward pass. Results: h, the other states if they are asked for, residuals, and the final states.

    flat: whether h is [T, B, D*P] rather than [*L, D, P].
    """
    results = state_buffers(signature, "{}", signature.lead)
    if flat:
        results["h"] = Buffer((*signature.x_shape[:-1], len(signature.form.reverse) * signature.width))
    if not (save or all_states):
        results = {"h": results["h"]}
    results |= residual_buffers(signature) if save else {}
    kept = tuple(results)[1:]
    results |= state_buffers(signature, "{}_final", (len(signature.form.reverse), signature.batch))
    record = partial(plan_forward.forward, shape_of(signature), signature.form.present.b_ih, kept)
    tensors, fixed = tensor_names(signature), fixed_values(signature)
    return Executable(code_of(signature), signature.dtype, record, tensors, results, fixed)


@functools.lru_cache(maxsize=1024)
def backward(signature: Signature, given: tuple[str, ...], needs: Needs, groups: int = 1) -> Executable:
    """Record the backward pass over the layer's tensors, h, the other states and residuals, and incoming gradients.

    given: names of the gradients that are not zero. Results: the gradients that `needs` names.
    """
    wide, lead = WIDER.get(signature.dtype), (groups,) if groups > 1 else ()
    others = ("aux",) if signature.form.states > 1 else ()
    kept = (*others, *residual_buffers(signature))
    results: dict[str, Buffer] = {}
    if needs.x:
        results["dx"] = Buffer(signature.x_shape, wide)
    if needs.hx:
        results |= state_buffers(signature, "d{}_first", (len(signature.form.reverse), signature.batch))
    if needs.signals:
        results["dsignals"] = Buffer((*signature.lead, signature.form.signals * signature.hidden), wide, True)
    if needs.weights:
        shapes = [shape for shape in signature.weights if shape is not None] * len(signature.form.reverse)
        buffers = (Buffer((*lead, *shape), wide) for shape in shapes)
        results |= zip(weight_names(signature, "d"), buffers, strict=True)
    incoming = (*given, "dsignals") if needs.signals else given
    flags = (needs.x, needs.hx, needs.weights)
    biased = signature.form.present.b_ih
    record = partial(plan_backward.backward, shape_of(signature), kept, incoming, *flags, groups, biased)
    tensors = (*tensor_names(signature), "h", *kept, *given)
    return Executable(code_of(signature), signature.dtype, record, tensors, results, fixed_values(signature))


@functools.lru_cache(maxsize=1024)
def stack(signatures: tuple[Signature, ...], batched: bool = True) -> Executable:
    """Record layers on top of one another, with nothing kept: for cells of at most two states.

    Results: the output and the final states, without a batch dimension where it is one that was added.
    """
    first, last = signatures[0], signatures[-1]
    directions = len(first.form.reverse)
    lead = first.x_shape[:2] if batched else first.x_shape[:1]
    results = {"h": Buffer((*lead, directions * last.width))}
    rows = (len(signatures) * directions, first.batch)[: 1 + batched]
    results |= state_buffers(first, "{}_final", rows)
    weights = chain.from_iterable(
        (plan_forward.layer_name(name, n) for name in weight_names(each)) for n, each in enumerate(signatures)
    )
    tensors = ("x", *(() if first.zero else state_names(first, "{}_first")), *weights)
    shapes, biased = tuple(map(shape_of, signatures)), first.form.present.b_ih
    record = partial(plan_forward.stack, shapes, biased=biased, zero=first.zero)
    return Executable(code_of(first), first.dtype, record, tensors, results, {})
