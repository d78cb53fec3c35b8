"""Tensors changed in place between forward and backward, and outputs detached in place."""

import pytest
import torch
from layers import pair
from torch import nn
from torch.nn.functional import dropout
from torch_releases import needs_saved_data

import rnnfast
from rnnfast import _torch, fast_path

X, H = 3, 4
CHANGES = {
    "add": lambda y: y.add_(1),
    "fill": lambda y: y.__setitem__((..., 0), 0.0),
    "mask": lambda y: y.masked_fill_(y > 0, 0.0),
    "relu": lambda y: y.relu_(),
    "dropout": lambda y: dropout(y, 0.5, inplace=True),
    "part": lambda y: y[1:].mul_(2),
}
FORMS = {"plain": {}, "both": {"bidirectional": True}, "deep": {"num_layers": 2, "batch_first": True}}


@pytest.fixture(autouse=True)
def forgotten():
    fast_path.recorded.clear()


def gradients(layer, x, change, **options):
    output, finals = layer(x, **options)
    torch.manual_seed(1)
    change(output)
    loss = output.square().sum() + sum(state.square().sum() for state in finals)
    return torch.autograd.grad(loss, [*(t for t in (x,) if t.requires_grad), *layer.parameters()])


@needs_saved_data
@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("cell", ["rnn_tanh", "gru"])
def test_the_output_may_change_before_backward(cell, form, change):
    theirs, ours = pair(cell, X, H, **FORMS[form])
    x = torch.randn(5, 2, X, requires_grad=True)
    wanted = gradients(theirs, x, CHANGES[change])
    for _ in range(4):
        torch.testing.assert_close(gradients(ours, x, CHANGES[change]), wanted)
    ours.recompute = True
    torch.testing.assert_close(gradients(ours, x, CHANGES[change]), wanted)
    ours.recompute = False
    wanted = gradients(theirs, x[:, 0].detach(), CHANGES[change])
    torch.testing.assert_close(gradients(ours, x[:, 0].detach(), CHANGES[change]), wanted)


@needs_saved_data
def test_the_output_may_change_in_other_forms():
    ours, x = rnnfast.LSTM(X, H, bidirectional=True), torch.randn(5, 2, X, requires_grad=True)
    lengths = torch.tensor([3, 5])
    output, (h, c) = ours(x, lengths=lengths)
    loss = torch.where(output > 0, output, 0).square().sum() + h.square().sum() + c.square().sum()
    wanted = torch.autograd.grad(loss, [x, *ours.parameters()])
    found = gradients(ours, x, CHANGES["relu"], lengths=lengths)
    torch.testing.assert_close(found, wanted)


@needs_saved_data
def test_second_derivatives_of_a_changed_output():
    theirs, ours = pair("gru", X, H, dtype=torch.float64)
    x = torch.randn(5, 2, X, dtype=torch.float64, requires_grad=True)

    def penalty(layer):
        output = layer(x)[0]
        output += 1
        (dx,) = torch.autograd.grad(output.square().sum(), x, create_graph=True)
        return torch.autograd.grad(dx.square().sum(), [x, *layer.parameters()])

    wanted = penalty(theirs)
    for _ in range(4):
        torch.testing.assert_close(penalty(ours), wanted)


@needs_saved_data
@pytest.mark.parametrize("name", ["weight_ih_l0", "bias_ih_l0", "bias_hh_l0"])
@pytest.mark.parametrize("cell", ["rnn_tanh", "gru"])
def test_weights_that_backward_does_not_use_may_change(cell, name):
    theirs, ours = pair(cell, X, H)
    x, results = torch.randn(5, 2, X), []
    for layer in (theirs, ours, ours, ours, ours):
        output = layer(x)[0]
        kept = getattr(layer, name).detach().clone()
        with torch.no_grad():
            getattr(layer, name).mul_(2)
        results.append(torch.autograd.grad(output.square().sum(), [*layer.parameters()]))
        with torch.no_grad():
            getattr(layer, name).copy_(kept)
    for found in results[1:]:
        torch.testing.assert_close(found, results[0])


