"""Attributes of a layer that was made: what torch asks in every call is asked here in every call, too."""

import pytest
import torch
from recurrent_layers import two_speeds
from torch import nn

import rnnfast

X, H = torch.zeros(2, 3, 4), torch.zeros(1, 3, 5)
LAYERS = ("RNN", "LSTM", "GRU")
REFUSED = {"hidden_size": 6, "input_size": 3, "num_layers": 2, "bidirectional": True}


def error_of(call) -> tuple[type, str] | None:
    """Return the type and the message of what a call raises."""
    try:
        call()
    except Exception as error:
        return type(error), str(error)
    return None


def errors(name: str, calls: int, changes: dict, *args, sizes=(4, 5), **options) -> list:
    """Return what torch's layer raises, and ours, where attributes are changed after some calls."""
    found = []
    for module in (nn, rnnfast):
        layer = getattr(module, name)(*sizes, **options)
        for _ in range(calls):
            layer(args[0])
        for attribute, value in changes.items():
            setattr(layer, attribute, value)
        found.append(error_of(lambda layer=layer: layer(*args)))
    return found


@pytest.mark.parametrize("calls", [0, 3])
@pytest.mark.parametrize("attribute", REFUSED)
@pytest.mark.parametrize("name", LAYERS)
def test_sizes_that_the_weights_do_not_have(name, attribute, calls):
    theirs, ours = errors(name, calls, {attribute: REFUSED[attribute]}, X, (H, H) if name == "LSTM" else H)
    assert theirs is not None
    assert ours == theirs
    # Without a state torch's LSTM reads past the end of its memory.
    layer = getattr(rnnfast, name)(4, 5)
    for _ in range(calls):
        layer(X)
    setattr(layer, attribute, REFUSED[attribute])
    with pytest.raises(RuntimeError):
        layer(X)


@pytest.mark.parametrize("calls", [0, 3])
def test_the_size_of_a_projection(calls):
    theirs, ours = errors("LSTM", calls, {"proj_size": 3}, X, (H[..., :2], H), proj_size=2)
    assert ours == theirs
    assert ours is not None


@pytest.mark.parametrize("calls", [0, 3])
@pytest.mark.parametrize("mode", ["x", None, "GRU", "RNN_RELU"])
@pytest.mark.parametrize("name", LAYERS)
def test_the_mode(name, mode, calls):
    theirs, ours = errors(name, calls, {"mode": mode}, X)
    # torch 2.6 asserts without a word.
    assert ours == theirs or (theirs == (AssertionError, "") and ours[0] is AssertionError)


@pytest.mark.parametrize("calls", [0, 3])
@pytest.mark.parametrize("dropout", [-0.5, 1.5, "a"])
def test_what_is_no_probability(dropout, calls):
    theirs, ours = errors("GRU", calls, {"dropout": dropout}, X, num_layers=2)
    assert ours is not None
    assert theirs is not None
    assert ours[0] is theirs[0]
    weights = [*nn.GRU(4, 5, num_layers=2).parameters()]
    with pytest.raises(theirs[0]):
        rnnfast.functional.gru(X, weights, num_layers=2, dropout=dropout, training=True)


def test_a_declared_layer_and_a_stream():
    layer = rnnfast.Recurrent(two_speeds, 4, 5)
    layer(X)
    layer.hidden_size = 6
    with pytest.raises(RuntimeError, match="expected shape"):
        layer(X)
    gru = rnnfast.GRU(4, 5)
    stream = rnnfast.Stream(gru, 3)
    gru.input_size = 3
    with pytest.raises(RuntimeError, match="must be equal to input_size"):
        stream.refresh()
    for wrong in ([1.0], None, (X[0],)):
        with pytest.raises(TypeError, match="Stream: expected an input of type Tensor, got "):
            stream(wrong)


@pytest.mark.parametrize("sizes", [{"hidden_size": 6}, {"input_size": 6}, {"hidden_size": 6, "input_size": 6}], ids=str)
@pytest.mark.parametrize("state", [False, True])
@pytest.mark.parametrize("name", ["RNNCell", "LSTMCell", "GRUCell"])
def test_sizes_of_cells(name, state, sizes, backend):
    """torch asks the weights, and of the attributes only that which zeros are made of."""
    args = ((H[0], H[0]) if name == "LSTMCell" else H[0],) if state else ()
    theirs, ours = errors(name, 1, sizes, X[0], *args)
    assert ours == theirs
