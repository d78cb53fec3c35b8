"""Weights that are computed: weight and spectral norm, orthogonality, pruning, WeightDrop."""

import copy
import warnings
from functools import partial

import pytest
import torch
from closeness import assert_all_close
from layers import CELLS, pair, weights_like
from torch import nn
from torch.nn.utils import parametrizations, prune

import rnnfast

F64 = {"dtype": torch.float64}


def old_weight_norm(layer: nn.Module, name: str) -> None:
    """Apply the weight norm that torch has deprecated and models still use."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*weight_norm.* is deprecated", category=FutureWarning)
        nn.utils.weight_norm(layer, name)


def mask_half(layer: nn.Module, name: str) -> None:
    """Prune every second entry."""
    mask = torch.ones_like(getattr(layer, name))
    mask.view(-1)[::2] = 0
    prune.custom_from_mask(layer, name, mask)


KINDS = {
    "weight_norm": parametrizations.weight_norm,
    "old weight_norm": old_weight_norm,
    # Every read of the weight iterates, and torch's layer reads it twice a call: converged, it does not matter.
    "spectral_norm": partial(parametrizations.spectral_norm, n_power_iterations=300),
    "orthogonal": parametrizations.orthogonal,
    "pruning": mask_half,
}


def train(layer: nn.Module, x) -> dict[str, torch.Tensor]:
    """Train for two steps; return the output before and all parameters after."""
    output = layer(x)[0].detach()
    optimizer = torch.optim.SGD(layer.parameters(), 0.01)
    for _ in range(2):
        optimizer.zero_grad()
        result = layer(x)[0]
        (result * weights_like(result)).sum().backward()
        optimizer.step()
    return {"output": output} | dict(layer.state_dict())


@pytest.mark.parametrize(
    ("cell", "weight"),
    [
        ("lstm", "weight_ih_l0"),
        ("lstm", "weight_hh_l0"),
        ("gru", "weight_ih_l1"),
        ("rnn_tanh", "weight_hh_l1_reverse"),
        ("lstm_proj", "weight_hr_l0"),
    ],
)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("how", ["made as ours", "accelerated"])
def test_computed_weights_train_as_with_torch(how, kind, cell, weight, backend):
    theirs, ours = pair(cell, 3, 7, 2, bidirectional=True, **F64)
    x = torch.randn(5, 4, 3, **F64)
    if how == "accelerated":
        ours = copy.deepcopy(theirs)
    for layer in (theirs, ours):
        torch.manual_seed(1)
        KINDS[kind](layer, weight)
    if how == "accelerated":
        rnnfast.accelerate(ours)
    assert_all_close(train(theirs, x), train(ours, x))


class WeightDrop(nn.Module):
    """DropConnect on recurrent weights as in AWD-LSTM (Merity et al., 2018).

    The raw weight is this module's parameter. The layer's own is deleted, and a plain tensor set in its place.
    """

    def __init__(self, layer: nn.Module, name: str = "weight_hh_l0", p: float = 0.5):
        super().__init__()
        self.layer, self.name, self.p = layer, name, p
        self.raw = nn.Parameter(getattr(layer, name).data)
        delattr(layer, name)

    def forward(self, x):
        setattr(self.layer, self.name, nn.functional.dropout(self.raw, self.p, self.training))
        return self.layer(x)


@pytest.mark.filterwarnings("ignore:RNN module weights are not part of single contiguous chunk:UserWarning")
@pytest.mark.parametrize("cell", CELLS)
def test_weight_drop_trains_as_with_torch(cell, backend):
    theirs, ours = (WeightDrop(layer) for layer in pair(cell, 3, 7, **F64))
    x = torch.randn(5, 4, 3, **F64)
    trained = []
    for module in (theirs, ours):
        torch.manual_seed(2)
        trained.append(train(module, x))
    assert_all_close(*trained)
    assert not torch.equal(ours(x)[0], ours(x)[0])
    assert torch.equal(ours.eval()(x)[0], ours(x)[0])


def test_weight_drop_on_an_accelerated_layer(backend):
    layer = nn.LSTM(3, 7, **F64)
    dropped = WeightDrop(rnnfast.accelerate(layer))
    dropped(torch.randn(5, 4, 3, **F64))[0].sum().backward()
    assert dropped.raw.grad.abs().sum() > 0
