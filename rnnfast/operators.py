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
from pathlib import Path

import rnnfast_kernels
import torch
from torch import Tensor

from rnnfast import _torch
from rnnfast.backends.dispatch import load
from rnnfast.operator_checks import check_backward, check_layer, check_memory
from rnnfast.spec import Form, Gradients, Layer, Needs, form_of, restore, shown
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
        raise RuntimeError(f"rnnfast: expected {form.total} tensors of a layer of {shown(cell)}, got {len(tensors)}")
    return restore(form, tensors)


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
    lengths = lengths.long()  # in a narrow dtype the number of steps would overflow
    valid = ((lengths >= 0) & (lengths <= steps)).all()
    if lengths.is_cuda:
        _torch.assert_async(valid, f"lengths must lie between 0 and the number of steps, {steps}")
    elif not valid:
        raise ValueError(f"lengths must lie between 0 and the number of steps, {steps}, got {lengths.tolist()}")
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
