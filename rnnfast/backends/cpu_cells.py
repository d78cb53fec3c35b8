"""Layers of declared cells by the Numba kernels: any number of states, parameters, signals, recurrent gates."""

import torch
from rnnfast_kernels.cells import CELLS
from rnnfast_kernels.cpu import plan_backward, plan_forward, pool
from rnnfast_kernels.cpu.compiled import kernel
from rnnfast_kernels.cpu.recipe import Recipe
from torch import Tensor

from rnnfast.backends import cpu
from rnnfast.backends.cpu_jobs import WIDER, room, row_cuts, shape_of
from rnnfast.backends.recurrence import CellWeights, Outcome, Recurrence

# Values of that many gates are in registers at once, and code grows with them.
MOST_GATES = 24
NAMES = ("w_ih", "w_hh", "b_ih", "b_hh", "parameters")


def unsupported(cell: str, device: torch.device, dtype: torch.dtype) -> str | None:
    """Say why the kernels cannot run a declared cell, or None where they can."""
    row = CELLS[cell]
    if row.gates == 0:
        return "the numba backend has no kernels for cells without gates"
    problem = cpu.unsupported_case(device, dtype)
    if problem is None and row.gates > MOST_GATES:
        return f"the numba backend has no kernels for cells of more than {MOST_GATES} gates, got {row.gates}"
    return problem or cpu.broken(cell, dtype)


