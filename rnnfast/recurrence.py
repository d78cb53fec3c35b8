"""The plain loop over a layer of a declared cell: what every backend computes, by the user's own function."""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import linear

from rnnfast import reference
from rnnfast.backends.recurrence import Outcome, Recurrence

# The step of each declared cell as torch runs it: step(x, u, state, p, s) -> new states, in the order of loops.
Step = Callable[..., tuple[Tensor, ...]]
STEPS: dict[str, Step] = {}


def run(layer: Recurrence) -> Outcome:
    """Run the plain loop."""
    directions = [run_direction(layer, d) for d in range(len(layer.reverse))]
    states, finals = zip(*directions, strict=True)
    h, *extra = (torch.stack(parts, dim=-2) for parts in zip(*states, strict=True))
    h_final, *extra_final = (torch.stack(parts) for parts in zip(*finals, strict=True))
    return Outcome(
        h,
        torch.stack(extra) if extra else layer.extra.new_empty(0, *h.shape),
        h_final,
        torch.stack(extra_final) if extra else layer.extra,
    )


def run_direction(layer: Recurrence, d: int) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """Run direction `d` through time."""
    weights, cell = layer.weights[d], layer.row
    state = (layer.h[d], *layer.extra[:, d])
    steps: list = [state] * layer.steps
    x_gates = linear(layer.x, weights.w_ih, weights.b_ih)  # [*L, G*H]
    spans = reference.row_spans(layer)  # type: ignore[arg-type]
    p = () if weights.parameters is None else weights.parameters.unbind()
    for t in range(layer.steps)[:: -1 if layer.reverse[d] else 1]:
        x_t = x_gates[spans[t]] if layer.x.dim() == 2 else x_gates[t, spans[t]]  # [rows, G*H]
        rows = x_t.shape[0]
        entering = tuple(each[:rows] for each in state)
        if layer.resets is not None:
            entering = reference.reset(entering, layer.resets[t, :rows])
        u = () if weights.w_hh is None else linear(entering[0], weights.w_hh, weights.b_hh).chunk(cell.recurrent, -1)
        s = tuple(at_step(signal, t, rows) for signal in layer.signals)
        new = STEPS[layer.cell](x_t.chunk(cell.gates, -1), u, entering, p, s)
        steps[t] = tuple(each.expand_as(old) for each, old in zip(new, entering, strict=True))
        state = tuple(torch.cat((each, old[rows:])) for each, old in zip(steps[t], state, strict=True))
    if not steps:
        return reference.no_steps(layer, state), state  # type: ignore[arg-type]
    return tuple(reference.join(layer, parts) for parts in zip(*steps, strict=True)), state  # type: ignore[arg-type]


def at_step(signal: Tensor, t: int, rows: int) -> Tensor:
    """Take what a signal is at a step for the first rows."""
    now = signal[t if signal.shape[0] > 1 else 0]
    return now[:rows] if now.shape[0] > 1 else now
