"""One layer as a call of the Numba kernels: tensors are made contiguous and allocated here, and named by address.

The names are those of the fields and bases in `rnnfast_kernels.cpu.plan`, which lays out what is computed.
"""

import functools
from collections.abc import Mapping

import numpy as np
import torch
from rnnfast_kernels.cells import CELLS
from rnnfast_kernels.cpu import plan, plan_backward, plan_forward, pool
from rnnfast_kernels.cpu.compiled import kernel
from rnnfast_kernels.cpu.pages import WORTH_IT, ask_for_large_pages
from rnnfast_kernels.cpu.recipe import Recipe
from rnnfast_kernels.cpu.target import MOST_UNPACKED_ROWS
from torch import Tensor

from rnnfast.backends import Gradients, Layer, Needs, Result, Weights

DTYPE_NAMES = {
    torch.float32: "float32",
    torch.float64: "float64",
    torch.bfloat16: "bfloat16",
    torch.float16: "float16",
}
# What kernels keep for themselves is of the layer's dtype, unless it is one of these.
WIDER = {torch.bfloat16: torch.float32, torch.float16: torch.float32}


@functools.cache
def weight_names(directions: int, prefix: str = "") -> tuple[tuple[str, ...], ...]:
    """Names of the bases that are each direction's weights, and, with the prefix d, their gradients."""
    return tuple(tuple(f"{prefix}{name}{d}" for name in Weights._fields) for d in range(directions))


@functools.lru_cache(maxsize=4096)
def shape_of(
    cell: str,
    dtype: torch.dtype,
    x_shape: torch.Size,
    x_strides: tuple[int, ...],
    inputs: int,
    hx_shape: torch.Size,
    gate_columns: int,
    reverse: tuple[bool, ...],
    projected: bool,
    plain: bool,
    packed_steps: int | None,
    threads: int,
    cuts: tuple[int, ...] | None,
    repeated: bool = False,
) -> plan.Shape:
    """One `plan.Shape` for equal sizes, so that plans are found by its identity. inputs: how many there are in x."""
    directions, batch, width = hx_shape
    input_width = x_shape[-1] // inputs
    hidden = gate_columns // CELLS[cell].gates
    rows = x_shape[:-1].numel()
    work = rows * directions * plan.work_per_row(CELLS[cell], input_width, hidden, width)
    step_work = batch * plan.work_per_row(CELLS[cell], 0, hidden, width)
    workers = plan.workers_for(batch, work, step_work, directions, threads) if plain and not projected else 1
    slices = 1 if workers > 1 else plan.slices_for(work, batch, directions, threads)
    return plan.Shape(
        cell=cell,
        dtype=DTYPE_NAMES[dtype],
        steps=x_shape[0] if packed_steps is None else packed_steps,
        batch=batch,
        rows=rows,
        inputs=input_width,
        sharing=directions // inputs,
        hidden=hidden,
        width=width,
        reverse=reverse,
        x_row=x_strides[-2] * dtype.itemsize,
        x_step=x_strides[0] * dtype.itemsize,
        projected=projected,
        threads=threads,
        cuts=cuts if cuts is not None and slices > 1 else plan.even_cuts(batch, slices),
        workers=workers,
        unpacked=rows <= MOST_UNPACKED_ROWS and not projected and not repeated,
    )


def row_cuts(sizes: Tensor, batch: int, slices: int) -> tuple[int, ...]:
    """Bounds of slices of the batch with about as many valid rows each, over all steps."""
    slices = max(1, min(batch, slices))
    lengths = (sizes.numpy()[:, None] > np.arange(batch)).sum(0)
    done = np.concatenate([[0], np.cumsum(lengths)])
    cuts = np.searchsorted(done, done[-1] * np.arange(1, slices) / slices)
    return (0, *cuts.tolist(), batch)


