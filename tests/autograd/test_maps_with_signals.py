"""Layers of cells with signals under `vmap` and with several incoming gradients at once."""

import pytest
import torch
from conftest import backends_under_test
from torch.autograd.functional import hessian, jacobian
from torch.func import vmap

import rnnfast

pytestmark = pytest.mark.skipif(backends_under_test() != ["numba"], reason="these are kernels of the CPU")
STEPS, BATCH = 4, 3
SHAPES = {"broadcast": (STEPS, 1, 1), "full": (STEPS, BATCH, 5)}
shapes = pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)


def make(shape, *members: int):
    """Return a layer of 2 inputs and 5 units, a function of its input and its signal, and these."""
    torch.manual_seed(0)
    layer = rnnfast.Recurrent(rnnfast.cells.augru, 2, 5)
    (name,) = layer.cell.signals
    x = torch.randn(*members, STEPS, BATCH, 2)
    signal = torch.rand(*members, *shape)
    return layer, lambda x, signal: layer(x, signals={name: signal})[0], x, signal


@shapes
@pytest.mark.parametrize("trained", [True, False])
def test_several_incoming_gradients(trained, shape):
    layer, run, x, signal = make(shape)
    layer.requires_grad_(trained)
    output = run(x.requires_grad_(), signal.requires_grad_())
    incoming = torch.randn(3, *output.shape)
    for wanted in ([x, signal, *layer.parameters()] if trained else [x, signal], [x], [signal]):
        got = torch.autograd.grad(output, wanted, incoming, is_grads_batched=True, retain_graph=True)
        each = [torch.autograd.grad(output, wanted, one, retain_graph=True) for one in incoming]
        torch.testing.assert_close(got, tuple(map(torch.stack, zip(*each, strict=True))))


@shapes
def test_vectorized_derivatives(shape):
    layer, run, *inputs = make(shape)
    layer.requires_grad_(False)
    function = lambda x, signal: run(x, signal).sin().sum((0, 1))  # noqa: E731
    expected = jacobian(function, (*inputs,))
    for create_graph in (False, True):
        got = jacobian(function, (*inputs,), vectorize=True, create_graph=create_graph)
        torch.testing.assert_close(got, expected)
    scalar = lambda x, signal: function(x, signal).square().sum()  # noqa: E731
    torch.testing.assert_close(hessian(scalar, (*inputs,), vectorize=True), hessian(scalar, (*inputs,)))


@shapes
@pytest.mark.parametrize("own_weights", [False, True])
def test_the_operator(own_weights, shape):
    """As it stands in graphs; outside of them maps run the plain loop of such cells."""
    layer, _, x, signal = make(shape, 2)
    weights = [w.detach() for w in layer.parameters()]
    tensors = [x, torch.zeros(1, BATCH, 5), signal, *(torch.stack((w, w / 2)) if own_weights else w for w in weights)]
    present = [True] * 4 + [False] * 4

    def run(*tensors):
        return torch.ops.rnnfast.layer("numba", layer.cell.identity, [False], present, False, False, [*tensors])

    dims = (0, None, 0, *(0 if own_weights else None for _ in weights))
    members = [[t if dim is None else t[n] for t, dim in zip(tensors, dims, strict=True)] for n in range(2)]
    expected = [run(*member) for member in members]
    torch.testing.assert_close(vmap(run, dims)(*tensors), [torch.stack(parts) for parts in zip(*expected, strict=True)])
