"""Run a time loop on a GPU: choose its plan, give it a workspace, launch it, or step through it.

Dimensions: T steps, B batch rows, H hidden units, C gates with a recurrent part, S states, D directions.
"""

from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from rnnfast_kernels.cells import Cell
from rnnfast_kernels.gpu import launch, plan
from rnnfast_kernels.gpu.arguments import BackwardTensors, ForwardTensors
from rnnfast_kernels.gpu.barrier import COUNTER_STRIDE, MOST_ARRIVALS
from rnnfast_kernels.gpu.launch import Extent
from rnnfast_kernels.gpu.streamed import BackwardCarry, ForwardCarry, ShiftTensors
from rnnfast_kernels.warn import warn_user
from torch import Tensor
from triton.runtime.errors import OutOfResources

from rnnfast.backends import gpu_products

# One processor: the interpreter runs programs one after another, so none may wait for another.
INTERPRETER = plan.Device("sm_90", 1, 232448)
# Bytes: the widest access, for which Triton compiles where every address allows it.
ALIGNMENT = 16
# What drivers say where a launch asks for too much: more programs at once than fit, more of a processor than it has, or
# programs that wait for each other on a device that cannot hold them.
REFUSALS = (
    "too many blocks in cooperative launch",
    "cooperative launch too large",
    "too many resources requested for launch",
    "out of resources",
    "operation not supported",
)


@dataclass(frozen=True)
class Recurrence:
    """What runs: the cell, its width and its extent."""

    cell: Cell
    H: int
    extent: Extent


@cache
def device_properties(device: torch.device) -> plan.Device:
    """What plans need to know of a device."""
    if device.type == "cpu":
        return INTERPRETER
    found = torch.cuda.get_device_properties(device)
    if torch.version.hip:
        arch = found.gcnArchName.split(":")[0]
        return plan.Device(arch, found.multi_processor_count, 65536, found.warp_size)
    shared: int = found.shared_memory_per_block_optin  # type: ignore[attr-defined]
    return plan.Device(f"sm_{found.major}{found.minor}", found.multi_processor_count, shared)


def make_problem(recurrence: Recurrence, like: Tensor, backward: bool) -> plan.Problem:
    """Describe one pass over tensors like `like` to the planner."""
    nvidia = like.is_cuda and not torch.version.hip
    precision = "tf32" if nvidia and like.dtype == torch.float32 and gpu_products.tf32_wanted() else "ieee"
    cell, extent, dtype = recurrence.cell.name, recurrence.extent, str(like.dtype).removeprefix("torch.")
    device = device_properties(like.device)
    return plan.Problem(cell, recurrence.H, extent.B, extent.D, dtype, precision, backward, device)


def loops(cell: Cell, H: int, B: int, like: Tensor) -> list[str]:
    """The loops of forward and of backward, by name: those written in Gluon, or one of Triton's."""
    recurrence = Recurrence(cell, H, Extent(1, B, 1, 0))
    chosen = [plan.choose(make_problem(recurrence, like, backward)) for backward in (False, True)]
    return ["in Gluon" if each.gluon else each.loop for each in chosen]


def run_forward(recurrence: Recurrence, tensors: ForwardTensors, save: bool) -> None:
    """Run the forward loop: fills states, finals and what is saved."""
    like = tensors.w_hh if recurrence.cell.recurrent else tensors.gates
    problem, tensors = make_problem(recurrence, like, False), align(tensors)
    chosen = plan.choose(problem)
    if not holds(chosen, recurrence.extent) or not run_fused(chosen, recurrence, tensors, False, save):
        stream_forward(plan.streamed(problem), recurrence, tensors, save)


def run_backward(recurrence: Recurrence, tensors: BackwardTensors) -> None:
    """Run the backward loop: fills dx, du and dinitial."""
    like = tensors.w_hh if recurrence.cell.recurrent else tensors.dx
    problem, tensors = make_problem(recurrence, like, True), align(tensors)
    chosen = plan.choose(problem)
    if not holds(chosen, recurrence.extent) or not run_fused(chosen, recurrence, tensors, True, True):
        stream_backward(plan.streamed(problem), recurrence, tensors)


