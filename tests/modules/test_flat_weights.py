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


def test_methods_that_torchs_forward_asks_are_not_ignored():
    with pytest.raises(TypeError, match=r"Mine: permute_hidden is asked by the forward of torch.nn's layers"):
        type("Mine", (rnnfast.GRU,), {"permute_hidden": lambda self, hx, order: hx})
    mixin = type("Mixin", (), {"check_forward_args": lambda self, *args: None})
    with pytest.raises(TypeError, match="Mixed: check_forward_args"):
        type("Mixed", (mixin, rnnfast.LSTM), {})
    type("Fine", (rnnfast.LSTM,), {"forward": lambda self, x: super().forward(x)})
    for layer in (rnnfast.RNN(2, 3), rnnfast.accelerate(nn.RNN(2, 3), keep_types=True)):
        with pytest.raises(TypeError, match="RNN: get_expected_hidden_size"):
            layer.get_expected_hidden_size = lambda *args: (1, 1, 3)


def test_restored_parametrized_layers_have_the_class_they_had():
    layer = nn.utils.parametrizations.weight_norm(nn.LSTM(2, 3), "weight_hh_l0")
    exact, x = type(layer), torch.randn(4, 2, 2)
    expected = layer(x)[0]
    for keep_types in (False, True):
        rnnfast.accelerate(layer, keep_types=keep_types)
        twin = copy.deepcopy(layer)
        for each in (twin, layer):
            torch.testing.assert_close(each(x)[0], expected)
            assert type(rnnfast.restore(each)) is exact
            torch.testing.assert_close(each(x)[0], expected)
    rnnfast.accelerate(layer)
    nn.utils.parametrizations.weight_norm(layer, "weight_ih_l0")
    nn.utils.parametrize.remove_parametrizations(layer, "weight_hh_l0")
    assert type(rnnfast.restore(layer)) is exact
    torch.testing.assert_close(layer(x)[0], expected)
    nn.utils.parametrize.remove_parametrizations(layer, "weight_ih_l0")
    assert type(layer) is nn.LSTM
    torch.testing.assert_close(layer(x)[0], expected)
    rnnfast.accelerate(layer)
    copy.deepcopy(layer)
    assert type(rnnfast.restore(layer)) is nn.LSTM


def test_what_can_be_read_only_once_is_refused():
    layer = rnnfast.GRU(3, 4)
    with pytest.raises(TypeError, match="expected a list of tensors, got generator"):
        layer._flat_weights = (weight * 2 for weight in layer.parameters())
    with pytest.raises(TypeError, match="expected a list of tensors, got dict_values"):
        layer._flat_weights = dict(layer.named_parameters()).values()
    layer(torch.randn(5, 2, 3))
