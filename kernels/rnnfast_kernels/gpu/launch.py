"""From a plan to a launch: which kernel, over which grid, with which arguments.

A launch is a value, so that one description serves to run it, to compile it without a device, and to test it.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import triton
from triton import knobs

from rnnfast_kernels.cells import CELLS
from rnnfast_kernels.gpu import TRITON
from rnnfast_kernels.gpu.activations import BOUND
from rnnfast_kernels.gpu.backward import backward_loop
from rnnfast_kernels.gpu.forward import forward_loop
from rnnfast_kernels.gpu.plan import Plan
from rnnfast_kernels.gpu.streamed import backward_step, forward_step, shifted_rows

# The place of a step's number among the arguments of its kernel.
STEP = 2
# Earlier ones call a compiled kernel with other arguments.
FIRST_TO_REPEAT = (3, 6)


class Extent(NamedTuple):
    """The sizes that a kernel takes at run time, so that none of them causes a compilation.

    reversals: bit d is set where direction d runs from the last step to the first.
    """

    T: int
    B: int
    D: int
    reversals: int


class Launch(NamedTuple):
    kernel: Any
    grid: tuple[int, ...]
    args: tuple
    options: dict[str, Any]

    def run(self) -> Any:
        """Run, and return the compiled kernel where there is one: the interpreter has none."""
        return self.kernel[self.grid](*self.args, **self.options)


def addresses(value: Any) -> Any:
    """The same arguments with addresses in place of tensors, which a launcher takes as well, and faster."""
    if isinstance(value, tuple):
        return tuple(map(addresses, value))
    return value.data_ptr() if hasattr(value, "data_ptr") else value


class Repeated:
    """A launch that is made again and again with another number of the step, which its kernel is not compiled for.

    The first goes through Triton, which looks at every argument for the kernel to run. The others run that kernel on
    the same stream, which takes the host a quarter of the time.
    """

    def __init__(self, launch: Launch) -> None:
        self.launch = launch
        self.before, self.after = launch.args[:STEP], launch.args[STEP + 1 :]
        self.runner: Callable | None = None

    def run(self, number: int) -> None:
        args = (*self.before, number, *self.after)
        if self.runner is not None:
            self.runner(*args)
            return
        compiled = self.launch._replace(args=args).run()
        if compiled is not None and TRITON >= FIRST_TO_REPEAT:
            active = triton.runtime.driver.active
            stream = active.get_current_stream(active.get_current_device())
            self.runner = partial(compiled[self.launch.grid], stream=stream)
            self.before, self.after = addresses(self.before), addresses(self.after)


def options(chosen: Plan) -> dict[str, Any]:
    """Compile and launch options. One stage: the pipeliner would move the loads of h ahead of the barrier."""
    if knobs.runtime.interpret:
        return {}
    found: dict[str, Any] = {"num_warps": chosen.warps, "num_stages": 1, "enable_fp_fusion": True}
    if chosen.registers:
        found["maxnreg"] = chosen.registers
    if chosen.loop == "cooperative":
        found["launch_cooperative_grid"] = True
    return found


def saved_tiles(cell: str, save: bool) -> int:
    return CELLS[cell].saved if save else 0


def form(cell: str, save: bool, signals: Sequence[Any] | None) -> tuple[int, ...]:
    """What a kernel is compiled for: gates, those with a recurrent part, saved tiles, states, parameters, signals, and
    by which of step, row and unit each signal differs, three bits each."""
    row, varying = CELLS[cell], 0
    for n, size in enumerate(size for signal in signals or () for size in signal.shape):
        varying |= (size > 1) << n
    counts = (row.gates, row.recurrent, saved_tiles(cell, save), len(row.states))
    return (*counts, len(row.parameters), len(row.signals), varying)


def loop(plan: Plan, cell: str, H: int, backward: bool, save: bool, tensors: NamedTuple, extent: Extent) -> Launch:
    """All T steps in one launch, by a resident or cooperative plan."""
    row = CELLS[cell]
    kernel: Callable = backward_loop if backward else forward_loop
    function = BOUND[cell].backward if backward else BOUND[cell].forward
    if plan.gluon:
        from rnnfast_kernels.gpu import gluon_backward, gluon_forward

        layer = (function, row.gates, saved_tiles(cell, save), len(row.states), H, plan.row, plan.precision)
        tile = (plan.block_b, plan.block_n, plan.chunks, plan.kept, plan.warps, plan.members, plan.polled)
        kernel = gluon_backward.backward_loop if backward else gluon_forward.forward_loop
        return Launch(kernel, (plan.programs,), (tensors, *extent, *layer, *tile), options(plan))
    args = (tensors, *extent, function, *form(cell, save, tensors.signals), H, plan.row, plan.k_last, plan.precision)
    args += (plan.block_b, plan.block_n, plan.block_k, plan.split, plan.chunks, plan.members)
    args += (plan.slices,) * backward
    return Launch(kernel, (plan.programs,), args, options(plan))


def step(
    plan: Plan, cell: str, H: int, backward: bool, save: bool, tensors: NamedTuple, carry: NamedTuple, extent: Extent
) -> Launch:  # fmt: skip
    """The first step to run, by a streamed plan; see STEP."""
    kernel: Callable = backward_step if backward else forward_step
    function = BOUND[cell].backward if backward else BOUND[cell].forward
    counts = form(cell, save, tensors.signals)
    grid = (triton.cdiv(H, plan.block_n), triton.cdiv(extent.B, plan.block_b), extent.D)
    args = (tensors, carry, 0, *extent, function, *counts, H, plan.block_b, plan.block_n)
    return Launch(kernel, grid, args, options(plan))


def steps(*described: Any) -> Repeated:
    """All steps, described as for `step`: run one after another, each with its number."""
    return Repeated(step(*described))


def shift(tensors: NamedTuple, result: Any, width: int, rows: int, towards: int, extent: Extent) -> Launch:
    """Every row's value one step earlier (towards = -1) or later (1) than its own."""
    block_b, block_n = max(16, triton.next_power_of_2(triton.cdiv(extent.B, 65535))), 64
    grid = (extent.T, triton.cdiv(extent.B, block_b), extent.D * triton.cdiv(width, block_n))
    chosen = Plan("streamed", block_b, block_n, 4)
    return Launch(
        shifted_rows, grid, (tensors, result, rows, *extent, width, towards, block_b, block_n), options(chosen)
    )
