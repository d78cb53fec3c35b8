"""The operators that torch sees: `rnnfast::layer`, `rnnfast::layer_backward` and `rnnfast::sort_lengths`.

They are opaque, so that compilers and exporters carry one node per layer whatever the number of steps. Each has a fake
implementation that gives shapes alone. A layer's weights travel as one flat list, direction by direction, each in the
order w_ih, w_hh, b_ih, b_hh, w_hr with the absent ones left out.

Compilers keep graphs on disk and find them again by the operators' names and arguments, while the shapes in them are
those of the version that was traced. `layer` therefore takes a `version`, which changes nothing but the graph.
"""

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from itertools import accumulate, pairwise
from pathlib import Path

import rnnfast_kernels
import torch
from rnnfast_kernels.cells import CELLS
from torch import Tensor

from rnnfast import _torch
from rnnfast.backends import Layer, Needs, Weights
from rnnfast.backends.choice import load
from rnnfast.batching import Backward, map_backward, map_layer

LAYER_SCHEMA = (
    "layer(str cell, str backend, bool[] reverse, bool save, bool all_states, "
    "Tensor x, Tensor[] hx, Tensor[] weights, Tensor? batch_sizes, Tensor? resets, str version='') -> Tensor[]"
)
BACKWARD_SCHEMA = (
    "layer_backward(str cell, str backend, bool[] reverse, bool need_x, bool need_hx, bool need_weights, "
    "SymInt groups, Tensor x, Tensor[] hx, Tensor[] weights, Tensor? batch_sizes, Tensor? resets, "
    "Tensor[] states, Tensor[] saved, Tensor?[] dstates, Tensor?[] dfinals) -> Tensor[]"
)
SORT_SCHEMA = "sort_lengths(Tensor lengths, SymInt steps) -> (Tensor, Tensor, Tensor)"

UNCHANGED = nullcontext()

library = torch.library.Library("rnnfast", "DEF")
for schema in (LAYER_SCHEMA, BACKWARD_SCHEMA, SORT_SCHEMA):
    library.define(schema, tags=(torch.Tag.pt2_compliant_tag,))


def pack_weights(weights: Sequence[Tensor], directions: int) -> tuple[Weights, ...]:
    """Group a flat list of weights by direction and name them; the count per direction tells which are present."""
    count = len(weights) // directions
    return tuple(name_weights(weights[d * count : (d + 1) * count]) for d in range(directions))


def name_weights(present: Sequence[Tensor]) -> Weights:
    """Name one direction's weights: two matrices, then two biases or none, then a projection or none."""
    b_ih, b_hh = present[2:4] if len(present) >= 4 else (None, None)
    projection = present[-1] if len(present) % 2 else None
    return Weights(present[0], present[1], b_ih, b_hh, projection)


def flat_weights(weights: Sequence[Weights]) -> Iterator[Tensor]:
    """Undo `pack_weights`."""
    return (tensor for direction in weights for tensor in direction if tensor is not None)


def make_layer(cell, reverse, x, hx, weights, batch_sizes, resets) -> Layer:
    """Build what backends take from what operators take."""
    named = pack_weights(weights, len(reverse))
    return Layer(cell, x, tuple(hx), named, tuple(reverse), batch_sizes, resets)


def check_layer(layer: Layer) -> None:
    """Raise RuntimeError where tensors do not fit together: a graph may be called with other sizes than those traced.

    Kernels take addresses and sizes, so what is let through here is read and written as if it did fit.
    """
    cell, x, (first, *others) = CELLS[layer.cell], layer.x, layer.weights
    directions, packed = len(layer.reverse), x.dim() == 2
    width, hidden = first.w_hh.shape[-1], first.w_hh.shape[0] // cell.gates
    batch = layer.hx[0].shape[1] if packed and layer.hx else x.shape[-2]
    columns = cell.gates * hidden
    gates = (columns,)
    wanted = ((columns, first.w_ih.shape[-1]), (columns, width), gates, gates, (width, hidden))
    for n, weights in enumerate(layer.weights):
        for name, weight, shape in zip(weights._fields, weights, wanted, strict=True):
            if weight is not None:
                expect(f"{name} of direction {n}", weight, shape, x)
    if len(others) + 1 != directions or len(layer.hx) != len(cell.states):
        counts = f"{len(cell.states)} states and the weights of {directions} directions"
        raise RuntimeError(f"rnnfast: expected {counts}, got {len(layer.hx)} and {len(layer.weights)}")
    for n, state in enumerate(layer.hx):
        expect(f"hx[{n}]", state, (directions, batch, width if n == 0 else hidden), x)
    inputs = first.w_ih.shape[-1]
    if x.dim() not in (2, 3) or (x.shape[-1] % inputs if inputs else x.shape[-1]):
        raise RuntimeError(f"rnnfast: expected x of shape [T, B, {inputs}] or [rows, {inputs}], got {list(x.shape)}")
    steps = x.shape[0]
    if layer.batch_sizes is not None:
        steps = len(layer.batch_sizes) if packed else steps
        expect("batch_sizes", layer.batch_sizes, (steps,), None, torch.int64)
    elif packed:
        raise RuntimeError("rnnfast: expected batch_sizes with an x of shape [rows, I], got None")
    if packed and layer.batch_sizes is not None and x.device.type == "cpu":
        sizes = layer.batch_sizes.tolist()
        if sum(sizes) != len(x) or any(a < b for a, b in pairwise([batch, *sizes, 0])):
            raise RuntimeError(f"rnnfast: expected batch_sizes for {len(x)} rows of {batch} sequences, got {sizes}")
    if layer.resets is not None:
        expect("resets", layer.resets, (steps, batch), None, torch.bool)