def holds(chosen: plan.Plan, extent: Extent) -> bool:
    """Whether all steps can run in one launch: the loop is resident, or cooperative and T fits its int32 counters."""
    return chosen.loop == "resident" or (
        chosen.loop == "cooperative" and (extent.T + 1) * chosen.members <= MOST_ARRIVALS
    )


def align(tensors: Any) -> Any:
    """The same tensors, those copied that a pass reads and that do not begin at a multiple of 16 bytes.

    Such a one would have a kernel of its own compiled, with narrow accesses, and is a view of something larger.
    """
    read = {name: aligned(getattr(tensors, name)) for name in tensors.read if getattr(tensors, name) is not None}
    return tensors._replace(**read)


def aligned(value: Any) -> Any:
    if isinstance(value, tuple):
        return tuple(aligned(entry) for entry in value)
    return value if value is None or value.data_ptr() % ALIGNMENT == 0 else value.clone()


def run_fused(chosen: plan.Plan, recurrence: Recurrence, tensors: Any, backward: bool, save: bool) -> bool:
    """Run all steps in one launch; return False, with nothing run, where the device refuses to hold its programs."""
    if recurrence.cell.recurrent:
        tensors = tensors._replace(w_hh=arrange(tensors.w_hh, recurrence, chosen, backward))
    if chosen.loop == "cooperative":
        tensors = tensors._replace(**workspace(chosen, recurrence, backward, tensors.w_hh))
    described = launch.loop(chosen, recurrence.cell.name, recurrence.H, backward, save, tensors, recurrence.extent)
    try:
        described.run()
    except (RuntimeError, OutOfResources) as error:
        if chosen.loop != "cooperative" or not is_refusal(error):
            raise
        warn_refused(str(error))
        return False
    return True


def is_refusal(error: Exception) -> bool:
    """Whether a launch failed, with nothing run, because its programs do not fit the device, all at once or at all.

    Neither a failure to compile is one, nor an error that an earlier kernel left and that all later calls repeat.
    """
    said = str(error)
    by_driver = said.startswith("Triton Error [") and any(reason in said for reason in REFUSALS)
    return isinstance(error, OutOfResources) or by_driver


def arrange(w_hh: Tensor, recurrence: Recurrence, chosen: plan.Plan, backward: bool) -> Tensor:
    """The recurrent weights as a fused loop reads them: [D, C, H, row], padded with 0; the contracted index is last, or
    the one before where the plan says so."""
    D, H = w_hh.shape[0], recurrence.H
    weights = w_hh.view(D, recurrence.cell.recurrent, H, H)
    weights = weights.transpose(2, 3) if backward == chosen.k_last else weights
    return (weights if chosen.row == H else torch.nn.functional.pad(weights, (0, chosen.row - H))).contiguous()


@cache
def warn_refused(reason: str) -> None:
    """Warn, once per reason, that the driver refused a cooperative launch, so that nothing has run yet."""
    warn_user(
        f"the device refused a cooperative launch ({reason}); the layer runs step by step instead, which is slower"
    )


def workspace(chosen: plan.Plan, recurrence: Recurrence, backward: bool, like: Tensor) -> dict[str, Tensor]:
    """The zeroed counters and exchange buffers of a cooperative loop, from one allocation."""
    if chosen.gluon:
        return gluon_workspace(chosen, recurrence.cell.gates if backward else 1, like)
    groups, slices, rows = chosen.programs // chosen.members, chosen.slices, chosen.block_b
    barriers = groups * (1 if slices == 1 else slices + chosen.columns)
    entries = recurrence.cell.recurrent if backward else 1
    shapes = {
        "counters": (torch.int32, (barriers, COUNTER_STRIDE.value)),
        "exchange": (like.dtype, (2, groups, slices, rows, entries, chosen.width)),
    }
    if slices > 1:
        shapes["parts"] = (torch.float32, (2, chosen.programs, slices, rows, chosen.block_n))
    sizes = [torch.Size(shape).numel() * dtype.itemsize for dtype, shape in shapes.values()]
    memory = torch.zeros(sum(sizes), dtype=torch.uint8, device=like.device).split(sizes)
    return {name: part.view(shapes[name][0]).view(shapes[name][1]) for name, part in zip(shapes, memory, strict=True)}


