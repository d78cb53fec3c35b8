"""A layer linearised around its states: the tangent recurrence and its transpose, the adjoint one.

A layer is s_t = F(x_t, s_{t-1}, w). The tangents of its states along (dx, ds_0, dw) are a recurrence of their own,

    tangent     ds_t = F_x dx_t + F_s ds_{t-1} + F_w dw

and backpropagation is the transposed one, from the last step to the first:

    adjoint     a_{t-1} = F_s^T a_t + gradient of the loss by s_{t-1}

Their coefficients are known for all steps at once, since the states are; a step costs one matrix product and a few
pointwise operations. All of this is torch, in a time-major padded layout, and can be differentiated again.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from rnnfast_kernels.bind import bind
from rnnfast_kernels.cells import TORCH_CELLS
from torch import Tensor
from torch.nn.functional import linear

from rnnfast import reference, torch_functions
from rnnfast.spec import Layer, Weights, cell_named

States = tuple[Tensor, ...]

BACKWARD = {name: bind(cell_named(name).backward, torch_functions.BACKWARD) for name in TORCH_CELLS}


class Tangent(NamedTuple):
    """Tangents of a direction: of its states after every step, its final states, and the parts of the gates.

    states: one [T, B, P or H] each; finals [B, P or H]; x_gates [T, B, G*H] or None for zero; u_gates [T, B, G*H];
    hidden: h before its projection, [T, B, H], where there is one.
    """

    states: States
    finals: States
    x_gates: Tensor | None
    u_gates: Tensor
    hidden: Tensor | None


class Adjoint(NamedTuple):
    """The whole gradient of a loss by every state, [T, B, P or H] each, and by the recurrent parts, [T, B, G*H]."""

    states: States
    u_gates: Tensor


@dataclass(frozen=True)
class Linear:
    """One direction of a layer around its states, all steps at once.

    x: the input, and entering: the states that enter each step, both [T, B, *] and 0 where no step is taken.
    order: the steps as they are taken. live, kept: bool [T, B, 1] or None; whether a row takes the step, and whether
    its state enters rather than being reset. x_gates, u_gates: the parts of the gates' pre-activations, [T, B, G*H].
    hidden: h before its projection, [T, B, H]. by_x [T, B, S, G, H] and by_recurrent [T, B, S, G+K, H]: derivative of
    each new state by the gates' input parts, and by their recurrent parts and those K entering states that act
    directly, from number `direct_from` on.
    """

    weights: Weights
    x: Tensor
    entering: States
    order: Sequence[int]
    live: Tensor | None
    kept: Tensor | None
    x_gates: Tensor
    u_gates: Tensor
    hidden: Tensor
    by_x: Tensor
    by_recurrent: Tensor
    direct_from: int

    @property
    def gates(self) -> int:
        """Return G."""
        return self.by_x.shape[-2]


def linearise(layer: Layer, states: States, d: int) -> Linear:
    """Take the derivatives of direction `d` of a padded layer around its states, each [T, B, D, P or H]."""
    weights, reverse, steps = layer.weights[d], layer.reverse[d], layer.x.shape[0]
    live = None
    if layer.batch_sizes is not None:
        rows = torch.arange(layer.x.shape[1], device=layer.x.device)
        live = (rows < layer.batch_sizes.to(rows.device)[:, None])[..., None]
    kept = None if layer.resets is None else ~layer.resets[..., None]
    x = masked(layer.input_of(d, layer.x), live)
    after = tuple(s[:, :, d] for s in states)
    entering = entering_states(after, tuple(initial[d] for initial in layer.hx), reverse, live, kept)
    gates = layer.definition.gates
    x_gates, u_gates = linear(x, weights.w_ih, weights.b_ih), linear(entering[0], weights.w_hh, weights.b_hh)
    new, saved = reference.FORWARD[layer.cell](x_gates.chunk(gates, -1), u_gates.chunk(gates, -1), entering)
    by_x, by_recurrent, direct_from = jacobian(layer.cell, saved, entering, new)
    order = range(steps)[::-1] if reverse else range(steps)
    return Linear(weights, x, entering, order, live, kept, x_gates, u_gates, new[0], by_x, by_recurrent, direct_from)


def jacobian(cell: str, saved: States, entering: States, new: States) -> tuple[Tensor, Tensor, int]:
    """Differentiate a cell's equations: `Linear.by_x`, `by_recurrent` and `direct_from`."""
    one, zero = new[0].new_ones(()), new[0].new_zeros(())
    by_x, by_recurrent = [], []

    def whole(parts: tuple[Tensor | None, ...]) -> list[Tensor]:
        # A part may be zero for every input, or the same number.
        return [(zero if part is None else part).expand_as(new[0]) for part in parts]

    for n in range(len(new)):
        seeds = tuple(one if n == m else zero for m in range(len(new)))
        dx, du, direct = BACKWARD[cell](seeds, saved, entering, new)
        direct_from = next((m for m, part in enumerate(direct) if part is not None), len(direct))
        by_x.append(torch.stack(whole(dx), -2))  # [T, B, G, H]
        by_recurrent.append(torch.stack(whole((*du, *direct[direct_from:])), -2))  # [T, B, G+K, H]
    return torch.stack(by_x, -3), torch.stack(by_recurrent, -3), direct_from


def masked(tensor: Tensor, where: Tensor | None) -> Tensor:
    """Zero what `where` does not mark, NaN included."""
    return tensor if where is None else torch.where(where, tensor, torch.zeros_like(tensor))


def entering_states(states: States, initial: States, reverse: bool, live, kept) -> States:
    """Turn the states after each step into those that enter it, 0 where no step is taken or the state is reset."""
    pairs = zip(states, initial, strict=True)
    return tuple(masked(masked(shifted(s, first, reverse, live), live), kept) for s, first in pairs)


