"""The plain loop: a recurrent layer in a page of torch, one operator after another.

This is what every backend computes, written to be read. It is the oracle of the tests, the documentation of the
options, and, because autograd can differentiate it any number of times, the source of second derivatives.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import accumulate

import torch
from rnnfast_kernels.bind import bind
from rnnfast_kernels.cells import TORCH_CELLS
from torch import Tensor

from rnnfast import torch_functions
from rnnfast.spec import Layer, States, Weights, cell_named

FORWARD = {name: bind(cell_named(name).forward, torch_functions.FORWARD) for name in TORCH_CELLS}
# Declared cells: the user's own function, step(x, u, state, p, s) -> new states.
STEPS: dict[str, Callable] = {}


def run(layer: Layer) -> tuple[States, States]:
    """Return every state after every step, and the final states: `Result.states` and `Result.finals`."""
    layer = without_padding(layer)
    directions = [run_direction(layer, d) for d in range(len(layer.reverse))]
    states, finals = zip(*directions, strict=True)
    stacked = tuple(torch.stack(parts, dim=-2) for parts in zip(*states, strict=True))  # [*L, D, P or H]
    return stacked, tuple(torch.stack(parts) for parts in zip(*finals, strict=True))  # [D, B, P or H]


def without_padding(layer: Layer) -> Layer:
    """Return the layer with zeros for what stands in the padding, where even NaN may reach nothing."""
    x, sizes = layer.x, layer.batch_sizes
    if sizes is None or x.dim() == 2:
        return layer
    live = torch.arange(x.shape[1], device=x.device) < sizes.to(x.device)[:, None]
    return replace(layer, x=torch.where(live[..., None], x, torch.zeros_like(x)))


def run_direction(layer: Layer, d: int) -> tuple[States, States]:
    """Run direction `d` through time."""
    weights = layer.weights[d]
    state = tuple(initial[d] for initial in layer.hx)
    steps = [state] * layer.steps
    x_gates = torch.nn.functional.linear(layer.input_of(d, layer.x), weights.w_ih, weights.b_ih)  # [*L, G*H]
    spans = row_spans(layer)
    order = reversed(range(len(steps))) if layer.reverse[d] else range(len(steps))
    for t in order:
        x_t = x_gates[spans[t]] if layer.x.dim() == 2 else x_gates[t, spans[t]]  # [rows, G*H]
        rows = x_t.shape[0]
        entering = tuple(s[:rows] for s in state)
        if layer.resets is not None:
            entering = reset(entering, layer.resets[t, :rows])
        signals = tuple(at_step(signal, t, rows) for signal in layer.signals)
        steps[t] = step(layer.cell, x_t, entering, weights, signals)
        state = tuple(torch.cat((new, old[rows:])) for new, old in zip(steps[t], state, strict=True))
    return tuple(join(layer, parts) for parts in zip(*steps, strict=True)) if steps else no_steps(layer, state), state


def step(cell: str, x_gates: Tensor, state: States, weights: Weights, signals: States = ()) -> States:
    """One time step of a cell: `x_gates` [rows, G*H], each state [rows, P or H], signals [rows or 1, H or 1]."""
    row, x = cell_named(cell), x_gates.chunk(cell_named(cell).gates, -1)
    u: Sequence[Tensor] = ()
    if weights.w_hh is not None:
        u = torch.nn.functional.linear(state[0], weights.w_hh, weights.b_hh).chunk(row.recurrent, -1)  # [rows, H] each
    if cell in STEPS:
        parameters = () if weights.parameters is None else weights.parameters.unbind()
        new = STEPS[cell](x, u, state, parameters, signals)
        state = tuple(map(as_state, new, state))
    else:
        state, _ = FORWARD[cell](x, u, state)
    if weights.w_hr is not None:
        state = (torch.nn.functional.linear(state[0], weights.w_hr), *state[1:])
    return state


def as_state(new: Tensor | float, old: Tensor) -> Tensor:
    """Return a new state, which may be a number, a comparison or of another dtype, as a tensor like the old one."""
    new = new if isinstance(new, Tensor) else old.new_full((), new)
    return new.to(old.dtype).expand_as(old)


def at_step(signal: Tensor, t: int, rows: int) -> Tensor:
    """Return what a signal is at a step for the first rows."""
    now = signal[t if signal.shape[0] > 1 else 0]
    return now[:rows] if now.shape[0] > 1 else now


def reset(state: States, where: Tensor) -> States:
    """Zero the rows of each state that `where` [rows] marks; neither a NaN nor a gradient passes."""
    return tuple(torch.where(where[:, None], torch.zeros_like(s), s) for s in state)


def row_spans(layer: Layer) -> list[slice]:
    """Say where the rows of each step stand: in `x` itself when packed, else in `x[t]`."""
    if layer.batch_sizes is None:
        return [slice(None)] * layer.steps
    sizes = [int(n) for n in layer.batch_sizes]
    if layer.x.dim() == 3:
        return [slice(0, size) for size in sizes]
    return [slice(end - size, end) for end, size in zip(accumulate(sizes), sizes, strict=True)]


def join(layer: Layer, steps: tuple[Tensor, ...]) -> Tensor:
    """Lay one [rows, P or H] tensor per step out as x is laid out, zero past each row's end."""
    if layer.x.dim() == 2:
        return torch.cat(steps)
    batch = layer.x.shape[1]
    # Older torch pads no tensors without elements.
    return torch.stack([torch.cat((part, part.new_zeros(batch - len(part), part.shape[1]))) for part in steps])


def no_steps(layer: Layer, state: States) -> States:
    """Return the empty sequence of states."""
    return tuple(s.new_empty(*layer.x.shape[:-1], s.shape[-1]) for s in state)
