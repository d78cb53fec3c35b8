"""The operator `rnnfast::frozen_layer`: one layer over packed weights, as one node of a graph.

It takes either the panels of this machine or, in exported programs, the weights as `state_dict` has them. Those are
packed when they are first met, and the panels kept for as long as the tensors live.
"""

import importlib
from collections.abc import Sequence
from functools import cache
from types import ModuleType
from typing import NamedTuple

import torch
from rnnfast_kernels.cpu.formats import FORMATS
from torch import Tensor
from torch.utils.weak import TensorWeakRef, WeakTensorKeyDictionary

from rnnfast.changes import versions
from rnnfast.operator_checks import check_memory, check_rows, check_signals, expect
from rnnfast.operators import library
from rnnfast.spec import cell_named, parameter_name
from rnnfast.vmap import each, fold, unfold

NAME = "frozen_layer"
SCHEMA = (
    f"{NAME}(str cell, str weights, int inputs, int hidden, int width, bool projected, bool biased, "
    "bool[] reverse, bool all_states, str processor, Tensor x, Tensor[] hx, Tensor[] held, Tensor? batch_sizes, "
    "Tensor? resets, Tensor[] signals) -> Tensor[]"
)
library.define(SCHEMA, tags=(torch.Tag.pt2_compliant_tag,))


class Packed(NamedTuple):
    """Panels, and the tensors that they were packed from."""

    form: tuple
    tensors: list[TensorWeakRef]
    versions: list[int] | None
    panels: Tensor


# By the first of the tensors.
packed: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


@cache
def kernels() -> ModuleType:
    """Import what runs frozen layers on the CPU."""
    return importlib.import_module("rnnfast.backends.cpu.frozen")


def weight_names(cell: str, weights: str, projected: bool, biased: bool) -> tuple[str, ...]:
    """Name a direction's tensors in order: matrices, their scales, biases, parameters of the cell."""
    row = cell_named(cell)
    matrices = ("w_ih", "w_hh", "w_hr")[: 3 if projected else 2 if row.recurrent else 1]
    scales = tuple(f"{name}_scale" for name in matrices) if FORMATS[weights].scaled else ()
    biases = ("b_ih", "b_hh")[: 2 if row.recurrent else 1] if biased else ()
    return (*matrices, *scales, *biases, *map(parameter_name, row.parameters))


def frozen_layer(
    cell, weights, inputs, hidden, width, projected, biased, reverse, all_states, processor, x, hx, held, batch_sizes,
    resets, signals,
) -> list[Tensor]:  # fmt: skip
    """Run one layer: every state of every step, of those but h empty tensors unless asked for, and the final states."""
    check_memory((x, *hx, *held, *signals))
    backend = kernels()
    form = backend.FrozenStack(cell, weights, 1, len(reverse), inputs, hidden, width, projected, biased)
    check(form, x, hx, batch_sizes, resets, signals)
    if processor:
        here = backend.panel_layout_name(form)
        if processor != here:
            raise RuntimeError(f"rnnfast: weights were packed for {processor}, and this processor is {here}")
        panels = held[0]
        expect("panels", panels, (backend.offsets(form)[-1],), None, torch.uint8)
    else:
        panels = panels_of(form, held)
    output, others, finals = backend.run_layer(form, x, hx, panels, batch_sizes, resets, all_states, signals)
    return [output, *others, *finals]


def check(
    form, x: Tensor, hx: Sequence[Tensor], batch_sizes: Tensor | None, resets: Tensor | None, signals: Sequence[Tensor]
) -> None:
    """Raise RuntimeError where tensors do not fit: a graph may be called with other sizes than those traced."""
    if x.dim() not in (2, 3) or x.shape[-1] != form.inputs or x.dtype != torch.float32:
        raise RuntimeError(
            f"rnnfast: expected x of shape [T, B, {form.inputs}] or [rows, {form.inputs}], torch.float32, "
            f"got {list(x.shape)}, {x.dtype}"
        )
    if len(hx) != len(form.state_sizes):
        raise RuntimeError(f"rnnfast: expected {len(form.state_sizes)} initial states, got {len(hx)}")
    batch = hx[0].shape[1] if x.dim() == 2 else x.shape[1]
    for n, (state, size) in enumerate(zip(hx, form.state_sizes, strict=True)):
        expect(f"hx[{n}]", state, (form.directions, batch, size), x)
    steps = check_rows(x, batch_sizes, batch)
    if resets is not None:
        expect("resets", resets, (steps, batch), None, torch.bool)
    check_signals(form.cell, signals, (steps, batch, form.hidden), x)