class Call:
    """A layer's tensors, contiguous where kernels want them so, by the names of their bases; and its shape."""

    def __init__(self, layer: Recurrence):
        x = layer.x
        self.layer, self.cell = layer, CELLS[layer.cell]
        self.x = x = x if x.shape[-1] == 1 or x.stride(-1) == 1 else x.contiguous()
        self.h, self.extra = layer.h.contiguous(), layer.extra.contiguous()
        self.bases: dict[str, Tensor | int | None] = {"x": x, "h_first": self.h, "extra_first": self.extra}
        for d, weights in enumerate(layer.weights):
            for name, weight in zip(NAMES, weights, strict=True):
                self.bases[f"{name}{d}"] = None if weight is None else weight.contiguous()
        self.sizes = self.starts = None
        if layer.batch_sizes is not None:
            self.sizes = layer.batch_sizes.contiguous()
            self.starts = None if x.dim() == 3 else self.sizes.cumsum(0) - self.sizes
        self.bases |= {"sizes": self.sizes, "starts": self.starts}
        self.bases["resets"] = None if layer.resets is None else layer.resets.contiguous()
        for n, signal in enumerate(layer.signals):
            self.bases |= places_of(f"signal{n}", signal)
        self.biased = layer.weights[0].b_ih is not None
        threads = pool.usable(torch.get_num_threads())
        cuts = None
        if self.sizes is not None and threads > 1:
            cuts = row_cuts(self.sizes, self.h.shape[1], -(-threads // len(layer.reverse)))
        self.shape = shape_of(
            layer.cell,
            x.dtype,
            x.shape,
            x.stride(),
            1,
            self.h.shape,
            layer.weights[0].w_ih.shape[0],
            layer.reverse,
            False,
            self.sizes is None and layer.resets is None,
            None if self.starts is None else self.starts.shape[0],
            threads,
            cuts,
            repeated=True,
        )
        self.lead = (*x.shape[:-1], len(layer.reverse))
        self.wider = WIDER.get(x.dtype, x.dtype)
        self.kernel = kernel(layer.cell, self.shape.dtype)

    def run(self, recipe: Recipe, results: dict[str, Tensor | None]) -> None:
        """Run a recipe over the layer's tensors and these."""
        scratch = room(self.x, recipe.scratch, dtype=torch.uint8)
        bases = self.bases | results
        addresses = [address_of(bases.get(name)) for name in recipe.named]
        recipe.call(self.kernel, scratch.data_ptr(), addresses)

    def saves(self) -> tuple[int, ...]:
        """Return the shape of what forward keeps beside the states."""
        return (*self.lead, self.cell.kept * self.shape.hidden) if self.cell.saved else (0,)


def places_of(name: str, signal: Tensor) -> dict[str, Tensor | int]:
    """Return the bases of a signal: its address and its strides, 0 along dimensions of size 1."""
    signal = signal if signal.shape[-1] == 1 or signal.stride(-1) in (0, 1) else signal.contiguous()
    item = signal.element_size()
    by_step, by_row, by_unit = (
        stride * item if size > 1 else 0 for size, stride in zip(signal.shape, signal.stride(), strict=True)
    )
    return {name: signal, f"{name}_step": by_step, f"{name}_row": by_row, f"{name}_unit": by_unit}


def address_of(base: Tensor | int | None) -> int:
    """Return the address of a tensor, or a number as it is."""
    if base is None:
        return 0
    return base if isinstance(base, int) else base.data_ptr()


def forward(layer: Recurrence, *, save: bool, all_states: bool) -> tuple[Outcome, Tensor]:
    """Run the layer. Returns its states and what backward wants beside them, empty if nothing.

    The states beside h are empty unless `save` or `all_states` asks for them.
    """
    call = Call(layer)
    x, hidden = call.x, call.shape.hidden
    # The kernels leave what they save of padding as it is; zeros keep the results of equal calls equal.
    padded = call.sizes is not None and call.starts is None
    kept: dict[str, Tensor | None] = {}
    extra = layer.extra.shape[0]
    if extra and (save or all_states):
        kept["extra"] = room(x, extra, *call.lead, hidden)
    if save and call.cell.saved:
        shape = call.saves()
        kept["gates"] = x.new_zeros(shape, dtype=call.wider) if padded else room(x, *shape, dtype=call.wider)
    h = room(x, *call.lead, hidden)
    finals = torch.empty_like(call.h), torch.empty_like(call.extra)
    outputs = {"h": h, **kept, "h_final": finals[0], "extra_final": finals[1]}
    call.run(plan_forward.forward(call.shape, call.biased, tuple(kept)), outputs)
    states = kept.get("extra")
    states = x.new_empty(extra, 0) if states is None else states
    gates = kept.get("gates")
    return Outcome(h, states, *finals), x.new_empty(0, dtype=call.wider) if gates is None else gates


def backward(
    layer: Recurrence,
    h: Tensor,
    extra: Tensor,
    saved: Tensor,
    gradients: Outcome,
    need_x: bool,
    need_hx: bool,
    need_weights: bool,
    need_signals: bool,
) -> tuple[Tensor | None, Tensor | None, Tensor | None, list[CellWeights], list[Tensor]]:
    """Differentiate the layer: gradients of x, h, extra, the weights and the signals.

    gradients: by each entry of the outcome, None for 0. Those of signals are [*L, D, H].
    """
    call = Call(layer)
    x, hidden, cell = call.x, call.shape.hidden, call.cell
    kept = {"extra": extra.contiguous()} if layer.extra.shape[0] else {}
    kept |= {"gates": saved.contiguous()} if cell.saved else {}
    names = ("dh", "dextra", "dh_final", "dextra_final")
    given = {
        name: each.contiguous()
        for name, each in zip(names, gradients, strict=True)
        if each is not None and each.numel() and (each.dim() > 2)
    }
    dh_first = torch.empty_like(call.h) if need_hx else None
    dextra_first = torch.empty_like(call.extra) if need_hx else None
    dx = room(x, *x.shape, dtype=call.wider) if need_x else None
    dsignals = None
    if need_signals:
        shape = (*call.lead, len(cell.signals) * hidden)
        dsignals = x.new_zeros(shape, dtype=call.wider)
    tensors = {"h": h.contiguous(), **kept, **given, "dx": dx, "dh_first": dh_first, "dextra_first": dextra_first}
    tensors["dsignals"] = dsignals
    found = []
    for d, weights in enumerate(layer.weights):
        shapes = [each.shape if each is not None and need_weights else None for each in weights]
        made = [None if shape is None else x.new_empty(shape, dtype=call.wider) for shape in shapes]
        tensors |= {f"d{name}{d}": each for name, each in zip(NAMES, made, strict=True)}
        found.append(CellWeights._make(made))
    wanted = (*given, "dsignals") if need_signals else tuple(given)
    recipe = plan_backward.backward(call.shape, tuple(kept), wanted, need_x, need_hx, need_weights, 1, call.biased)
    call.run(recipe, tensors)
    by_signal = [] if dsignals is None else [each.to(x.dtype) for each in dsignals.split(hidden, -1)]
    if call.wider != x.dtype:
        dx = None if dx is None else dx.to(x.dtype)
        found = [CellWeights._make(each if each is None else each.to(x.dtype) for each in w) for w in found]
    return dx, dh_first, dextra_first, found, by_signal
