"""Single steps with everything laid out beforehand: packed weights, records and buffers that stay from call to call."""

from collections.abc import Callable, Sequence

import torch
from rnnfast_kernels.cpu import plan

from rnnfast.backends import Layer
from rnnfast.backends.cpu_jobs import Call


class LayerSteps:
    """One layer of a stream. Its final states are written where its initial states are read.

    layer: x is [1, B, I], and x and hx are contiguous buffers that the caller keeps. output: [1, B, D, P], likewise.
    """

    def __init__(self, layer: Layer, output: torch.Tensor):
        self.call = call = Call(layer, threads=1)
        self.recipe = plan.forward(call.shape, call.biased, ())
        states = dict(zip(("h_final", "extra_final"), call.hx, strict=False))
        self.records, self.scratch = call.lay_out(self.recipe, {"h": output, **states})
        self.recipe.run(call.kernel, self.records, self.recipe.preparation)

    def step(self) -> None:
        """Run one step."""
        self.recipe.run(self.call.kernel, self.records, self.recipe.repeated)


def stepper(layers: Sequence[tuple[Layer, torch.Tensor]]) -> Callable[[], None]:
    """Return a function that runs one step of layers stacked on one another's buffers."""
    steps = [LayerSteps(layer, output) for layer, output in layers]
    if len(steps) == 1:
        return steps[0].step

    def step() -> None:
        for each in steps:
            each.step()

    return step