def test_what_backward_does_use_may_not_change():
    ours = rnnfast.GRU(X, H)
    for name in ("x", "weight_hh_l0", "weight_ih_l0"):
        for _ in range(4):
            x = torch.randn(5, 2, X)
            output = ours(x.requires_grad_() if name == "weight_ih_l0" else x)[0]
            with torch.no_grad():
                (x if name == "x" else getattr(ours, name)).mul_(2)
            with pytest.raises(RuntimeError, match="modified by an inplace operation"):
                output.sum().backward()
    output = ours(torch.randn(5, 2, X))[0]
    loss = output.sum()
    loss.backward()
    with pytest.raises(RuntimeError, match="second time"):
        loss.backward()


def can_be_detached(tensor) -> bool:
    """Detach a tensor in place, and say whether torch let us."""
    try:
        return tensor.detach_().grad_fn is None
    except RuntimeError:
        return False


@pytest.mark.parametrize("grad", [False, True], ids=["inference", "training"])
@pytest.mark.parametrize("form", ["plain", "batch_first", "unbatched", "both"])
def test_detaching_in_place_is_the_same_in_every_call(form, grad):
    kind = {"batch_first": {"batch_first": True}, "both": {"bidirectional": True, "num_layers": 2}}.get(form, {})
    x = torch.randn(5, X) if form == "unbatched" else torch.randn(5, 2, X)
    layer, found = rnnfast.GRU(X, H, **kind), []
    for _ in range(4):
        with torch.set_grad_enabled(grad):
            results = layer(x)
        found += [can_be_detached(result) for result in results]
    assert found[2:] == found[:2] * 3
    if form in ("plain", "both") and not (grad and _torch.saving_hooks(True) is not None):
        assert all(found)


@pytest.mark.parametrize("name", ["LSTMCell", "GRUCell"])
def test_states_of_cells_can_be_detached_in_place(name):
    theirs, ours = getattr(nn, name)(X, H), getattr(rnnfast, name)(X, H)
    ours.load_state_dict(theirs.state_dict())
    x, results = torch.randn(2, X), []
    for cell in (theirs, ours, ours, ours, ours):
        states = cell(x)
        states = states if isinstance(states, tuple) else (states,)
        states[0].square().sum().backward()
        results.append((*(state.detach_() for state in states), *(p.grad for p in cell.parameters())))
        cell.zero_grad()
    for found in results[1:]:
        torch.testing.assert_close(found, results[0])


OTHERS = {
    "smaller": lambda weight: torch.zeros(1, 1),
    "larger": lambda weight: torch.zeros(20, 20),
    "narrower": lambda weight: weight.detach().half(),
}


@pytest.mark.parametrize("other", OTHERS)
@pytest.mark.parametrize("form", ["plain", "lengths", "deep", "cell"])
def test_other_data_of_a_weight_are_not_read_beyond_their_end(form, other):
    """torch does not count `weight.data = other`, so that saved weights look as if they were unchanged."""
    if form == "cell":
        layer, x, options, name = rnnfast.GRUCell(X, H), torch.randn(2, X), {}, "weight_hh"
    else:
        layer, x, name = rnnfast.GRU(X, H, num_layers=1 + (form == "deep")), torch.randn(5, 2, X), "weight_hh_l0"
        options = {"lengths": torch.tensor([3, 5])} if form == "lengths" else {}
    for _ in range(3):
        output = layer(x.requires_grad_(), **options)[0]
    weight = getattr(layer, name)
    weight.data = OTHERS[other](weight)
    with pytest.raises(RuntimeError, match="rnnfast: expected"):
        output.sum().backward()


@pytest.mark.parametrize("name", ["weight_ih_l0", "weight_hh_l0"])
def test_other_data_of_a_weight_are_not_read_beyond_their_end_by_second_derivatives(name):
    layer, x = rnnfast.GRU(X, H), torch.randn(5, 2, X, requires_grad=True)
    (gradient,) = torch.autograd.grad(layer(x)[0].square().sum(), x, create_graph=True)
    getattr(layer, name).data = torch.zeros(3 * H, 1)
    with pytest.raises(RuntimeError, match="rnnfast: expected"):
        gradient.square().sum().backward()
