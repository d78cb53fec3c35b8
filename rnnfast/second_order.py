"""What autograd wants beyond a layer's gradient: its forward-mode derivative and its second derivative.

The forward-mode derivative is the tangent recurrence of `rnnfast.tangent`. The second derivative needs no more than
that and the adjoint one. In the terms used there, with all a_t and ds_t in hand, the curvature term is local to a step:
the second derivative of one step over T*B independent rows. What it says about the entering states goes back through
time by the layer's own backward (Pearlmutter, 1994, "Fast exact multiplication by the Hessian").
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from rnnfast import reference
from rnnfast.spec import Layer, OutputTangents, Tangents, Weights, cell_named
from rnnfast.tangent import (
    Adjoint,
    Linear,
    States,
    Tangent,
    adjoint,
    entering_states,
    linearise,
    masked,
    tangent,
    total,
    unshifted,
)


def layer_jvp(layer: Layer, states: States, tangents: Tangents) -> OutputTangents:
    """Return the tangents of `states`, which are a layer's after every step."""
    padding = Padding(layer)
    padded, states, dx = padding.pad_layer(layer), padding.pad_all(states), padding.pad(tangents.x)
    directions = range(len(layer.reverse))
    return padding.join(
        [direction_jvp(linearise(padded, states, d), padded, d, tangents._replace(x=dx)) for d in directions]
    )


def direction_jvp(at: Linear, layer: Layer, d: int, tangents: Tangents) -> Tangent:
    """Run the tangent recurrence of one direction of a padded layer."""
    return tangent(at, input_tangent(layer, d, tangents), initial_tangents(layer, d, tangents), tangents.weights[d])


def input_tangent(layer: Layer, d: int, tangents: Tangents) -> Tensor | None:
    """Return the tangent of what one direction reads."""
    return None if tangents.x is None else layer.input_of(d, tangents.x)


def initial_tangents(layer: Layer, d: int, tangents: Tangents) -> States:
    """Return the tangents of one direction's initial states."""
    pairs = zip(layer.hx, tangents.hx, strict=True)
    return tuple(torch.zeros_like(s[d]) if each is None else each[d] for s, each in pairs)


