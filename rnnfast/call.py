"""A validated call of a stack of layers, and what it returns."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

from torch import Tensor

from rnnfast.spec import Options, States


class Call(NamedTuple):
    """A validated call in the layout of `rnnfast.spec.Layer`.

    x: [T, B, I], or [rows, I] when packed. hx: one [layers*D, B, P or H] tensor per state. weights: flat, as in
    `torch.nn.LSTM._flat_weights`. signals: [T or 1, B or 1, H or 1] each.
    """

    options: Options
    x: Tensor
    hx: States
    weights: Sequence[Tensor]
    batch_sizes: Tensor | None = None
    resets: Tensor | None = None
    all_states: bool = False
    signals: States = ()

    def over(self, x: Tensor, batch_sizes: Tensor | None, order: Tensor | None) -> "Call":
        """Return the call with rows of another x, and what goes with them in another order."""
        resets, signals = self.resets, self.signals
        if order is not None:
            resets = None if resets is None else resets.index_select(1, order)
            signals = tuple([s if s.shape[1] == 1 else s.index_select(1, order) for s in signals])
        hx = permuted(self.hx, order)
        return Call(self.options, x, hx, self.weights, batch_sizes, resets, self.all_states, signals)

    def each(self, change: Callable[[Tensor], Tensor]) -> "Call":
        """Return the call with its floating tensors changed. (Dynamo could not always trace `_replace`.)"""
        hx, weights = tuple([change(state) for state in self.hx]), [change(weight) for weight in self.weights]
        signals = tuple([change(signal) for signal in self.signals])
        return Call(self.options, change(self.x), hx, weights, self.batch_sizes, self.resets, self.all_states, signals)


class Outcome(NamedTuple):
    """output [*L, D*P]; finals, one [layers*D, B, P or H] per state; states of the last layer, one [*L, D*H] each."""

    output: Tensor
    finals: States
    states: States


def permuted(states: States, order: Tensor | None) -> States:
    """Reorder the batch dimension of each [*, B, *] tensor."""
    return states if order is None else tuple(s.index_select(1, order) for s in states)
