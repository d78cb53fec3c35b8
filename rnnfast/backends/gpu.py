"""The Triton backend: allocates, does the large matrix products with torch, and launches the time loops.

Dimensions: T steps, B batch rows, I input width, H hidden units, P projection width, G gates, C gates with a
recurrent part, S states, D directions, R rows of all steps together (T * B where the input is not packed).

A projection never enters the time loop. `W_hh (W_hr m)` is `(W_hh W_hr) m`, so the loop runs over the unprojected
output m with the product of the two weights, and the projected states are one large matrix product behind it. The
initial state, which is given in projected form, joins the input part of the gates at each row's first step.
"""

from collections.abc import Sequence
from contextlib import nullcontext

import torch
from rnnfast_kernels.cells import CELLS
from rnnfast_kernels.gpu.arguments import BackwardTensors, ForwardTensors
from rnnfast_kernels.gpu.streamed import ShiftTensors
from torch import Tensor
from triton import knobs

from rnnfast.backends import Gradients, Layer, Needs, Result, Weights
from rnnfast.backends import gpu_projection as projection
from rnnfast.backends.gpu_launch import loops, run_backward, run_forward, shift_rows
from rnnfast.backends.gpu_products import multiply, multiply_add
from rnnfast.backends.gpu_rows import LaidOutLayer, lay_out
from rnnfast.spec import cell_named, shown

TAKES_ENSEMBLES = False
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def unsupported(cell: str, device: torch.device, dtype: torch.dtype) -> str | None:
    """Say why this backend cannot run the case, or None where it can."""
    if device.type != "cuda" and not (device.type == "cpu" and knobs.runtime.interpret):
        return f"it needs a CUDA or ROCm device (or a CPU and TRITON_INTERPRET=1), not {device.type!r}"
    if dtype not in DTYPES:
        return f"it computes in float32, float64, bfloat16 and float16, not {dtype}"
    if cell not in CELLS:
        return f"it has no cell {shown(cell)!r}"
    if cell_named(cell).sets_numbers:
        return "it has no kernels for cells with a state that is a number"
    return None


def broken(cell: str, dtype: torch.dtype) -> None:
    """Kernels are compiled when they are launched: nothing is known before."""


def obtain(cell: str, dtype: torch.dtype, derivatives: int = 1) -> None:
    """Kernels are compiled when they are launched."""


def describe(cell: str, hidden: int, projection: int, device: torch.device, dtype: torch.dtype) -> str:
    """Name the loops of a layer with 16 batch rows."""
    forward, backward = loops(cell_named(cell), hidden, 16, torch.empty(0, dtype=dtype, device=device))
    named = f"Triton kernels of {shown(cell)}, forward {forward}, backward {backward} at a batch of 16"
    return named if cell_named(cell).standard else f"{named}; other derivatives and transforms by the plain loop"


def saved_like(layer: Layer) -> tuple[tuple[tuple[int, ...], torch.dtype], ...]:
    """Shapes of what `forward` saves: the activated gates, what a cell saves beyond them, the unprojected output."""
    cell, lead, D = layer.definition, layer.x.shape[:-1], len(layer.reverse)
    H = layer.weights[0].w_ih.shape[0] // cell.gates
    shapes: list[tuple[int, ...]] = []
    if cell.saved:
        shapes.append((*lead, D, cell.gates, H))
    if cell.saved > cell.gates:
        shapes.append((*lead, D, cell.saved - cell.gates, H))
    if layer.weights[0].w_hr is not None:
        shapes.append((*lead, D, H))
    return tuple((shape, layer.x.dtype) for shape in shapes)


def device_of(x: Tensor):
    return torch.cuda.device(x.device) if x.is_cuda else nullcontext()


def forward(layer: Layer, *, save: bool, all_states: bool) -> Result:
    """Run the layer."""
    call = lay_out(layer)
    x, cell = layer.x, call.cell
    with device_of(x):
        wanted = [s == 0 or save or all_states for s in range(len(layer.hx))]
        states = tuple(
            call.new(call.D, h.shape[-1]) if want else x.new_empty(0) for h, want in zip(layer.hx, wanted, strict=True)
        )
        gates = input_gates(call)
        extra = call.new(call.D, cell.saved - cell.gates, call.H) if save and cell.saved > cell.gates else None
        output = call.new(call.D, call.H) if call.projected else states[0]
        saved = (gates if cell.saved else None, extra, output if call.projected else None)
        kept = tuple(t for t in saved if t is not None) if save else ()
        if call.rows.total == 0:
            return Result(states, tuple(h.clone() for h in layer.hx), kept)
        if call.projected:
            projection.add_initial(call, gates)
        initial = call.initial()
        finals = tuple(torch.empty_like(h) for h in initial)
        tensors = ForwardTensors(
            gates=gates,
            extra=extra,
            w_hh=loop_weights(call),
            b_hh=stack_present([w.b_hh for w in layer.weights]),
            initial=initial,
            states=(output, *(s if want else None for s, want in zip(states[1:], wanted[1:], strict=True))),
            finals=finals,
            rows=call.rows.count,
            first=call.rows.first,
            resets=call.resets,
            exchange=None,
            counters=None,
            parameters=call.parameters(),
            signals=call.signals(),
        )
        run_forward(call.recurrence, tensors, save)
        if call.projected:
            finals = (projection.project(call, output, finals[0], states[0]), *finals[1:])
        return Result(states, finals, kept)