def expect(
    name: str, tensor: Tensor, shape: Sequence[int], like: Tensor | None, dtype: torch.dtype | None = None
) -> None:
    """Raise RuntimeError where a tensor is of another shape, or of another dtype or device than `like`."""
    dtype = dtype if like is None else like.dtype
    if tensor.shape != shape or tensor.dtype != dtype or (like is not None and tensor.device != like.device):
        where = "" if like is None else f" on {like.device}"
        raise RuntimeError(
            f"rnnfast: expected {name} of shape {list(shape)}, {dtype}{where}, "
            f"got {list(tensor.shape)}, {tensor.dtype} on {tensor.device}"
        )


def check_memory(tensors: Sequence[Tensor]) -> None:
    """Raise RuntimeError where the memory of a tensor was given back (`untyped_storage().resize_(0)`)."""
    for tensor in tensors:
        if tensor.data_ptr() == 0 and tensor.numel() and not _torch.is_known_zero(tensor):
            raise RuntimeError(f"rnnfast: a tensor of shape {list(tensor.shape)} has no memory: its storage has size 0")


def check_backward(layer: Layer, backend: str, states, saved, dstates, dfinals) -> None:
    """Raise RuntimeError where what forward left, or a gradient, does not fit the layer."""
    lead = (*layer.x.shape[:-1], len(layer.reverse))
    for n, (state, dstate, dfinal, initial) in enumerate(zip(states, dstates, dfinals, layer.hx, strict=True)):
        shape = (*lead, initial.shape[-1])
        expect(f"states[{n}]", state, shape, layer.x)
        if dstate is not None:
            expect(f"dstates[{n}]", dstate, shape, layer.x)
        if dfinal is not None:
            expect(f"dfinals[{n}]", dfinal, initial.shape, layer.x)
    for n, (tensor, (shape, dtype)) in enumerate(zip(saved, load(backend).saved_like(layer), strict=True)):
        expect(f"saved[{n}]", tensor, shape, None, dtype)


def as_stored(gradients: Sequence[Tensor | None]) -> Sequence[Tensor | None]:
    """Return gradients whose memory holds what they mean: torch's dispatcher overlooks lists of optional tensors."""
    if not any(g is not None and (g.is_neg() or _torch.is_known_zero(g)) for g in gradients):
        return gradients
    return [g if g is None else torch.zeros_like(g) if _torch.is_known_zero(g) else g.resolve_neg() for g in gradients]


def as_given(x: Tensor) -> AbstractContextManager:
    """Keep autocast, which has already had its say, from changing what a backend computes."""
    if not _torch.is_any_autocast_enabled():
        return UNCHANGED
    return torch.autocast(x.device.type, enabled=False)


@_torch.constant_in_graphs
def version() -> str:
    """Return what tells this version's graphs from those of any other."""
    return hash_of_sources()


@cache
def hash_of_sources() -> str:
    """Read every source of the library, once; without sources its compiled modules, or the archive it lies in."""
    folders = [Path(module).parent for module in (__file__, rnnfast_kernels.__file__)]
    files = [path for folder in folders for path in sorted(folder.rglob("*.py")) or sorted(folder.rglob("*.pyc"))]
    files = files or [path for path in folders[0].parents if path.is_file()]
    return hashlib.sha256(b"".join(path.read_bytes() for path in files)).hexdigest()[:16]


