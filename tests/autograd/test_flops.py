"""FlopCounterMode counts what the layers multiply, as it does for torch's."""

import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import pack_sequence
from torch.utils.flop_counter import FlopCounterMode

import rnnfast

T, B, X, H, P = 5, 3, 2, 4, 3
GATES = {"RNN": 1, "LSTM": 4, "GRU": 3}


def counted(run) -> int:
    with FlopCounterMode(display=False) as mode:
        run()
    return mode.get_total_flops()


@pytest.mark.parametrize("call", range(3))
@pytest.mark.parametrize("directions", [1, 2])
@pytest.mark.parametrize(("name", "projection"), [*((name, 0) for name in GATES), ("LSTM", P)])
def test_both_passes_by_hand(name, directions, projection, call):
    size = {"proj_size": P} if projection else {}
    layer = getattr(rnnfast, name)(X, H, bidirectional=directions == 2, **size)
    x, width, columns = torch.randn(T, B, X), projection or H, GATES[name] * H
    for _ in range(call):
        layer(x)[0].sum().backward()
    outputs = []
    by_input, by_state, by_projection = columns * X, columns * width, projection * H
    each = 2 * directions * T * B
    assert counted(lambda: outputs.append(layer(x)[0])) == each * (by_input + by_state + by_projection)
    # Weights' gradients, and the way back from each step but the first to the one before.
    back = each * (by_input + 2 * by_state + 2 * by_projection) - 2 * directions * B * by_state
    assert counted(lambda: outputs[0].sum().backward()) == back
    with torch.no_grad():
        assert counted(lambda: layer(x)) == each * (by_input + by_state + by_projection)


@pytest.mark.parametrize("name", ["RNN", "GRU"])
@pytest.mark.parametrize("need_x", [False, True])
def test_both_passes_against_torchs(name, need_x):
    def run(library):
        layer = getattr(library, name)(X, H, 2, bidirectional=True)
        layer(torch.randn(T, B, X, requires_grad=need_x))[0].sum().backward()

    assert counted(lambda: run(rnnfast)) == counted(lambda: run(nn))


@pytest.mark.parametrize("name", GATES)
def test_packed_input(name):
    layer, outputs = getattr(rnnfast, name)(X, H), []
    x = pack_sequence([torch.randn(steps, X) for steps in (5, 3, 1)])
    columns = GATES[name] * H
    assert counted(lambda: outputs.append(layer(x)[0].data)) == 2 * 9 * columns * (X + H)
    assert counted(lambda: outputs[0].sum().backward()) == 2 * columns * (9 * (X + H) + (9 - 3) * H)


def test_padding_is_not_counted():
    layer, x = rnnfast.LSTM(X, H), torch.randn(T, B, X)
    with torch.no_grad():
        assert counted(lambda: layer(x, lengths=torch.tensor([5, 3, 1]))) == 2 * 9 * 4 * H * (X + H)


@pytest.mark.parametrize("name", ["LSTMCell", "GRUCell"])
def test_cells(name):
    cell, gates = getattr(rnnfast, name)(X, H), GATES[name.removesuffix("Cell")]
    with torch.no_grad():
        assert counted(lambda: cell(torch.randn(B, X))) == 2 * B * gates * H * (X + H)