def stack_present(tensors: Sequence[Tensor | None]) -> Tensor | None:
    """One contiguous tensor with a leading dimension [D], without a copy for one direction; None for absent ones."""
    present = [t for t in tensors if t is not None]
    if not present:
        return None
    return present[0].contiguous().unsqueeze(0) if len(present) == 1 else torch.stack(present)


def loop_weights(call: LaidOutLayer) -> Tensor | None:
    """The recurrent weights of the time loop, [D, C*H, H]; None where no gate has a recurrent part."""
    return projection.loop_weights(call) if call.projected else stack_present([w.w_hh for w in call.layer.weights])


def input_weights(call: LaidOutLayer) -> Tensor:
    """W_ih of all directions, [D*G*H, I]."""
    weights = [w.w_ih for w in call.layer.weights]
    return weights[0] if len(weights) == 1 else torch.cat(weights)


def input_gates(call: LaidOutLayer) -> Tensor:
    """W_ih x + b_ih for all rows and directions: [*L, D, G, H]."""
    bias = stack_present([w.b_ih for w in call.layer.weights])
    gates = multiply_add(None if bias is None else bias.view(-1), call.input_rows(), input_weights(call).t())
    return gates.view(*call.layer.x.shape[:-1], call.D, call.cell.gates, call.H)


def backward(
    layer: Layer,
    states: tuple[Tensor, ...],
    saved: tuple[Tensor, ...],
    dstates: tuple[Tensor | None, ...],
    dfinals: tuple[Tensor | None, ...],
    needs: Needs,
    groups: int = 1,
) -> Gradients:
    """Differentiate the layer: the loop in reverse, then every other gradient as large matrix products."""
    call = lay_out(layer)
    with device_of(layer.x):
        states, saved = tuple(t.contiguous() for t in states), tuple(t.contiguous() for t in saved)
        dstates = tuple(None if t is None else t.contiguous() for t in dstates)
        dfinals = tuple(None if t is None else t.contiguous() for t in dfinals)
        dx = call.new(call.D, call.cell.gates, call.H)
        du = dx if call.cell.one_gradient else call.new(call.D, call.cell.recurrent, call.H)
        given = dgiven(call, needs)
        if call.rows.total == 0:
            dhx = tuple(torch.zeros_like(h) if t is None else t.clone() for h, t in zip(layer.hx, dfinals, strict=True))
        else:
            dhx = run_loop(call, states, saved, dstates, dfinals, dx, du, *given)
        dleaving = None
        if call.projected and call.rows.total > 0:
            dentering = projection.entering_gradient(call, du)
            dhx = (projection.initial_gradient(call, dentering, dfinals[0]), *dhx[1:])
            dleaving = projection.leaving_gradient(call, dentering, dstates[0], dfinals[0])
        return Gradients(
            input_gradient(call, dx) if needs.x else None,
            dhx if needs.hx else (None,) * len(dhx),
            weight_gradients(call, states[0], saved, dx, du, given[0], dleaving, groups)
            if needs.weights
            else no_weights(layer),
            signal_gradients(call, given[1]),
        )


def dgiven(call: LaidOutLayer, needs: Needs) -> tuple[Tensor | None, Tensor | None]:
    """Room for the gradients by parameters, summed over the steps of each row, [D, B, P, H], and by signals at each
    step, [*L, D, N, H], both in the compute type; None for those that there are not or that are not asked for."""
    cell, rows, like = call.cell, call.rows, call.layer.x
    wide = torch.promote_types(like.dtype, torch.float32)
    dparameters = dsignals = None
    if cell.parameters:
        dparameters = like.new_zeros(call.D, rows.B, len(cell.parameters), call.H, dtype=wide)
    if cell.signals and needs.signals:
        dsignals = like.new_zeros(*like.shape[:-1], call.D, len(cell.signals), call.H, dtype=wide)
    return dparameters, dsignals


