"""Single steps with everything laid out beforehand: packed weights, records and buffers that stay from call to call."""

from collections.abc import Callable, Sequence

import torch
from rnnfast_kernels.cpu import plan, tasks
from rnnfast_kernels.cpu.recipe import SCRATCH

from rnnfast.backends import Layer
from rnnfast.backends.cpu_jobs import Call


class LayerSteps:
    """One layer of a stream. Its final states are written where its initial states are read.

    layer: x is [1, B, I], and x and hx are contiguous buffers that the caller keeps. output: [1, B, D, P], likewise.
    """

    def __init__(self, layer: Layer, output: torch.Tensor):
        self.call = call = Call(layer)
        recipe = plan.forward(call.shape, call.biased, ())
        self.scratch = torch.empty(recipe.scratch, dtype=torch.uint8)
        states = dict(zip(("h_final", "extra_final"), call.hx, strict=False))
        addresses = call.addresses({"h": output, **states}) | {SCRATCH: self.scratch.data_ptr()}
        self.records = recipe.fill(addresses)
        start = self.records.__array_interface__["data"][0]
        jobs = [(phase.task, start + offset) for phase in recipe.phases for offset in phase.records]
        for task, address in jobs:
            if task == tasks.PACK_WEIGHT:
                call.kernel(task, address)
        self.jobs = [(call.kernel, task, address) for task, address in jobs if task != tasks.PACK_WEIGHT]


def stepper(layers: Sequence[tuple[Layer, torch.Tensor]]) -> Callable[[], None]:
    """Return a function that runs one step of layers stacked on one another's buffers."""
    steps = [LayerSteps(layer, output) for layer, output in layers]
    jobs = [job for each in steps for job in each.jobs]

    def step(_kept=steps) -> None:
        for kernel, task, address in jobs:
            kernel(task, address)

    return step