class Call:
    """A layer's tensors, contiguous where kernels want them so, by the names of their bases; and its `plan.Shape`.

    derivatives: which kernels run it.
    """

    derivatives = 1

    def __init__(self, layer: Layer):
        x = layer.x
        self.x = x = x if x.shape[-1] == 1 or x.stride(-1) == 1 else x.contiguous()
        self.cell = CELLS[layer.cell]
        self.hx = [initial.contiguous() for initial in layer.hx]
        self.sizes = self.starts = None
        names = ("h_first", "extra_first")[: len(self.cell.states)]
        self.tensors: dict[str, Tensor | None] = {"x": x, **dict(zip(names, self.hx, strict=True))}
        for names, weights in zip(weight_names(len(layer.weights)), layer.weights, strict=True):
            for name, weight in zip(names, weights, strict=True):
                self.tensors[name] = None if weight is None else weight.contiguous()
        if layer.batch_sizes is not None:
            self.sizes = layer.batch_sizes.contiguous()
            self.starts = None if x.dim() == 3 else self.sizes.cumsum(0) - self.sizes
            self.tensors |= {"sizes": self.sizes, "starts": self.starts}
        if layer.resets is not None:
            self.tensors["resets"] = layer.resets.contiguous()
        first = layer.weights[0]
        self.biased, self.projected = first.b_ih is not None, first.w_hr is not None
        self.shape = self.measure(layer)
        self.lead = (*x.shape[:-1], len(layer.reverse))
        self.kernel = kernel(layer.cell, self.shape.dtype, self.derivatives)

    def measure(self, layer: Layer) -> plan.Shape:
        """Collect what a plan depends on."""
        x, sizes = self.x, self.sizes
        threads = pool.usable(torch.get_num_threads())
        cuts = None
        if sizes is not None and threads > 1:
            cuts = row_cuts(sizes, self.hx[0].shape[1], -(-threads // len(layer.reverse)))
        return shape_of(
            layer.cell,
            x.dtype,
            x.shape,
            x.stride(),
            layer.inputs,
            self.hx[0].shape,
            layer.weights[0].w_hh.shape[0],
            layer.reverse,
            self.projected,
            sizes is None and layer.resets is None,
            None if self.starts is None else self.starts.shape[0],
            threads,
            cuts,
        )

    def run(self, recipe: Recipe, results: Mapping[str, Tensor | None]) -> None:
        """Run a recipe over the layer's tensors and these."""
        scratch = room(self.x, recipe.scratch, dtype=torch.uint8)
        recipe.call(self.kernel, scratch.data_ptr(), recipe.addresses({**self.tensors, **results}))


def room(like: Tensor, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
    """An uninitialised tensor, where it is large in large pages."""
    tensor = like.new_empty(*shape) if dtype is None else like.new_empty(*shape, dtype=dtype)
    if tensor.nbytes >= WORTH_IT:
        ask_for_large_pages(tensor.data_ptr(), tensor.nbytes)
    return tensor


def run_forward(layer: Layer, *, save: bool, keep_extra: bool) -> Result:
    call = Call(layer)
    shape, x = call.shape, call.x
    # The kernels leave what they save of padding as it is; zeros keep the results of equal calls equal.
    padded = call.sizes is not None and call.starts is None
    make = x.new_zeros if padded else functools.partial(room, x)
    wider = WIDER.get(x.dtype, x.dtype)
    kept = {}
    if shape.extra and keep_extra:
        kept["extra"] = room(x, *call.lead, shape.hidden)
    if save and call.cell.saved:
        kept["gates"] = make(*call.lead, call.cell.kept * shape.hidden, dtype=wider)
    if save and call.projected:
        kept["unprojected"] = make(*call.lead, shape.hidden)
    h = room(x, *call.lead, shape.width)
    finals = tuple(torch.empty_like(initial) for initial in call.hx)
    outputs = {"h": h, **kept, **dict(zip(("h_final", "extra_final"), finals, strict=False))}
    call.run(plan_forward.forward(shape, call.biased, tuple(kept)), outputs)
    states = (h, kept.get("extra", x.new_empty(0))) if shape.extra else (h,)
    return Result(states, finals, tuple(kept[name] for name in ("gates", "unprojected") if name in kept))


def run_backward(
    layer: Layer,
    states: tuple[Tensor, ...],
    saved: tuple[Tensor, ...],
    dstates: tuple[Tensor | None, ...],
    dfinals: tuple[Tensor | None, ...],
    needs: Needs,
    groups: int,
) -> Gradients:
    call = Call(layer)
    shape, x = call.shape, call.x
    kept = dict(zip(("extra",) if shape.extra else (), states[1:], strict=True))
    kept |= zip(("gates",) * bool(call.cell.saved) + ("unprojected",) * call.projected, saved, strict=True)
    given = dict(zip(("dh", "dextra"), dstates, strict=False)) | dict(
        zip(("dh_final", "dextra_final"), dfinals, strict=False)
    )
    given = {name: gradient.contiguous() for name, gradient in given.items() if gradient is not None}
    kept = {name: tensor.contiguous() for name, tensor in kept.items()}
    h = states[0].contiguous()

    dhx = tuple(torch.empty_like(initial) if needs.hx else None for initial in call.hx)
    wider = WIDER.get(x.dtype, x.dtype)
    dx = room(x, *x.shape, dtype=wider) if needs.x else None
    dweights = tuple(empty_weights(call, weights, groups) if needs.weights else NO_WEIGHTS for weights in layer.weights)

    tensors = {"h": h, **kept, **given, "dx": dx} | dict(zip(("dh_first", "dextra_first"), dhx, strict=False))
    for names, weights in zip(weight_names(len(dweights), "d"), dweights, strict=True):
        tensors.update(zip(names, weights, strict=True))
    recipe = plan_backward.backward(shape, tuple(kept), tuple(given), *needs, groups, call.biased)
    call.run(recipe, tensors)
    if wider != x.dtype:
        dx = None if dx is None else dx.to(x.dtype)
        dweights = tuple(Weights._make(each if each is None else each.to(x.dtype) for each in w) for w in dweights)
    return Gradients(dx, dhx, dweights)


NO_WEIGHTS = Weights._make([None] * len(Weights._fields))


def empty_weights(call: Call, weights: Weights, groups: int) -> Weights:
    """Room for the gradients of one direction's weights, for every group if there are several."""
    lead = (groups,) if groups > 1 else ()
    dtype = WIDER.get(call.x.dtype, call.x.dtype)
    return Weights._make(
        each if each is None else call.x.new_empty(*lead, *each.shape, dtype=dtype) for each in weights
    )
