"""A backend of the reference loop and autograd: what autograd, operators and vmap rules are tested with."""

import torch

from rnnfast import reference
from rnnfast.spec import Gradients, Needs, Result, flatten, restore


def unsupported(cell, device, dtype):
    """Run everything."""


def saved_like(layer):
    """Save one tensor per call, so that its path through autograd is tried."""
    return (((*layer.x.shape[:-1], 2), layer.x.dtype),)


def forward(layer, *, save, all_states):
    states, finals = reference.run(layer)
    if not (save or all_states):
        states = (states[0], *(s.new_empty(0) for s in states[1:]))
    saved = tuple(layer.x.new_full(shape, 7, dtype=dtype) for shape, dtype in saved_like(layer)) if save else ()
    return Result(tuple(s.clone() for s in states), tuple(f.clone() for f in finals), saved)


def backward(layer, states, saved, dstates, dfinals, needs: Needs, groups: int = 1):
    assert [t.shape for t in saved] == [shape for shape, _ in saved_like(layer)]
    assert all((t == 7).all() for t in saved)
    if groups == 1:
        return whole_backward(layer, dstates, dfinals, needs)
    members = [whole_backward(*select(layer, dstates, dfinals, n, groups), needs) for n in range(groups)]
    at = layer.x.dim() - 2
    x = torch.stack([m.x for m in members], at + 1).flatten(at, at + 1) if needs.x else None
    hx = tuple(torch.stack(parts, 2).flatten(1, 2) for parts in zip(*(m.hx for m in members), strict=True) if needs.hx)
    weights = tuple(stacked([m.weights[d] for m in members]) for d in range(len(layer.reverse)))
    return Gradients(x, hx, weights)


def stacked(parts):
    """Stack the weights of one direction."""
    return type(parts[0])._make(None if each[0] is None else torch.stack(each) for each in zip(*parts, strict=True))


def select(layer, dstates, dfinals, n, groups):
    """Take the rows of one group."""
    at = layer.x.dim() - 2
    rows = slice(n, None, groups)
    over_l = (slice(None),) * at + (rows,)
    picked = type(layer)(
        layer.cell,
        layer.x[over_l],
        tuple(h[:, rows] for h in layer.hx),
        layer.weights,
        layer.reverse,
        None if layer.batch_sizes is None else layer.batch_sizes // groups,
        None if layer.resets is None else layer.resets[:, rows],
    )
    return (
        picked,
        tuple(None if g is None else g[over_l] for g in dstates),
        tuple(None if g is None else g[:, rows] for g in dfinals),
    )


def autograd_again():
    """Lift the guard under which a backend runs: below autograd, nothing is recorded."""
    excluded = torch._C._dispatch_tls_local_exclude_set() - torch._C.DispatchKeySet(torch._C.DispatchKey.AutogradCPU)
    return torch._C._ForceDispatchKeyGuard(torch._C._dispatch_tls_local_include_set(), excluded)


def whole_backward(layer, dstates, dfinals, needs):
    with torch.enable_grad(), autograd_again():
        form, tensors = flatten(layer)
        end = form.differentiable
        leaves = [t.detach().requires_grad_() for t in tensors[:end]]
        states, finals = reference.run(restore(form, [*leaves, *tensors[end:]]))
        pairs = [(o, g) for o, g in zip((*states, *finals), (*dstates, *dfinals), strict=True)]
        pairs = [(o, g) for o, g in pairs if g is not None and o.requires_grad]
        grads = torch.autograd.grad([o for o, _ in pairs], leaves, [g for _, g in pairs], allow_unused=True)
    grads = [torch.zeros_like(leaf) if g is None else g.clone() for g, leaf in zip(grads, leaves, strict=True)]
    found = restore(form, [*grads, *tensors[end:]])
    return Gradients(found.x if needs.x else None, found.hx, found.weights)