def layer(cell, backend, reverse, save, all_states, x, hx, weights, batch_sizes, resets, version="") -> list[Tensor]:
    """Run one layer: the states, the final states and what backward wants, one after another.

    States beyond the first are empty tensors of shape [0] unless `save` or `all_states` asks for them.
    """
    with as_given(x):
        described = make_layer(cell, reverse, x, hx, weights, batch_sizes, resets)
        check_layer(described)
        check_memory((x, *hx, *weights))
        result = load(backend).forward(described, save=save, all_states=all_states)
    return [*result.states, *result.finals, *result.saved]


def layer_fake(
    cell, backend, reverse, save, all_states, x, hx, weights, batch_sizes, resets, version=""
) -> list[Tensor]:
    """Shapes of `layer`."""
    described = make_layer(cell, reverse, x, hx, weights, batch_sizes, resets)
    shapes = [(*x.shape[:-1], len(reverse), initial.shape[-1]) for initial in hx]
    states = [x.new_empty(shape if n == 0 or save or all_states else (0,)) for n, shape in enumerate(shapes)]
    finals = [x.new_empty(initial.shape) for initial in hx]
    kept = load(backend).saved_like(described) if save else ()
    return [*states, *finals, *(x.new_empty(shape, dtype=dtype) for shape, dtype in kept)]


def layer_vmap(
    info, in_dims, cell, backend, reverse, save, all_states, x, hx, weights, batch_sizes, resets, version=""
):
    """Map `layer` where no gradient is wanted; with gradients, the autograd Functions' own rules come first."""

    def apply(reverse, batch_sizes, resets, x, *tensors):
        hx, weights = tensors[:count], tensors[count:]
        return torch.ops.rnnfast.layer(
            cell, backend, reverse, save, all_states, x, hx, weights, batch_sizes, resets, version
        )

    count = len(hx)
    x_dim, hx_dims, weight_dims, sizes_dim, resets_dim = in_dims[5:10]
    dims = (sizes_dim, resets_dim, x_dim, *(hx_dims or [None] * len(hx)), *(weight_dims or [None] * len(weights)))
    args = (batch_sizes, resets, x, *hx, *weights)
    results, dims = map_layer(apply, backend, reverse, info.batch_size, args, dims, count)
    return list(results), list(dims)


def layer_backward(
    cell, backend, reverse, need_x, need_hx, need_weights, groups, x, hx, weights, batch_sizes, resets,
    states, saved, dstates, dfinals,
) -> list[Tensor]:  # fmt: skip
    """Differentiate one layer: gradients of x, hx and weights in this order, shape [0] where not needed.

    groups: with more than one, gradients of the weights have a leading dimension [groups], see `Backend.backward`.
    """
    needs = Needs(need_x, need_hx, need_weights)
    with as_given(x):
        described = make_layer(cell, reverse, x, hx, weights, batch_sizes, resets)
        check_layer(described)
        dstates, dfinals = as_stored(dstates), as_stored(dfinals)
        check_backward(described, backend, states, saved, dstates, dfinals)
        check_memory((x, *hx, *weights, *states, *saved, *(g for g in (*dstates, *dfinals) if g is not None)))
        grads = load(backend).backward(
            described, tuple(states), tuple(saved), tuple(dstates), tuple(dfinals), needs, groups
        )  # fmt: skip
    return [
        grads.x if need_x else x.new_empty(0),
        *(grads.hx if need_hx else (x.new_empty(0) for _ in hx)),
        *(flat_weights(grads.weights) if need_weights else (x.new_empty(0) for _ in weights)),
    ]


def layer_backward_fake(
    cell, backend, reverse, need_x, need_hx, need_weights, groups, x, hx, weights, batch_sizes, resets,
    states, saved, dstates, dfinals,
) -> list[Tensor]:  # fmt: skip
    """Shapes of `layer_backward`."""
    leading = (groups,) if groups > 1 else ()
    return [
        *(x.new_empty(t.shape if need else (0,)) for t, need in ((x, need_x), *((t, need_hx) for t in hx))),
        *(x.new_empty((*leading, *w.shape) if need_weights else (0,)) for w in weights),
    ]


