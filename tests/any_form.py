"""Layers of cells of other forms than torch's, and how to compare a backend with the plain loop."""

import torch
from closeness import TOLERANCES, assert_all_close

import rnnfast
from rnnfast import cells
from rnnfast.declare import Cell

F64 = torch.float64
CELLS = {name: cell for name, cell in vars(cells).items() if isinstance(cell, Cell) and not cell.kernel.standard}


@rnnfast.cell(gates="a b c", states="m h n", recurrent="a c", parameters="p q", signals="s r", output="h", read="n")
def everything(x, u, state, p, s):
    """Three states of which the product reads the last and the output is the second; a gate without recurrent part."""
    m, h, n = state
    a = torch.sigmoid(x.a + u.a + p.p * m)
    c = torch.tanh(x.c + u.c * torch.sigmoid(x.b) + s.s * h)
    m = a * m + (1 - a) * c
    n = torch.tanh(m + p.q * n * s.r)
    return m, n * torch.sigmoid(h), n


@rnnfast.cell(gates="a b", states="m h", recurrent="", parameters="p q", signals="s r", output="h")
def pointwise(x, state, p, s):
    """No product; the output is the second state."""
    m, h = state
    a = torch.sigmoid(x.a + p.p * m + s.s)
    m = a * m + (1 - a) * torch.tanh(x.b + h * s.r)
    return m, torch.tanh(m + p.q * h)


def make(cell, dtype, T=3, B=3, H=19, D=2, layers=1, shapes=None):
    """A layer with 3 inputs, its input, initial states, and signals of some shapes."""
    torch.manual_seed(0)
    layer = rnnfast.Recurrent(cell, 3, H, num_layers=layers, bidirectional=D == 2, dtype=dtype)
    x = torch.randn(T, B, 3, dtype=dtype, requires_grad=True)
    hx = {
        name: torch.rand(layers * D, B, H, dtype=dtype).add(0.5).requires_grad_() for name in cell.states
    }  # fmt: skip
    shapes = shapes or ((T, B, H), (T, 1, 1), (1, B, 1))
    signals = {
        name: torch.rand(shape, dtype=dtype).requires_grad_() for name, shape in zip(cell.signals, shapes, strict=False)
    }
    return layer, x, hx, signals


def results(backend, layer, x, hx, signals, **options):
    """Results and gradients of a layer, by name."""
    with rnnfast.use_backend(backend):
        output, finals, *states = layer(x, hx, signals=signals or None, **options)
    finals = finals if isinstance(finals, tuple) else (finals,)
    found = {"output": output, **{f"final {n}": f for n, f in enumerate(finals)}}
    found |= {f"states {n}": s for n, s in enumerate(states[0] if states else ())}
    loss = sum(
        (each.double() * torch.arange(each.numel(), dtype=F64).view_as(each).cos()).sum() for each in found.values()
    )
    leaves = {"x": x, **hx, **signals, **dict(layer.named_parameters())}
    grads = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True)
    return found | {f"d{name}": grad for name, grad in zip(leaves, grads, strict=True)}


def exactly(layer, x, hx, signals):
    """The same layer and tensors in float64."""
    wide = rnnfast.Recurrent(
        layer.cell, 3, layer.hidden_size, num_layers=layer.num_layers, bidirectional=layer.bidirectional, dtype=F64
    )
    wide.load_state_dict(layer.state_dict())
    tensors = (
        {name: each.detach().double().requires_grad_() for name, each in given.items()} for given in (hx, signals)
    )
    return wide, x.detach().double().requires_grad_(), *tensors


def compare(case, tolerance=None, backend="triton", **options):
    """Hold a backend against the plain loop in float64; a gradient that is not there is 0."""
    dtype = case[1].dtype
    expected, got = results("reference", *exactly(*case), **options), results(backend, *case, **options)
    shapes = dict(zip(expected, (None if each is None else each.shape for each in got.values()), strict=True))
    expected = {n: torch.zeros(shapes[n]) if each is None else each for n, each in expected.items() if shapes[n]}
    assert_all_close(expected, {n: got[n] for n in expected}, tolerance or 2 * TOLERANCES[dtype])
