"""Streams of declared cells: the bits of one call over all steps, and states in the order of the declaration."""

import copy

import pytest
import torch
from conftest import backends_under_test
from recurrent_layers import two_speeds

import rnnfast
from rnnfast import cells

pytestmark = pytest.mark.skipif(backends_under_test() != ["numba"], reason="these are kernels of the CPU")


@rnnfast.cell(gates="a", states="h b c")
def three(x, u, state):
    h = torch.tanh(x.a + u.a + state[1])
    return h, torch.tanh(h + state[2]), 0.5 * (state[0] + state[1])


@pytest.mark.parametrize(
    "cell", [pytest.param(two_speeds, id="parameters"), pytest.param(three, id="three states", marks=pytest.mark.long)]
)
def test_steps_are_those_of_one_call(cell):
    layer, x = rnnfast.Recurrent(cell, 3, 19, 2), torch.randn(6, 2, 3)
    with torch.no_grad():
        output, finals = layer(x)
    stream = rnnfast.Stream(layer, 2)
    for step, expected in zip(x, output, strict=True):
        assert torch.equal(stream(step), expected)
    assert all(map(torch.equal, stream.state, finals))
    copied = copy.deepcopy(stream)
    assert all(map(torch.equal, copied.state, finals))
    stream.state = tuple(torch.randn_like(each) for each in finals)
    with torch.no_grad():
        expected, _ = layer(x[:1], stream.state)
    assert torch.equal(stream(x[0]), expected[0])
    assert not torch.equal(copied(x[0]), expected[0])


def test_cells_with_signals_are_refused():
    layer = rnnfast.Recurrent(cells.augru, 3, 4)
    with pytest.raises(ValueError, match="expected a cell without signals, got augru"):
        rnnfast.Stream(layer)
