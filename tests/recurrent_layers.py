"""A declared cell with everything that a cell may have, and layers of it."""

import torch

import rnnfast

F64 = {"dtype": torch.float64}


@rnnfast.cell(gates="a b c", states="m h n", recurrent="a c", parameters="p q", signals="s r", output="h", read="n")
def everything(x, u, state, p, s):
    """Three states of which the product reads the last and the output is the second; a gate without recurrent part."""
    m, h, n = state
    a = torch.sigmoid(x.a + u.a + p.p * m)
    c = torch.tanh(x.c + u.c * torch.sigmoid(x.b) + s.s * h)
    m = a * m + (1 - a) * c
    n = torch.tanh(m + p.q * n * s.r)
    return m, n * torch.sigmoid(h), n


def make(steps=5, batch=4, inputs=3, hidden=19, directions=1, layers=1, shapes=((5, 4, 19), (5, 1, 1)), **options):
    """A layer of `everything`, its input, initial states and signals."""
    torch.manual_seed(0)
    layer = rnnfast.Recurrent(
        everything, inputs, hidden, num_layers=layers, bidirectional=directions == 2, **F64, **options
    )
    x = torch.randn(steps, batch, inputs, **F64, requires_grad=True)
    hx = {n: torch.randn(layers * directions, batch, hidden, **F64, requires_grad=True) for n in everything.states}
    signals = {n: torch.randn(shape, **F64, requires_grad=True) for n, shape in zip("sr", shapes, strict=True)}
    return layer, x, hx, signals
