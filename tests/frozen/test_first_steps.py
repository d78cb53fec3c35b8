"""A first step from zero states reads no recurrent weights, and has the bits of one that does."""

import copy

import pytest
import torch

import rnnfast

LONG = pytest.mark.long


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(13)
    before = torch.get_num_threads()
    with torch.no_grad():
        yield
    torch.set_num_threads(before)


def bits(results) -> list[torch.Tensor]:
    return [each.contiguous().view(torch.int32) for each in torch.utils._pytree.tree_leaves(results)]


def same_bits(a, b) -> bool:
    return all(torch.equal(x, y) for x, y in zip(bits(a), bits(b), strict=True))


@pytest.mark.parametrize("weights", ["float32", "int8", pytest.param("bfloat16", marks=LONG)])
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("sizes", [(1, 1, 3, 7), (1, 5, 40, 33), (4, 2, 9, 130), (1, 1, 300, 650)])
def test_zero_states_given_or_not(weights, threads, sizes):
    torch.set_num_threads(threads)
    steps, batch, inputs, hidden = sizes
    projected = {"proj_size": 5} if hidden == 33 else {}
    layer = rnnfast.freeze(
        rnnfast.LSTM(inputs, hidden, num_layers=2, bidirectional=hidden == 130, **projected), weights
    )
    x, rows = torch.randn(steps, batch, inputs), 2 * (1 + layer.bidirectional)
    hx = torch.zeros(rows, batch, layer.proj_size or hidden), torch.zeros(rows, batch, hidden)
    expected = layer(x, hx)
    for _ in range(3):  # the first call, which passes zeros as tensors, and those that do not
        assert same_bits(layer(x), expected)


def test_biases_of_either_zero():
    plain = rnnfast.GRU(3, 20)
    plain.bias_hh_l0.zero_()
    plain.bias_hh_l0[::3] = -0.0
    plain.bias_ih_l0[:] = -0.0
    layer, x = rnnfast.freeze(copy.deepcopy(plain), "float32"), torch.zeros(2, 4, 3)
    for _ in range(3):
        assert same_bits(layer(x), plain(x))


def test_weights_that_are_not_finite_still_count():
    """Layers that are not frozen take every product: zero times infinity is NaN."""
    layer = rnnfast.GRU(3, 20)
    layer.weight_hh_l0[0, 0] = float("inf")
    for _ in range(2):
        assert layer(torch.zeros(1, 2, 3))[0].isnan().any()
