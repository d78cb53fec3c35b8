"""Nested transforms of torch.func over every cell, against a plain loop in torch's operators."""

import pytest
import torch
from torch.func import grad, jacfwd, jvp, vmap

import rnnfast

CELLS = {"rnn_tanh": 1, "rnn_relu": 1, "lstm": 4, "gru": 3}


def make(cell):
    torch.manual_seed(1)
    kind = {"lstm": rnnfast.LSTM, "gru": rnnfast.GRU}.get(cell, rnnfast.RNN)
    options = {"nonlinearity": cell[4:]} if cell.startswith("rnn") else {}
    module = kind(2, 2, **options).double()
    p = {name: w.detach().clone() for name, w in module.named_parameters()}
    return module, p, {name: torch.randn_like(w) for name, w in p.items()}


def loop(cell, p, x):
    h = c = x.new_zeros(x.shape[1], 2)
    for row in x:
        a = row @ p["weight_ih_l0"].mT + p["bias_ih_l0"]
        b = h @ p["weight_hh_l0"].mT + p["bias_hh_l0"]
        if cell == "lstm":
            i, f, g, o = (a + b).chunk(4, -1)
            c = f.sigmoid() * c + i.sigmoid() * g.tanh()
            h = o.sigmoid() * c.tanh()
        elif cell == "gru":
            (ar, az, an), (br, bz, bn) = a.chunk(3, -1), b.chunk(3, -1)
            z = (az + bz).sigmoid()
            h = (1 - z) * (an + (ar + br).sigmoid() * bn).tanh() + z * h
        else:
            h = (a + b).tanh() if cell == "rnn_tanh" else (a + b).relu()
        yield h


def losses(cell):
    """Return the loss of one sample [T, I], of our layer and of the loop, and its arguments."""
    module, p, dp = make(cell)
    w = torch.randn(3, 1, 2, dtype=torch.float64)

    def ours(p, x):
        return (torch.func.functional_call(module, p, (x[:, None],))[0].sin() * w).sum()

    def plain(p, x):
        return (torch.stack([*loop(cell, p, x[:, None])]).sin() * w).sum()

    return ours, plain, p, dp


def close(found, expected):
    for a, b in zip(torch.utils._pytree.tree_leaves(found), torch.utils._pytree.tree_leaves(expected), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-10)


def per_sample(loss):
    return vmap(grad(loss), (None, 1))


@pytest.mark.parametrize("cell", CELLS)
def test_forward_mode_over_gradients_of_samples(cell):
    """Changes of the weights and of x, by `jvp`, `jacfwd` and `dual_level`."""
    *both, p, dp = losses(cell)
    x, dx = torch.randn(2, 3, 4, 2, dtype=torch.float64)

    def dual(f):
        with torch.autograd.forward_ad.dual_level():
            dual = torch.autograd.forward_ad.make_dual
            found = f({n: dual(w, dp[n]) for n, w in p.items()}, dual(x, dx))
            return [torch.autograd.forward_ad.unpack_dual(v).tangent for v in found.values()]

    for way in (
        lambda f: jvp(lambda p: f(p, x), (p,), (dp,)),
        lambda f: jvp(lambda x: f(p, x), (x,), (dx,)),
        lambda f: jvp(f, (p, x), (dp, dx)),
        lambda f: jacfwd(f)(p, x),
        lambda f: jacfwd(f, 1)(p, x),
        dual,
    ):
        ours, plain = (way(per_sample(f)) for f in both)
        close(ours, plain)
