"""The operators that torch sees: `rnnfast::layer`, `rnnfast::layer_backward` and `rnnfast::sort_lengths`.

They are opaque, so that compilers and exporters carry one node per layer whatever the number of steps. Each has a fake
implementation that gives shapes alone. A layer crosses the boundary as `rnnfast.spec.flatten` lists it: a cell, the
directions, which tensors are present, and the tensors.

Compilers keep graphs on disk and find them again by the operators' names and arguments, while the shapes in them are
those of the version that was traced. `layer` therefore takes a `version`, which changes nothing but the graph.
"""

import hashlib
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from itertools import pairwise
from pathlib import Path

import rnnfast_kernels
import torch
from rnnfast_kernels.cells import CELLS
from torch import Tensor

from rnnfast import _torch
from rnnfast.backends.dispatch import load
from rnnfast.spec import Form, Gradients, Layer, Needs, form_of, restore
from rnnfast.vmap import map_backward, map_layer

LAYER_SCHEMA = (
    "layer(str backend, str cell, bool[] reverse, bool[] present, bool save, bool all_states, Tensor[] tensors, "
    "str version='') -> Tensor[]"
)
BACKWARD_SCHEMA = (
    "layer_backward(str backend, str cell, bool[] reverse, bool[] present, bool[] needs, SymInt groups, "
    "Tensor[] tensors, Tensor[] states, Tensor[] saved, Tensor?[] gradients) -> Tensor[]"
)
SORT_SCHEMA = "sort_lengths(Tensor lengths, SymInt steps) -> (Tensor, Tensor, Tensor)"

UNCHANGED = nullcontext()

library = torch.library.Library("rnnfast", "DEF")
for schema in (LAYER_SCHEMA, BACKWARD_SCHEMA, SORT_SCHEMA):
    library.define(schema, tags=(torch.Tag.pt2_compliant_tag,))


def layer_of(cell: str, reverse: Sequence[bool], present: Sequence[bool], tensors: Sequence[Tensor]) -> Layer:
    """Return what backends take from what operators take.

    Raises:
        RuntimeError: the cell is not declared in this process, or the number of tensors is another one.
    """
    form = form_of(cell, reverse, present)
    if len(tensors) != form.total:
        raise RuntimeError(f"rnnfast: expected {form.total} tensors of a layer of {cell}, got {len(tensors)}")
    return restore(form, tensors)


def check_layer(layer: Layer) -> None:
    """Raise RuntimeError where tensors do not fit together: a graph may be called with other sizes than those traced.

    Kernels take addresses and sizes, so what is let through here is read and written as if it did fit.
    """
    cell, x, first = layer.definition, layer.x, layer.weights[0]
    directions, packed = len(layer.reverse), x.dim() == 2
    inputs, hidden = first.w_ih.shape[-1], layer.hidden
    width = hidden if first.w_hh is None else first.w_hh.shape[-1]
    if x.dim() not in (2, 3) or (x.shape[-1] % inputs if inputs else x.shape[-1]):
        raise RuntimeError(f"rnnfast: expected x of shape [T, B, {inputs}] or [rows, {inputs}], got {list(x.shape)}")
    batch = layer.hx[0].shape[1] if packed and layer.hx[0].dim() > 1 else x.shape[-2]
    gates, recurrent = (cell.gates * hidden,), (cell.recurrent * hidden,)
    own = (len(cell.parameters), hidden)
    wanted = ((*gates, inputs), (*recurrent, width), gates, recurrent, (width, hidden), own)
    for n, weights in enumerate(layer.weights):
        for name, weight, shape in zip(weights._fields, weights, wanted, strict=True):
            if weight is not None:
                expect(f"{name} of direction {n}", weight, shape, x)
    for n, state in enumerate(layer.hx):
        expect(f"hx[{n}]", state, (directions, batch, width if n == 0 else hidden), x)
    if layer.batch_sizes is not None:
        expect("batch_sizes", layer.batch_sizes, (layer.steps,), None, torch.int64)
    elif packed:
        raise RuntimeError("rnnfast: expected batch_sizes with an x of shape [rows, I], got None")
    if packed and layer.batch_sizes is not None and x.device.type == "cpu":
        sizes = layer.batch_sizes.tolist()
        if sum(sizes) != len(x) or any(a < b for a, b in pairwise([batch, *sizes, 0])):
            raise RuntimeError(f"rnnfast: expected batch_sizes for {len(x)} rows of {batch} sequences, got {sizes}")
    if layer.resets is not None:
        expect("resets", layer.resets, (layer.steps, batch), None, torch.bool)
    check_signals(layer.cell, layer.signals, (layer.steps, batch, hidden), x)


