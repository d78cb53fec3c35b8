"""Tensors and layouts that look like others: what they mean counts, not where or how they are kept."""

import pytest
import torch
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence

import rnnfast


@pytest.mark.parametrize("backend", ["numba", "reference"])
@pytest.mark.parametrize("sorted_by_torch", [False, True])
def test_resets_of_a_packed_sequence(backend, sorted_by_torch):
    torch.manual_seed(0)
    ours, x = rnnfast.GRU(3, 4), torch.randn(5, 2, 3)
    resets = torch.rand(5, 2) < 0.5
    lengths = torch.tensor([5, 3])
    packed = pack_padded_sequence(x, lengths, enforce_sorted=not sorted_by_torch)
    assert (packed.sorted_indices is None) == (not sorted_by_torch)
    with rnnfast.use_backend(backend):
        got = ours(packed, torch.ones(1, 2, 4), resets=resets)
        want = ours(x, torch.ones(1, 2, 4), lengths=lengths, resets=resets)
    torch.testing.assert_close(got[1], want[1])


@pytest.mark.parametrize("backend", ["numba", "reference"])
def test_a_reset_at_the_first_step_of_a_packed_sequence(backend):
    ours = rnnfast.RNN(1, 1)
    with torch.no_grad():
        for parameter, value in zip(ours.parameters(), (1.0, 1.0, 0.25, 0.25), strict=True):
            parameter.fill_(value)
    packed = PackedSequence(torch.tensor([[-2.0430]]), torch.tensor([1]))
    with rnnfast.use_backend(backend):
        got = ours(packed, torch.ones(1, 1, 1), resets=torch.ones(1, 1, dtype=torch.bool))[0].data
    torch.testing.assert_close(got.item(), -0.91257, atol=1e-4, rtol=0)
