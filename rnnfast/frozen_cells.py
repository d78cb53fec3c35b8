"""Layers of declared cells whose weights are frozen."""

import re
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx import Proxy

from rnnfast.call import Call
from rnnfast.frozen import Frozen, Shaped
from rnnfast.modules import leaf
from rnnfast.recurrent import Recurrent
from rnnfast.states_and_signals import in_loop_layout, in_user_order


class FrozenRecurrent(Frozen, Recurrent):
    """A frozen `rnnfast.Recurrent`: `forward` takes the same calls, for inference in float32."""

    proj_size = 0

    def forward(self, input, hx=None, *, signals=None, lengths=None, resets=None, all_states=False):
        """Run the layers over `input`; arguments and results are those of `rnnfast.Recurrent.forward`.

        Raises:
            RuntimeError: in training mode, or where a gradient would be taken. ValueError, RuntimeError, TypeError: as
                by a layer that is not frozen.
        """
        if isinstance(input, Proxy):
            return leaf(self, input, hx, signals=signals, lengths=lengths, resets=resets, all_states=all_states)
        cell = self.cell
        laid_out: tuple[Tensor, ...] = ()
        if hx is not None or signals or cell.signals or torch.compiler.is_compiling():
            like = self.like_weights()
            hx, laid_out = in_loop_layout(cell, self.options(), input, like, hx, signals)
        result = None
        if lengths is None and resets is None and not all_states and not cell.signals:
            result = self.run_prepared(input, hx)
        if result is None:
            result = self.run(input, hx, lengths, resets, all_states, laid_out)
        return in_user_order(cell, *result)

    def states_of(self, hx) -> tuple[Tensor, ...] | None:
        return (hx,) if isinstance(hx, Tensor) else tuple(hx)

    @property
    def cell_name(self) -> str:
        return self.cell.identity

    def type_name(self) -> str:
        return "FrozenRecurrent"

    def extra_repr(self) -> str:
        return f"{Recurrent.extra_repr(self).removesuffix(', rnnfast')}, weights={self.weights_format}"

    def is_weight(self, name: str) -> bool:
        stem = re.sub(r"_l\d+(_reverse)?$", "", name)
        return super().is_weight(name) or (stem != name and stem in self.cell.parameters)

    def like_weights(self) -> list[Any]:
        shapes = (shape for _, inputs in self.places() for shape in self.shapes(inputs).values())
        return [Shaped(shape, torch.float32, torch.device("cpu")) for shape in shapes]

    def reset_parameters(self) -> None:
        """Refuse to change weights."""
        raise RuntimeError(f"{self.type_name()}: its weights are frozen; change the layer before rnnfast.freeze")

    def stepper(self, x: Tensor, output: Tensor, states: Sequence[Tensor]) -> Callable[[], None]:
        if self.form().stacks:
            return super().stepper(x, output, states)
        options, shown = self.options()._replace(batch_first=False), self.cell.kernel.output

        def run() -> None:
            outcome = self.run_layers(Call(options, x, tuple(states), (), all_states=shown > 0))
            output.copy_(outcome.output[0])
            for own, final in zip(states, outcome.finals, strict=True):
                own.copy_(final)

        return run
