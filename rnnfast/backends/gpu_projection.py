"""The projection of a layer's output, outside the time loop.

The loop runs over the unprojected output m with W_hh W_hr as its recurrent weights, and its own initial m is 0. What
h = W_hr m means for the states, the initial state and the gradients is large matrix products, before and after it.
T steps, B batch rows, H hidden units, P projection width, G gates, D directions, R rows of all steps together.
"""

import torch
from rnnfast_kernels.gpu.streamed import ShiftTensors
from torch import Tensor

from rnnfast.backends.gpu_launch import shift_rows
from rnnfast.backends.gpu_products import multiply
from rnnfast.backends.gpu_rows import LaidOutLayer


def projection(call: LaidOutLayer, d: int) -> Tensor:
    """W_hr of direction d, [P, H]."""
    w_hr = call.layer.weights[d].w_hr
    assert w_hr is not None
    return w_hr


def entry(call: LaidOutLayer, d: int) -> tuple[Tensor, Tensor]:
    """Where the initial state of direction d enters: row [B], and whether it does so, unerased by a reset [B, 1]."""
    step, row, runs = call.rows.starts(call.layer.reverse[d], call.layer.x.device)
    if call.layer.resets is not None:
        runs = runs & ~call.layer.resets[step, torch.arange(call.rows.B, device=step.device)]
    return row, runs[:, None]


def idle(call: LaidOutLayer, d: int) -> Tensor:
    """Which batch rows never run, so that they end with the initial state: [B, 1]."""
    return ~call.rows.starts(call.layer.reverse[d], call.layer.x.device)[2][:, None]


def loop_weights(call: LaidOutLayer) -> Tensor:
    """W_hh W_hr, multiplied in float32 at least: [D, G*H, H]."""
    dtype = call.layer.x.dtype
    wide = torch.promote_types(dtype, torch.float32)
    product = multiply if dtype == wide else torch.matmul
    products = [product(w.w_hh.to(wide), projection(call, d).to(wide)) for d, w in enumerate(call.layer.weights)]
    return torch.stack(products).to(dtype)


def add_initial(call: LaidOutLayer, gates: Tensor) -> None:
    """Add W_hh h0 to the gates of each row's first step."""
    by_row = call.by_row(gates).flatten(2)
    for d, weights in enumerate(call.layer.weights):
        row, enters = entry(call, d)
        part = multiply(call.layer.hx[0][d], weights.w_hh.t()).masked_fill(~enters, 0)
        by_row[:, d].index_add_(0, row, part)


def project(call: LaidOutLayer, output: Tensor, final: Tensor, states: Tensor) -> Tensor:
    """Fill `states` with h = W_hr m for every step, and return the final h."""
    finals = torch.empty_like(call.layer.hx[0])
    by_row, outputs = call.by_row(states), call.by_row(output)
    for d in range(call.D):
        w_hr = projection(call, d)
        by_row[:, d] = multiply(outputs[:, d], w_hr.t())
        finals[d] = torch.where(idle(call, d), call.layer.hx[0][d], multiply(final[d], w_hr.t()))
    return finals


def unproject(
    call: LaidOutLayer, dstates: Tensor | None, dfinals: Tensor | None
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients by m from those by h: of every step's, and of the final one."""
    dm, dm_final = None, None
    if dstates is not None:
        dm = call.new(call.D, call.H)
        by_row, sources = call.by_row(dm), call.by_row(dstates)
        for d in range(call.D):
            by_row[:, d] = multiply(sources[:, d], projection(call, d))
    if dfinals is not None:
        dm_final = torch.stack([multiply(dfinals[d], projection(call, d)) for d in range(call.D)])
    return dm, dm_final


def entering_gradient(call: LaidOutLayer, du: Tensor) -> Tensor:
    """Gradient by the h that entered each step, du W_hh: [R, D, P]."""
    by_row = call.by_row(du).flatten(2)
    return torch.stack([multiply(by_row[:, d], w.w_hh) for d, w in enumerate(call.layer.weights)], 1)


def initial_gradient(call: LaidOutLayer, dentering: Tensor, dfinals: Tensor | None) -> Tensor:
    """Gradient by h0: what entered each row's first step, or the final gradient of a row that never ran. [D, B, P]"""
    gradient = torch.zeros_like(call.layer.hx[0])
    for d in range(call.D):
        row, enters = entry(call, d)
        gradient[d] = torch.where(enters, dentering[row, d], 0)
        if dfinals is not None:
            gradient[d] = torch.where(idle(call, d), dfinals[d], gradient[d])
    return gradient


def leaving_gradient(call: LaidOutLayer, dentering: Tensor, dstates: Tensor | None, dfinals: Tensor | None) -> Tensor:
    """Gradient by the h that left each step, to the next one, to the output and to the final state: [D, R, P]."""
    tensors = ShiftTensors(dentering, dfinals, call.rows.count, call.rows.first, call.resets)
    result = dentering.new_zeros(call.D, call.rows.total, dentering.shape[-1])
    shift_rows(tensors, result, call.rows.total, 1, call.recurrence.extent)
    return result if dstates is None else result + call.by_row(dstates).transpose(0, 1)
