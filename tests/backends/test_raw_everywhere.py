"""Tensors whose memory is not what they mean, in cells, streams, weights and gradients of gradients."""

import copy

import pytest
import torch
from layers import as_tuple
from torch import Tensor, nn

import rnnfast

LAYERS, CELLS = ("RNN", "LSTM", "GRU"), ("RNNCell", "LSTMCell", "GRUCell")


def contiguous(tensor: Tensor) -> Tensor:
    """Return a contiguous view with the negative bit."""
    return torch._neg_view(-tensor.detach().contiguous())


def strided(tensor: Tensor) -> Tensor:
    """Return a view with the negative bit, as complex numbers give it."""
    return torch.complex(torch.zeros_like(tensor), -tensor.detach()).conj().imag


def zero(tensor: Tensor) -> Tensor:
    """Return zeros without memory."""
    return torch._efficientzerotensor(tensor.shape)


makers = pytest.mark.parametrize("make", [contiguous, strided, zero])
negatives = pytest.mark.parametrize("make", [contiguous, strided])


def given(make, tensor: Tensor) -> Tensor:
    """Return what `make` shows, in memory of its own."""
    return torch.zeros_like(tensor) if make is zero else tensor


def derivatives(module, x, h, incoming, along, grad: bool) -> list[Tensor]:
    """Return results, gradients of the weights, and a derivative of these; along: makes its incoming gradients."""
    with torch.set_grad_enabled(grad):
        found = module(x, (h, h) if "LSTM" in type(module).__name__ else h)
        results = [t for each in as_tuple(found) for t in as_tuple(each)]
        if not grad:
            return results
        weights = list(module.parameters())
        grads = torch.autograd.grad(results[0], weights, incoming, create_graph=True)
        again = torch.autograd.grad(grads, weights, [along(g.detach()) for g in grads], allow_unused=True)
        return [*results, *grads, *(g for g in again if g is not None)]


def assert_all_equal(found, expected) -> None:
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("kind", [*CELLS, *LAYERS])
@makers
def test_input_state_and_incoming_gradients_of_both_orders(kind, make, grad):
    """Cells take kernels here, also where `auto` would take torch's step."""
    module, cell = getattr(rnnfast, kind)(3, 4), kind in CELLS
    x, h = torch.randn(*(2, 3) if cell else (5, 2, 3)), torch.randn(*(2, 4) if cell else (1, 2, 4))
    incoming = torch.randn(*h.shape) if cell else torch.randn(5, 2, 4)
    with rnnfast.use_backend("numba"):
        for _ in range(3):
            plain = [given(make, t) for t in (x, h, incoming)]
            expected = derivatives(module, *plain, lambda g: given(make, g), grad)
            found = derivatives(module, make(x), make(h), make(incoming), make, grad)
            assert_all_equal(found, expected)


@pytest.mark.parametrize(
    ("kind", "names"),
    [
        *(("LSTM", (name,)) for name in ("weight_ih", "weight_hh", "bias_hh")),
        *((kind, ("weight_ih", "weight_hh", "bias_ih")) for kind in (*CELLS, *LAYERS)),
    ],
)
@negatives
def test_weights(kind, names, make):
    plain = getattr(rnnfast, kind)(3, 4)
    cell, module = kind in CELLS, copy.deepcopy(plain)
    for name in names if cell else [f"{name}_l0" for name in names]:
        setattr(module, name, nn.Parameter(make(getattr(plain, name))))
        assert getattr(module, name).is_neg()
    x, h = torch.randn(*(2, 3) if cell else (5, 2, 3)), torch.randn(*(2, 4) if cell else (1, 2, 4))
    incoming = torch.randn(*h.shape) if cell else torch.randn(5, 2, 4)
    with rnnfast.use_backend("numba"):
        for grad in (False, True) * 3:
            found, expected = (derivatives(each, x, h, incoming, torch.sin, grad) for each in (module, plain))
            assert_all_equal(found, expected)


@pytest.mark.parametrize("kind", LAYERS)
@makers
def test_streams(kind, make):
    plain = getattr(rnnfast, kind)(3, 4)
    module = copy.deepcopy(plain)
    if make is not zero:
        for name, weight in plain.named_parameters():
            setattr(module, name, nn.Parameter(make(weight)))
    streams = rnnfast.Stream(module, 2), rnnfast.Stream(plain, 2)
    for _ in range(3):
        x = torch.randn(2, 3)
        torch.testing.assert_close(streams[0](make(x)), streams[1](given(make, x)))
    states = [torch.randn(1, 2, 4) for _ in as_tuple(streams[1].state)]
    for stream, own in zip(streams, ([make(s) for s in states], [given(make, s) for s in states]), strict=True):
        stream.state = tuple(own) if len(own) > 1 else own[0]
    torch.testing.assert_close(streams[0](x), streams[1](x))


@pytest.mark.parametrize("kind", [*CELLS, *LAYERS])
@pytest.mark.parametrize("dtype", [torch.complex64, torch.complex128])
def test_complex_numbers_are_left_to_torch(kind, dtype):
    """Also those with the conjugate bit; torch computes some of these layers and refuses others."""
    ours, theirs = (getattr(of, kind)(3, 4, dtype=dtype) for of in (rnnfast, nn))
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(*(2, 3) if kind in CELLS else (5, 2, 3), dtype=dtype)
    for given in (x, x.conj()) * 2:
        expected, found = (outcome(module, given) for module in (theirs, ours))
        if isinstance(expected, str):
            assert found == expected
        else:
            assert_all_equal(found, expected)


def outcome(module: nn.Module, x: Tensor) -> list[Tensor] | str:
    """Return a result and its gradients, or what is raised."""
    try:
        result = as_tuple(module(x))[0]
        return [result, *torch.autograd.grad(result.abs().sum(), list(module.parameters()))]
    except RuntimeError as error:
        return str(error)