def panels_of(form, held: Sequence[Tensor]) -> Tensor:
    """Return the panels of weights, packed once, and again where a weight was changed in place.

    Tensors made in inference mode do not tell that.
    """
    kept, now = packed.get(held[0]), versions(held)
    if (
        kept is None
        or (kept.form, kept.versions) != (form, now)
        or any(own() is not each for own, each in zip(kept.tensors, held, strict=True))
    ):
        names = weight_names(form.cell, form.weights, form.projected, form.biased)
        groups = [held[n : n + len(names)] for n in range(0, len(held), len(names))]
        panels = kernels().pack(form, [dict(zip(names, group, strict=True)) for group in groups])
        kept = packed[held[0]] = Packed(form, [TensorWeakRef(each) for each in held], now, panels)
    return kept.panels


def frozen_layer_fake(
    cell, weights, inputs, hidden, width, projected, biased, reverse, all_states, processor, x, hx, held, batch_sizes,
    resets, signals,
) -> list[Tensor]:  # fmt: skip
    """Shapes of `frozen_layer`."""
    other = (*x.shape[:-1], len(reverse), hidden) if all_states else (0,)
    return [
        x.new_empty((*x.shape[:-1], len(reverse), width)),
        *(x.new_empty(other) for _ in hx[1:]),
        *(x.new_empty(state.shape) for state in hx),
    ]


def frozen_layer_vmap(info, in_dims, *args):
    """Map `frozen_layer`: the mapped dimension joins the batch, as in `rnnfast.vmap`; or member by member."""
    *form, x, hx, held, batch_sizes, resets, signals = args
    dim, hx_dims, held_dims, *other_dims = in_dims[len(form) :]
    op, size, listed = getattr(torch.ops.rnnfast, NAME), info.batch_size, other_dims[2] or []
    hx_dims = hx_dims or [None] * len(hx)
    if other_dims[0] is not None or signals or any(each is not None for each in held_dims or ()):
        tensors = (x, *hx, *held, batch_sizes, resets, *signals)
        dims = (dim, *hx_dims, *(held_dims or [None] * len(held)), *other_dims[:2], *(listed or [None] * len(signals)))
        first, second = 1 + len(hx), 1 + len(hx) + len(held)

        def call(*given):
            sizes, flags, *rest = given[second:]
            return op(*form, given[0], list(given[1:first]), list(given[first:second]), sizes, flags, rest)

        results, found = each(call, size, tensors, dims)
        return list(results), list(found)
    at = x.dim() - (dim is not None) - 2
    sizes = None if batch_sizes is None else batch_sizes * size
    folded = [fold(each, own, size, 1) for each, own in zip(hx, hx_dims, strict=True)]
    flags = fold(resets, other_dims[1], size, 1)
    results = op(*form, fold(x, dim, size, at), folded, held, sizes, flags, [])
    ats = [None if each.shape == (0,) else 1 if n >= len(hx) else at for n, each in enumerate(results)]
    pairs = list(zip(results, ats, strict=True))
    return [r if a is None else unfold(r, size, a) for r, a in pairs], [None if a is None else a + 1 for a in ats]


library.impl(NAME, frozen_layer, "CPU")
torch.library.register_fake(f"rnnfast::{NAME}", frozen_layer_fake, lib=library)
torch.library.register_vmap(f"rnnfast::{NAME}", frozen_layer_vmap, lib=library)