def layer_backward_vmap(
    info, in_dims, cell, backend, reverse, need_x, need_hx, need_weights, groups, x, hx, weights, batch_sizes, resets,
    states, saved, dstates, dfinals,
):  # fmt: skip
    """Map `layer_backward` where no second derivative is wanted."""
    flags = (need_x, need_hx, need_weights)
    count = len(hx)
    behind = list(accumulate(map(len, (dfinals, dstates, saved, states))))[::-1]  # tensors from each list on

    def apply(reverse, groups, batch_sizes, resets, x, *tensors):
        bounds = [0, count, *(len(tensors) - n for n in behind), len(tensors)]
        hx, weights, *others = (tensors[start:end] for start, end in pairwise(bounds))
        return torch.ops.rnnfast.layer_backward(
            cell, backend, reverse, *flags, groups, x, hx, weights, batch_sizes, resets, *others
        )

    def flat_dims(dims, tensors):
        return dims or [None] * len(tensors)

    x_dim, hx_dims, weight_dims, sizes_dim, resets_dim, *rest = in_dims[7:]
    lists = ((hx_dims, hx), (weight_dims, weights), *zip(rest, (states, saved, dstates, dfinals), strict=True))
    dims = (sizes_dim, resets_dim, x_dim, *(d for pair in lists for d in flat_dims(*pair)))
    args = (batch_sizes, resets, x, *(t for _, tensors in lists for t in tensors))
    constants = Backward(backend, reverse, flags, groups)
    results, dims = map_backward(apply, constants, info.batch_size, args, dims, count, len(saved))
    return list(results), list(dims)


@_torch.constant_in_graphs
def in_onnx_export() -> bool:
    """Say whether a model is being exported to ONNX."""
    return torch.onnx.is_in_onnx_export()


def sort_rows(lengths: Tensor, steps: int) -> tuple[Tensor, Tensor, Tensor]:
    """Call the operator `sort_lengths`, or do its work in operators that ONNX knows."""
    if not (torch.compiler.is_compiling() and in_onnx_export()):
        return torch.ops.rnnfast.sort_lengths(lengths, steps)
    order = torch.sort(lengths, descending=True).indices
    at_step = torch.arange(steps, device=lengths.device)
    return (lengths > at_step[:, None]).sum(1), order, torch.sort(order).indices


def sort_lengths(lengths: Tensor, steps: int) -> tuple[Tensor, Tensor, Tensor]:
    """Turn lengths [*, B] into `batch_sizes` [*, T], the order of falling length [*, B], and its inverse [*, B].

    Raises ValueError where a length is outside 0..steps; on a GPU, so as not to wait for it, a device assertion.
    """
    valid = ((lengths >= 0) & (lengths <= steps)).all()
    if lengths.is_cuda:
        _torch.assert_async(valid, f"lengths must lie between 0 and the number of steps, {steps}")
    elif not valid:
        raise ValueError(f"lengths must lie between 0 and the number of steps, {steps}, got {lengths.tolist()}")
    lengths = lengths.long()
    order = torch.sort(lengths, descending=True, stable=True).indices
    *members, batch = lengths.shape
    rows, at_step = torch.arange(batch, device=order.device), torch.arange(steps, device=order.device)
    inverse = torch.empty_like(order).scatter_(-1, order, rows.expand_as(order))
    rising, at_step = lengths.sort().values.contiguous(), at_step.expand(*members, steps).contiguous()
    return batch - torch.searchsorted(rising, at_step, right=True), order, inverse


def sort_lengths_fake(lengths: Tensor, steps: int) -> tuple[Tensor, Tensor, Tensor]:
    """Shapes of `sort_lengths`; `len` would fix the batch size in the graph, `shape` does not."""
    order = lengths.new_empty(lengths.shape, dtype=torch.int64)
    return lengths.new_empty((*lengths.shape[:-1], steps), dtype=torch.int64), order, torch.empty_like(order)


def sort_lengths_vmap(info, in_dims, lengths: Tensor, steps: int):
    """Map `sort_lengths`: members are sorted together, each by itself."""
    return torch.ops.rnnfast.sort_lengths(lengths.movedim(in_dims[0], 0), steps), (0, 0, 0)


for name, implementation, fake in (
    ("layer", layer, layer_fake),
    ("layer_backward", layer_backward, layer_backward_fake),
    ("sort_lengths", sort_lengths, sort_lengths_fake),
):
    for key in ("CPU", "CUDA"):
        library.impl(name, implementation, key)
    torch.library.register_fake(f"rnnfast::{name}", fake, lib=library)
torch.library.register_vmap("rnnfast::layer", layer_vmap, lib=library)
torch.library.register_vmap("rnnfast::layer_backward", layer_backward_vmap, lib=library)
torch.library.register_vmap("rnnfast::sort_lengths", sort_lengths_vmap, lib=library)