def shifted(states: Tensor, initial: Tensor, reverse: bool, live: Tensor | None) -> Tensor:
    """Turn the states after each step, [T, B, *], into those that enter it."""
    steps = states.shape[0]  # may be 0
    if not reverse:
        return torch.cat((initial[None], states[:-1]))[:steps]
    following = torch.cat((states[1:], initial[None]))[:steps]
    if live is None:
        return following
    running = torch.cat((live[1:], torch.zeros_like(live[:1])))
    return torch.where(running, following, initial)


def unshifted(entering: Tensor, reverse: bool, live: Tensor | None) -> tuple[Tensor, Tensor]:
    """Transpose `shifted`: split a gradient by the entering states into those by the states and by the initial ones."""
    if not reverse:
        return torch.cat((entering[1:], torch.zeros_like(entering[:1]))), entering[:1].sum(0)
    if live is None:
        return torch.cat((torch.zeros_like(entering[:1]), entering[:-1])), entering[-1:].sum(0)
    running = torch.cat((live[1:], torch.zeros_like(live[:1])))
    by_states = torch.cat((torch.zeros_like(entering[:1]), masked(entering, running)[:-1]))
    return by_states, masked(entering, ~running).sum(0)


def tangent(at: Linear, dx: Tensor | None, initial: States, dweights: Weights) -> Tangent:
    """Run the tangent recurrence along tangents of the input, [T, B, I], the initial states and the weights."""
    x_gates = total(
        None if dx is None else linear(masked(dx, at.live), at.weights.w_ih),
        None if dweights.w_ih is None else linear(at.x, dweights.w_ih),
        None if dweights.b_ih is None else dweights.b_ih.expand_as(at.x_gates),
    )
    driven = None if x_gates is None else (at.by_x * split_gates(x_gates, at.gates)).sum(-2)  # [T, B, S, H]
    recurrent = total(None if dweights.w_hh is None else linear(at.entering[0], dweights.w_hh), dweights.b_hh)
    projected = None if dweights.w_hr is None else linear(at.hidden, dweights.w_hr)
    steps: list = [None] * len(at.order)
    state = initial
    for t in at.order:
        entering = state if at.kept is None else tuple(masked(s, at.kept[t]) for s in state)
        u = linear(entering[0], at.weights.w_hh)
        if recurrent is not None:
            u = u + (recurrent if recurrent.dim() == 1 else recurrent[t])
        parts = torch.cat((split_gates(u, at.gates)[:, 0], *(s[:, None] for s in entering[at.direct_from :])), 1)
        hidden = (at.by_recurrent[t] * parts[:, None]).sum(-2)  # [B, S, H]
        new = list((hidden if driven is None else hidden + driven[t]).unbind(1))
        unprojected = new[0]
        if at.weights.w_hr is not None:
            new[0] = linear(new[0], at.weights.w_hr)
            new[0] = new[0] if projected is None else new[0] + projected[t]
        state = tuple(new if at.live is None else map(torch.where, [at.live[t]] * len(new), new, state))
        steps[t] = (*state, u, unprojected)
    if not steps:
        return Tangent(tuple(s.new_zeros(0, *s.shape) for s in state), state, x_gates, at.u_gates, at.hidden)
    *states, u_gates, hidden = (torch.stack(parts) for parts in zip(*steps, strict=True))
    return Tangent(tuple(masked(s, at.live) for s in states), state, x_gates, u_gates, hidden)


def adjoint(at: Linear, dstates: Sequence[Tensor | None], dfinals: Sequence[Tensor | None]) -> Adjoint:
    """Run the adjoint recurrence.

    dstates, dfinals: what of the gradient comes from outside, [T, B, P or H] and [B, P or H] each, None for zero.
    """
    steps: list = [None] * len(at.order)
    state = tuple(s.new_zeros(s.shape[1:]) if g is None else g for s, g in zip(at.entering, dfinals, strict=True))
    dstates = [None if g is None else masked(g, at.live) for g in dstates]
    for t in reversed(at.order):
        state = tuple(s if g is None else s + g[t] for s, g in zip(state, dstates, strict=True))
        hidden = state if at.weights.w_hr is None else (state[0] @ at.weights.w_hr, *state[1:])
        parts = (at.by_recurrent[t] * torch.stack(hidden, 1)[:, :, None]).sum(1)  # [B, G+K, H]
        u = parts[:, : at.gates].reshape(at.u_gates.shape[1:])
        steps[t] = (*state, u)
        direct = list(parts[:, at.gates :].unbind(1))
        through_u = u @ at.weights.w_hh
        previous = (through_u + direct[0], *direct[1:]) if at.direct_from == 0 else (through_u, *direct)
        if at.kept is not None:
            previous = tuple(masked(s, at.kept[t]) for s in previous)
        state = previous if at.live is None else tuple(map(torch.where, [at.live[t]] * len(state), previous, state))
    if not steps:
        return Adjoint(at.entering, at.u_gates)
    *states, u_gates = (masked(torch.stack(parts), at.live) for parts in zip(*steps, strict=True))
    return Adjoint(tuple(states), u_gates)


def split_gates(tensor: Tensor, gates: int) -> Tensor:
    """View [*, G*H] as [*, 1, G, H]."""
    # Not by `unflatten`, which the vmap of torch.autograd.functional does not know.
    return tensor.reshape(*tensor.shape[:-1], 1, gates, tensor.shape[-1] // gates)


def total(*terms: Tensor | None) -> Tensor | None:
    """Add what is there."""
    found = None
    for term in terms:
        if term is not None:
            found = term if found is None else found + term
    return found
