"""`_flat_weights` set from outside, and methods that torch's forward asks: honoured, or said."""

import copy

import pytest
import torch
from layers import pair
from torch import nn

import rnnfast

F64 = {"dtype": torch.float64}


def other(layer):
    return [nn.Parameter(w.detach() * 0.5) for w in layer.parameters()]


@pytest.mark.parametrize("cell", ["rnn_tanh", "lstm", "gru"])
@pytest.mark.parametrize("how", ["list", "entry", "hook", "accelerated", "accelerated before"])
def test_assigned_weights_are_used_and_trained(cell, how, backend):
    theirs, ours = pair(cell, 3, 4, **F64)
    if how == "accelerated":
        ours = rnnfast.accelerate(copy.deepcopy(theirs))
    x, found = torch.randn(5, 2, 3, **F64), []
    if how == "accelerated before":
        ours = copy.deepcopy(theirs)
    for layer in (theirs, ours):
        mine = other(layer)
        if how == "hook":
            layer.register_forward_pre_hook(lambda m, args, mine=mine: setattr(m, "_flat_weights", list(mine)))
        elif how == "entry":
            layer._flat_weights[1] = mine[1]
        else:
            layer._flat_weights = list(mine)
        if how == "accelerated before" and layer is ours:
            rnnfast.accelerate(layer)
        for _ in range(3):
            output = layer(x)[0]
        output.square().sum().backward()
        layer.weight_hh_l0 = nn.Parameter(torch.zeros_like(layer.weight_hh_l0))
        found.append((output, mine[1].grad, None if how == "hook" else layer(x)[0]))
    torch.testing.assert_close(*found)
    assert found[1][1].abs().sum() > 0


class Checked(nn.LSTM):
    def check_forward_args(self, input, hidden, batch_sizes):
        raise RuntimeError("mine")


def test_a_layer_that_overrides_what_torch_asks_is_left_alone():
    layer = Checked(2, 3)
    for keep in (False, True):
        assert type(rnnfast.accelerate(layer, keep_types=keep)) is Checked
    assert "check_forward_args" in rnnfast.survey(layer)[0].reason


def test_an_lstm_has_torchs_checks():
    layer, x = rnnfast.LSTM(2, 3), torch.zeros(4, 5, 2)
    states = (torch.zeros(1, 5, 3), torch.zeros(1, 5, 3))
    layer.check_forward_args(x, states, None)
    assert layer.get_expected_cell_size(x, None) == (1, 5, 3)
    assert len(layer.permute_hidden(states, torch.arange(5))) == 2