def check_signals(cell: str, signals: Sequence[Tensor], full: tuple[int, int, int], x: Tensor) -> None:
    """Raise RuntimeError where signals are not those of a cell, broadcastable to [T, B, H]."""
    names = CELLS[cell].signals
    if len(signals) != len(names):
        raise RuntimeError(f"rnnfast: expected {len(names)} signals of {cell}, got {len(signals)}")
    for name, signal in zip(names, signals, strict=True):
        if signal.dim() != 3 or any(a not in (1, b) for a, b in zip(signal.shape, full, strict=True)):
            raise RuntimeError(
                f"rnnfast: expected the signal {name} to be broadcastable to {list(full)}, got {list(signal.shape)}"
            )
        expect(f"the signal {name}", signal, signal.shape, x)


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
        if tensor.data_ptr() == 0 and tensor.numel():
            raise RuntimeError(f"rnnfast: a tensor of shape {list(tensor.shape)} has no memory: its storage has size 0")


def check_backward(layer: Layer, backend: str, states, saved, gradients) -> None:
    """Raise RuntimeError where what forward left, or a gradient, does not fit the layer."""
    lead, count = (*layer.x.shape[:-1], len(layer.reverse)), len(layer.hx)
    if len(states) != count or len(gradients) != 2 * count:
        raise RuntimeError(
            f"rnnfast: expected {count} states and {2 * count} gradients, got {len(states)} and {len(gradients)}"
        )
    for n, (state, initial) in enumerate(zip(states, layer.hx, strict=True)):
        shape = (*lead, initial.shape[-1])
        expect(f"states[{n}]", state, shape, layer.x)
        for name, gradient, own in (("dstates", gradients[n], shape), ("dfinals", gradients[count + n], initial.shape)):
            if gradient is not None:
                expect(f"{name}[{n}]", gradient, own, layer.x)
    for n, (tensor, (shape, dtype)) in enumerate(zip(saved, load(backend).saved_like(layer), strict=True)):
        expect(f"saved[{n}]", tensor, shape, None, dtype)


def as_stored(gradients: Sequence[Tensor | None]) -> Sequence[Tensor | None]:
    """Return gradients whose memory holds what they mean: torch's dispatcher overlooks lists of optional tensors."""
    if not any(g is not None and (g.is_neg() or _torch.is_known_zero(g)) for g in gradients):
        return gradients
    return [g if g is None else torch.zeros_like(g) if _torch.is_known_zero(g) else g.resolve_neg() for g in gradients]


def as_given(x: Tensor) -> AbstractContextManager:
    """Disable autocast: the inputs are cast already."""
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


def layer(backend, cell, reverse, present, save, all_states, tensors, version="") -> list[Tensor]:
    """Run one layer: the states, the final states and what backward wants, one after another.

    States beyond the first are empty tensors of shape [0] unless `save` or `all_states` asks for them.
    """
    with as_given(tensors[0]):
        described = layer_of(cell, reverse, present, tensors)
        check_layer(described)
        check_memory(tensors)
        result = load(backend).forward(described, save=save, all_states=all_states)
    return [*result.states, *result.finals, *result.saved]