def run_loop(
    call: LaidOutLayer, states, saved, dstates, dfinals, dx: Tensor, du: Tensor, dparameters=None, dsignals=None
) -> tuple[Tensor, ...]:
    """Fill dx, du and the other gradients given, and return those by the initial states of the loop."""
    cell, layer = call.cell, call.layer
    if call.projected:
        dstates0, dfinals0 = projection.unproject(call, dstates[0], dfinals[0])
        dstates, dfinals, states = (dstates0, *dstates[1:]), (dfinals0, *dfinals[1:]), (saved[-1], *states[1:])
    dinitial = tuple(layer.x.new_empty(call.D, call.rows.B, call.H) for _ in states)
    tensors = BackwardTensors(
        gates=saved[0] if cell.saved else None,
        extra=saved[1] if cell.saved > cell.gates else None,
        w_hh=loop_weights(call),
        initial=call.initial(),
        states=states,
        dstates=dstates,
        dfinals=dfinals,
        dx=dx,
        du=None if cell.one_gradient or cell.recurrent == 0 else du,
        dinitial=dinitial,
        rows=call.rows.count,
        first=call.rows.first,
        resets=call.resets,
        exchange=None,
        counters=None,
        parts=None,
        parameters=call.parameters(),
        signals=call.signals(),
        dparameters=dparameters,
        dsignals=dsignals,
    )
    run_backward(call.recurrence, tensors)
    return dinitial


def input_gradient(call: LaidOutLayer, dx: Tensor) -> Tensor:
    """Gradient by x, summed over directions."""
    return multiply(call.by_row(dx).flatten(1), input_weights(call)).view(call.layer.x.shape)


def no_weights(layer: Layer) -> tuple[Weights, ...]:
    return (Weights(None),) * len(layer.reverse)


def weight_gradients(
    call: LaidOutLayer, h: Tensor, saved: tuple[Tensor, ...], dx, du, dparameters, dleaving: Tensor | None, groups: int
) -> tuple[Weights, ...]:
    """Gradients by the weights of each direction: products over the rows of all steps, accumulated in float32."""
    x = call.input_rows()
    entering = x.new_zeros(call.D, call.rows.total, h.shape[-1]) if call.cell.recurrent else None
    if call.rows.total and entering is not None:
        edge = call.layer.hx[0].contiguous()
        tensors = ShiftTensors(h, edge, call.rows.count, call.rows.first, call.resets)
        shift_rows(tensors, entering, call.rows.total, -1, call.recurrence.extent)
    dx, du = call.by_row(dx).flatten(2), call.by_row(du).flatten(2)  # [R, D, G*H]
    return tuple(
        Weights(
            rows_product(dx[:, d], x, groups),
            None if entering is None else rows_product(du[:, d], entering[d], groups),
            None if w.b_ih is None else rows_sum(dx[:, d], groups),
            None if w.b_hh is None else rows_sum(du[:, d], groups),
            projection_gradient(call, d, dleaving, saved, groups),
            None if dparameters is None else rows_sum(dparameters[d], groups).to(x.dtype),
        )
        for d, w in enumerate(call.layer.weights)
    )


def projection_gradient(call: LaidOutLayer, d: int, dleaving: Tensor | None, saved: tuple[Tensor, ...], groups: int):
    """Gradient by W_hr, from that by the projected output and from the output before its projection."""
    if not call.projected:
        return None
    output = call.by_row(saved[-1])[:, d]
    return rows_product(
        output.new_zeros(0, call.layer.hx[0].shape[-1]) if dleaving is None else dleaving[d], output, groups
    )


def signal_gradients(call: LaidOutLayer, dsignals: Tensor | None) -> tuple[Tensor | None, ...]:
    """Gradients by the signals, summed over directions and over what a signal is broadcast in."""
    signals = call.layer.signals
    if dsignals is None:
        return (None,) * len(signals)
    total = dsignals.sum(-3)  # [*L, N, H]
    if call.layer.x.dim() == 2:
        total = call.padded(total)
    found = zip(total.unbind(-2), signals, strict=True)
    return tuple(each.sum_to_size(signal.shape).to(signal.dtype).contiguous() for each, signal in found)


def rows_product(a: Tensor, b: Tensor, groups: int) -> Tensor:
    """a^T b over all rows, [M, N]; with more than one group, over the rows r of each r % groups, [groups, M, N]."""
    if groups == 1:
        return multiply(a.t(), b)
    a, b = a.unflatten(0, (-1, groups)), b.unflatten(0, (-1, groups))
    return multiply(a.permute(1, 2, 0), b.transpose(0, 1))


def rows_sum(a: Tensor, groups: int) -> Tensor:
    """The sum over all rows, [M], or over the rows of each group, [groups, M]."""
    if groups > 1:
        a = a.unflatten(0, (-1, groups))
    return a.sum(0, dtype=torch.promote_types(a.dtype, torch.float32)).to(a.dtype)
