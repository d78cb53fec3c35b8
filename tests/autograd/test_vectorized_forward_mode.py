"""`torch.autograd.functional` with vectorize=True in forward mode: tangents come in torch's older kind of vmap."""

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.functional import hessian, jacobian
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence

import rnnfast

NAMES = ["RNN", "LSTM", "GRU"]
X = torch.randn(3, 2, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
FORMS = {
    "plain": ({}, lambda layer, x: layer(x)[0]),
    "two layers": ({"num_layers": 2}, lambda layer, x: layer(x)[1]),
    "bidirectional": ({"bidirectional": True}, lambda layer, x: layer(x)[0]),
    "batch first": ({"batch_first": True, "bias": False}, lambda layer, x: layer(x)[0]),
    "lengths": ({"bidirectional": True}, lambda layer, x: layer(x, lengths=torch.tensor([3, 1]))[0]),
    "resets": ({}, lambda layer, x: layer(x, resets=torch.tensor([[0, 0], [1, 0], [0, 1]]).bool())[0]),
    "all states": ({}, lambda layer, x: layer(x, all_states=True)[2]),
    "packed": ({}, lambda layer, x: layer(packed_like(x))[0].data),
}


def packed_like(x: Tensor) -> PackedSequence:
    """Pack rows of 3 and 1 steps; torch's own function has no forward mode."""
    return PackedSequence(torch.cat((x[0], x[1, :1], x[2, :1])), pack_padded_sequence(X, [3, 1]).batch_sizes)


def last(results) -> Tensor:
    """Return the last of several tensors."""
    return results if isinstance(results, Tensor) else results[-1]


def compare(function, *inputs):
    expected = jacobian(function, inputs)
    got = jacobian(function, inputs, vectorize=True, strategy="forward-mode")
    torch.testing.assert_close(got, expected)


@pytest.mark.parametrize(("name", "form"), [("RNN", "plain"), ("GRU", "lengths"), *(("LSTM", form) for form in FORMS)])
def test_jacobian(name, form):
    options, call = FORMS[form]
    layer = getattr(rnnfast, name)(4, 5, **options).double()
    compare(lambda x: last(call(layer, x)), X)


@pytest.mark.parametrize("name", NAMES)
def test_jacobian_by_states_and_weights(name):
    layer = getattr(rnnfast, name)(4, 5, **({"proj_size": 3} if name == "LSTM" else {})).double()
    h, c = torch.randn(1, 2, 3 if name == "LSTM" else 5).double(), torch.randn(1, 2, 5).double()

    def function(x, h, c, w_hh, b_ih):
        weights = dict(layer.named_parameters()) | {"weight_hh_l0": w_hh, "bias_ih_l0": b_ih}
        return torch.func.functional_call(layer, weights, (x, (h, c) if name == "LSTM" else h))[0] + c.sum()

    compare(function, X, h, c, layer.weight_hh_l0.detach(), layer.bias_ih_l0.detach())


@pytest.mark.parametrize("name", NAMES)
def test_jacobian_of_cells(name):
    cell = getattr(rnnfast, f"{name}Cell")(4, 5).double()
    compare(lambda x: last(cell(x)), X[0])


@pytest.mark.parametrize(("name", "options"), [("RNN", {}), ("LSTM", {}), ("GRU", {"bidirectional": True})], ids=str)
def test_hessian(name, options):
    """Forward mode over the reverse: torch's own LSTM and GRU raise here."""
    layer = getattr(rnnfast, name)(4, 5, **options).double()
    theirs = getattr(nn, name)(4, 5, **options).double()
    theirs.load_state_dict(layer.state_dict())
    got = hessian(lambda x: layer(x)[0].sin().sum(), X, vectorize=True, outer_jacobian_strategy="forward-mode")
    torch.testing.assert_close(got, hessian(lambda x: theirs(x)[0].sin().sum(), X))


def test_declared_cells():
    layer = rnnfast.Recurrent(rnnfast.cells.peephole_lstm, 4, 5).double()
    compare(lambda x: layer(x)[0], X)