def layer_fake(backend, cell, reverse, present, save, all_states, tensors, version="") -> list[Tensor]:
    """Shapes of `layer`."""
    described = layer_of(cell, reverse, present, tensors)
    x, lead = described.x, (*described.x.shape[:-1], len(reverse))
    shapes = [(*lead, initial.shape[-1]) for initial in described.hx]
    states = [x.new_empty(shape if n == 0 or save or all_states else (0,)) for n, shape in enumerate(shapes)]
    finals = [x.new_empty(initial.shape) for initial in described.hx]
    kept = load(backend).saved_like(described) if save else ()
    return [*states, *finals, *(x.new_empty(shape, dtype=dtype) for shape, dtype in kept)]


def layer_vmap(info, in_dims, backend, cell, reverse, present, save, all_states, tensors, version=""):
    """Map `layer` where no gradient is wanted; with gradients, the autograd Functions' own rules come first."""

    def apply(form: Form, tensors):
        return torch.ops.rnnfast.layer(backend, *form.arguments(), save, all_states, tensors, version)

    form = form_of(cell, reverse, present)
    results, dims = map_layer(apply, backend, form, info.batch_size, tensors, in_dims[6])
    return list(results), list(dims)


def layer_backward(
    backend, cell, reverse, present, needs, groups, tensors, states, saved, gradients
) -> list[Tensor]:  # fmt: skip
    """Differentiate one layer: gradients of x, hx, signals and weights in this order, shape [0] where not needed.

    gradients: of the states and the final states. groups: with more than one, gradients of the weights have a leading
    dimension [groups], see `Backend.backward`.
    """
    needs = Needs(*needs)
    with as_given(tensors[0]):
        described = layer_of(cell, reverse, present, tensors)
        check_layer(described)
        gradients = as_stored(gradients)
        check_backward(described, backend, states, saved, gradients)
        check_memory((*tensors, *states, *saved, *(each for each in gradients if each is not None)))
        count = len(states)
        dstates, dfinals = tuple(gradients[:count]), tuple(gradients[count:])
        found = load(backend).backward(described, tuple(states), tuple(saved), dstates, dfinals, needs, groups)
    form = form_of(cell, reverse, present)
    pairs = zip(listed(form, found), form.asked(needs), strict=True)
    return [each if asked and each is not None else tensors[0].new_empty(0) for each, asked in pairs]


def listed(form: Form, gradients: Gradients) -> list[Tensor | None]:
    """List gradients in the order of the layer's differentiable tensors."""
    there = form.present.weights
    weights = (
        each for direction in gradients.weights for each, is_there in zip(direction, there, strict=True) if is_there
    )
    return [gradients.x, *gradients.hx, *gradients.signals, *weights]


def layer_backward_fake(
    backend, cell, reverse, present, needs, groups, tensors, states, saved, gradients
) -> list[Tensor]:  # fmt: skip
    """Shapes of `layer_backward`."""
    form = form_of(cell, reverse, present)
    first = 1 + form.states + form.signals  # of the weights
    lead = (groups,) if groups > 1 else ()
    return [
        tensor.new_empty(((*lead, *tensor.shape) if n >= first else tensor.shape) if asked else (0,))
        for n, (tensor, asked) in enumerate(zip(tensors, form.asked(Needs(*needs)), strict=False))
    ]


def layer_backward_vmap(
    info, in_dims, backend, cell, reverse, present, needs, groups, tensors, states, saved, gradients
):  # fmt: skip
    """Map `layer_backward` where no second derivative is wanted."""

    def apply(form: Form, groups, tensors, states, saved, gradients):
        return torch.ops.rnnfast.layer_backward(
            backend, *form.arguments(), list(needs), groups, tensors, states, saved, gradients
        )

    form = form_of(cell, reverse, present)
    lists = (tensors, states, saved, gradients)
    dims = [given or [None] * len(each) for given, each in zip(in_dims[6:], lists, strict=True)]
    results, dims = map_backward(apply, backend, form, Needs(*needs), groups, info.batch_size, lists, dims)
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