def hvp(
    layer: Layer,
    states: States,
    dstates: Sequence[Tensor | None],
    dfinals: Sequence[Tensor | None],
    tangents: Tangents,
    backward: Callable[[States], Sequence[Tensor]],
) -> tuple[list[Tensor], OutputTangents]:
    """Differentiate a layer's gradients along `tangents`, at fixed incoming gradients `dstates` and `dfinals`.

    backward: the layer's own, from gradients by every state after every step to those by x, hx and the flat weights.

    Returns the tangents of these gradients, and what `layer_jvp` returns. The Hessian being symmetric, these are also
    the derivatives of <gradients, tangents> by the layer's tensors, and by dstates and dfinals.
    """
    padding = Padding(layer)
    padded, states, dstates = padding.pad_layer(layer), padding.pad_all(states), padding.pad_all(dstates)
    tangents = tangents._replace(x=padding.pad(tangents.x))
    of_states, by_states, by_tensors = [], [], []
    for d in range(len(layer.reverse)):
        at = linearise(padded, states, d)
        flows = adjoint(at, [pick(g, (..., d, slice(None))) for g in dstates], [pick(g, d) for g in dfinals])
        of_states.append(direction_jvp(at, padded, d, tangents))
        initial = initial_tangents(padded, d, tangents)
        entering = entering_states(of_states[-1].states, initial, layer.reverse[d], at.live, at.kept)
        dx = input_tangent(padded, d, tangents)
        dx = None if dx is None else masked(dx, at.live)
        x, by_entering, weights = hvp_steps(layer.cell, at, flows, of_states[-1], dx, entering, tangents.weights[d])
        pairs = [unshifted(masked(g, at.kept), layer.reverse[d], at.live) for g in by_entering]
        by_states.append([states for states, _ in pairs])
        by_tensors.append((x, [initial for _, initial in pairs], weights))
    through_time = backward(tuple(padding.unpad(torch.stack(parts, 2)) for parts in zip(*by_states, strict=True)))
    by_input = torch.stack([x for x, _, _ in by_tensors], -2)  # [T, B, D, I]
    steps, batch, directions, width = by_input.shape
    by_input = by_input.reshape(steps, batch, layer.inputs, directions // layer.inputs, width).sum(-2)
    x = padding.unpad(by_input.reshape(steps, batch, layer.inputs * width))
    hx = [torch.stack(parts) for parts in zip(*(initial for _, initial, _ in by_tensors), strict=True)]
    here = [x, *hx, *(w for _, _, weights in by_tensors for w in weights)]
    return [a + b for a, b in zip(through_time, here, strict=True)], padding.join(of_states)


def hvp_steps(
    cell: str, at: Linear, flows: Adjoint, along: Tangent, dx: Tensor | None, dentering: States, dweights: Weights
) -> tuple[Any, list[Any], list[Any]]:
    """Differentiate <flows, F(x, entering, w)> twice, all steps at once: by everything, and along the tangents.

    Returns what comes of it for x, the entering states and the weights that there are.
    """
    by_u = flows.u_gates
    by_x = by_u if cell_named(cell).one_gradient else gradient_by_x(at, flows)
    curved_x, curved_u, curved_direct = hvp_gates(cell, at, flows, along, dentering, dweights)
    x = total(curved_x @ at.weights.w_ih, product(by_x, dweights.w_ih))
    entering = [torch.zeros_like(s) for s in at.entering[1 : at.direct_from]] + curved_direct
    through_u = total(curved_u @ at.weights.w_hh, product(by_u, dweights.w_hh))
    entering = [through_u, *entering] if at.direct_from else [through_u + entering[0], *entering[1:]]
    weights = [
        total(outer(curved_x, at.x), outer(by_x, dx)),
        total(outer(curved_u, at.entering[0]), outer(by_u, dentering[0])),
    ]
    if at.weights.b_ih is not None:
        weights += [as_rows(curved_x).sum(0), as_rows(curved_u).sum(0)]
    if at.weights.w_hr is not None:
        weights.append(outer(flows.states[0], along.hidden))
    return x, entering, weights


def hvp_gates(cell: str, at: Linear, flows: Adjoint, along: Tangent, dentering: States, dweights: Weights):
    """Take the pointwise part of `hvp_steps`: by the input parts, the recurrent parts and the direct states."""
    gates, first = at.gates, at.direct_from

    def step(x_gates, u_gates, *direct):
        state = (*at.entering[:first], *direct)
        return reference.FORWARD[cell](x_gates.chunk(gates, -1), u_gates.chunk(gates, -1), state)[0]

    def gradient(*points):
        return torch.func.vjp(step, *points)[1](hidden)

    points = (at.x_gates, at.u_gates, *at.entering[first:])
    hidden = flows.states
    if at.weights.w_hr is not None:
        hidden = (hidden[0] @ at.weights.w_hr, *hidden[1:])
    dx_gates = torch.zeros_like(at.x_gates) if along.x_gates is None else along.x_gates
    found = torch.func.vjp(gradient, *points)[1]((dx_gates, along.u_gates, *dentering[first:]))
    if dweights.w_hr is not None:
        turned = (flows.states[0] @ dweights.w_hr, *(torch.zeros_like(s) for s in hidden[1:]))
        more = torch.func.vjp(step, *points)[1](turned)
        found = [a + b for a, b in zip(found, more, strict=True)]
    return found[0], found[1], list(found[2:])


def gradient_by_x(at: Linear, flows: Adjoint) -> Tensor:
    """Return the gradient by the input parts of the gates, [T, B, G*H], where it is not that by the recurrent parts."""
    return (at.by_x * torch.stack(flows.states, -2).unsqueeze(-2)).sum(-3).reshape(at.x_gates.shape)


def product(gates: Tensor, weight: Tensor | None) -> Tensor | None:
    """Multiply by the tangent of a weight, if there is one."""
    return None if weight is None else gates @ weight


def outer(gates: Tensor, tensor: Tensor | None) -> Tensor | None:
    """Sum the outer products of all rows, [T, B, M] and [T, B, N] to [M, N]."""
    return None if tensor is None else as_rows(gates).T @ as_rows(tensor)


def as_rows(tensor: Tensor) -> Tensor:
    """View [T, B, N] as [T*B, N]; not by `flatten`, which the vmap of torch.autograd.functional does not know."""
    return tensor.reshape(tensor.shape[0] * tensor.shape[1], tensor.shape[2])


def pick(tensor: Tensor | None, index) -> Tensor | None:
    """Index what is there."""
    return None if tensor is None else tensor[index]


class Padding:
    """Translates between a layer's row layout and the padded one, [T, B, *]."""

    def __init__(self, layer: Layer):
        self.packed = layer.x.dim() == 2
        if self.packed and layer.batch_sizes is not None:
            sizes = layer.batch_sizes.to(layer.x.device)
            self.shape = len(sizes), layer.hx[0].shape[1]
            at_step = torch.arange(len(sizes), device=sizes.device).repeat_interleave(sizes)
            starts = (sizes.cumsum(0) - sizes)[at_step]
            self.index = at_step, torch.arange(len(at_step), device=sizes.device) - starts

    def pad(self, rows):
        """Lay rows out as [T, B, *]; None stays None."""
        if rows is None or not self.packed:
            return rows
        return rows.new_zeros(*self.shape, *rows.shape[1:]).index_put(self.index, rows)

    def pad_all(self, tensors):
        """Lay several tensors out as [T, B, *]."""
        return tuple(map(self.pad, tensors))

    def unpad(self, padded: Tensor) -> Tensor:
        """Undo `pad`."""
        return padded[self.index] if self.packed else padded

    def pad_layer(self, layer: Layer) -> Layer:
        """Return the layer over the padded input."""
        return replace(layer, x=self.pad(layer.x))

    def join(self, directions: Sequence[Tangent]) -> OutputTangents:
        """Stack the directions, in the layer's own row layout."""
        states = zip(*(each.states for each in directions), strict=True)
        finals = zip(*(each.finals for each in directions), strict=True)
        return OutputTangents(
            tuple(self.unpad(torch.stack(parts, 2)) for parts in states), tuple(map(torch.stack, finals))
        )