def gluon_workspace(chosen: plan.Plan, tiles: int, like: Tensor) -> dict[str, Tensor]:
    """The counters and exchange buffers of a Gluon loop that exchanges some tiles at once; see `gluon_exchange`."""
    groups, words = chosen.programs // chosen.members, chosen.width * like.itemsize // 4
    counters = torch.zeros(groups, COUNTER_STRIDE.value, dtype=torch.int32, device=like.device)
    shape = (4 if chosen.polled else 2, groups, chosen.block_b // 2, tiles, words // 8, 4, 2, 2)
    exchange = torch.full(shape, -1 if chosen.polled else 0, dtype=torch.int32, device=like.device)
    if chosen.polled:
        # Words of units that no program has: nobody publishes them, and nobody waits for them.
        full, half = divmod(chosen.members * chosen.block_n * like.itemsize // 16, 2)
        exchange[..., full + half :, :, :, :] = 0
        exchange[..., full : full + half, :, 1, :] = 0
    return {"counters": counters, "exchange": exchange}


def operand_dtype(like: Tensor) -> torch.dtype:
    """The dtype of the operands of a step's product, whose result is in the compute type.

    torch multiplies half-precision matrices into float32 on CUDA since 2.8; elsewhere the operands are converted.
    """
    direct = like.is_cuda and "dtype_out" in torch.ops.aten.bmm.overloads()
    return like.dtype if direct else compute_dtype(like)


def compute_dtype(like: Tensor) -> torch.dtype:
    return torch.promote_types(like.dtype, torch.float32)


def multiply(a: Tensor, b: Tensor, result: Tensor, own: bool | None = None) -> None:
    """result = a @ b for each direction, in the dtype of the result; see `gpu_products.multiply`."""
    if a.dtype == result.dtype:
        gpu_products.multiply(a, b, result, own)
    else:
        torch.bmm(a, b, out_dtype=result.dtype, out=result)


def stream_forward(chosen: plan.Plan, recurrence: Recurrence, tensors: ForwardTensors, save: bool) -> None:
    """Run the forward loop step by step."""
    (T, B, D, _), cell, H, like = recurrence.extent, recurrence.cell, recurrence.H, tensors.w_hh
    weights = like.to(operand_dtype(like)).transpose(1, 2)  # [D, H, C*H]
    state = tuple(t.to(compute_dtype(like), copy=True) for t in tensors.initial)
    carry = ForwardCarry(state[0].new_empty(D, B, cell.recurrent * H), state, tensors.initial[0].to(weights, copy=True))
    steps = launch.steps(chosen, cell.name, H, False, save, tensors, carry, recurrence.extent)
    own = gpu_products.differs(weights)
    for k in range(T):
        multiply(carry.h, weights, carry.u, own)
        steps.run(k)
    for final, value in zip(tensors.finals, state, strict=True):
        final.copy_(value)


def stream_backward(chosen: plan.Plan, recurrence: Recurrence, tensors: BackwardTensors) -> None:
    """Run the backward loop step by step."""
    (T, B, D, _), cell, H, like = recurrence.extent, recurrence.cell, recurrence.H, tensors.w_hh
    weights = like.to(operand_dtype(like))  # [D, C*H, H]
    zeros = torch.zeros(D, B, H, dtype=compute_dtype(like), device=like.device)
    dstate = tuple(zeros.clone() if t is None else t.to(zeros, copy=True) for t in tensors.dfinals)
    carry = BackwardCarry(zeros, dstate, weights.new_empty(D, B, cell.recurrent * H), tensors.dparameters)
    steps = launch.steps(chosen, cell.name, H, True, True, tensors, carry, recurrence.extent)
    own = gpu_products.differs(weights)
    for k in range(T):
        steps.run(k)
        multiply(carry.du, weights, carry.dh, own)
    dstate[0].add_(carry.dh)
    for result, value in zip(tensors.dinitial, dstate, strict=True):
        result.copy_(value)


def shift_rows(tensors: ShiftTensors, result: Tensor, rows: int, towards: int, extent: Extent) -> Tensor:
    """Fill result [D, R, width] with every row's value one step earlier (towards = -1) or later (1)."""
    launch.shift(align(tensors), result, result.shape[-1], rows, towards, extent).run()
    return result
