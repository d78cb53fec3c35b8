"""Stream: single steps equal one call to the bit, keep their state, and allocate nothing."""

import copy
import threading

import pytest
import torch
from closeness import assert_close, assert_same
from layers import CELLS, as_tuple, pair

import rnnfast

cells = pytest.mark.parametrize("cell", CELLS)


@cells
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=["f32", "f64", "bf16"])
def test_steps_equal_one_call(cell, dtype, backend):
    _, ours = pair(cell, 5, 17, 2, dropout=0.5, dtype=dtype)
    x = torch.randn(9, 3, 5, dtype=dtype)
    ours.eval()
    whole, finals = ours(x)
    ours.train()
    stream = rnnfast.Stream(ours, 3)
    steps = torch.stack([stream(step).clone() for step in x])
    if dtype == torch.bfloat16:  # between calls the carried state is rounded
        assert_close("output", whole, steps)
        return
    assert_same(whole, steps, backend)
    for a, b in zip(as_tuple(finals), as_tuple(stream.state), strict=True):
        assert_same(a, b, backend)
    assert ours.training


@cells
def test_state_can_be_set_read_and_reset(cell, backend):
    _, ours = pair(cell, 5, 17, 2)
    x = torch.randn(2, 5)
    stream = rnnfast.Stream(ours, 2)
    fresh = stream(x).clone()
    state = stream.state
    second = stream(x).clone()
    stream.state = state
    assert torch.equal(stream(x), second)
    stream.reset(torch.tensor([True, False]))
    mixed = stream(x).clone()
    assert torch.equal(mixed[0], fresh[0])
    assert not torch.equal(mixed[1], fresh[1])
    stream.reset()
    assert torch.equal(stream(x), fresh)


def test_refresh_reads_changed_weights(backend):
    ours = rnnfast.GRU(5, 17)
    x = torch.randn(1, 5)
    stream = rnnfast.Stream(ours)
    with torch.no_grad():
        ours.weight_ih_l0.mul_(0.5)
    stream.refresh()
    assert torch.equal(stream(x), ours(x[None])[0][0])


def test_results_live_in_one_place(backend):
    stream = rnnfast.Stream(rnnfast.LSTM(5, 17))
    if backend == "numba":
        assert stream(torch.randn(5)).data_ptr() == stream(torch.randn(1, 5)).data_ptr()


def test_other_backends_run_the_module(backend):
    ours = rnnfast.LSTM(5, 17, 2, batch_first=True)
    x = torch.randn(4, 6, 5)
    expected = ours(x)[0]
    with rnnfast.use_backend("reference"):
        stream = rnnfast.Stream(ours, 4)
        got = torch.stack([stream(x[:, t]).clone() for t in range(6)], 1)
    torch.testing.assert_close(got, expected)


def test_one_stream_per_thread(backend):
    ours = rnnfast.LSTM(5, 33)
    inputs = [torch.randn(200, 1, 5) for _ in range(4)]
    expected = [ours(x)[0].detach() for x in inputs]
    got = [None] * 4

    def work(n):
        with rnnfast.use_backend(backend):
            stream = rnnfast.Stream(ours)
            got[n] = torch.stack([stream(step).clone() for step in inputs[n]])

    threads = [threading.Thread(target=work, args=(n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for a, b in zip(expected, got, strict=True):
        assert_same(a, b, backend)


def test_mistakes(backend):
    with pytest.raises(TypeError, match="expected an rnnfast RNN, LSTM or GRU, got Linear"):
        rnnfast.Stream(torch.nn.Linear(3, 5))
    with pytest.raises(ValueError, match="one direction"):
        rnnfast.Stream(rnnfast.GRU(3, 5, bidirectional=True))
    stream = rnnfast.Stream(rnnfast.GRU(3, 5), 2)
    with pytest.raises(ValueError, match=r"expected input of shape \[2, 3\], got \[3\]"):
        stream(torch.zeros(3))
    with pytest.raises(ValueError, match=r"expected a state of shape \[1, 2, 5\], got \[1, 1, 5\]"):
        stream.state = torch.zeros(1, 1, 5)


def test_a_sparse_input(backend):
    x = torch.eye(5)[None, :, 1]
    one, other = (rnnfast.Stream(rnnfast.GRU(5, 3)) for _ in range(2))
    other.module.load_state_dict(one.module.state_dict())
    other.refresh()
    assert torch.equal(one(x.to_sparse()), other(x))


@pytest.mark.parametrize("weights", [None, "float32"], ids=["module", "frozen"])
def test_an_input_of_another_dtype_or_device_is_refused(weights):
    layer = rnnfast.GRU(5, 3)
    stream, x = rnnfast.Stream(rnnfast.freeze(layer, weights) if weights else layer), torch.ones(1, 5)
    expected = stream(x).clone()
    state = stream.state
    for wrong in (x.long(), x.double(), x.bfloat16(), x + 0j, x.to("meta")):
        with pytest.raises(ValueError, match=rf"expected input of torch.float32 on cpu, got {wrong.dtype}"):
            stream(wrong)
    assert torch.equal(stream.state, state)
    stream.reset()
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(stream(x.bfloat16()), expected)
        with pytest.raises(ValueError, match=r"got torch.int64"):
            stream(x.long())


def test_the_module_is_untouched(backend):
    ours = rnnfast.LSTM(5, 17)
    before = copy.deepcopy(ours.state_dict())
    stream = rnnfast.Stream(ours)
    stream(torch.randn(1, 5))
    assert all(torch.equal(before[k], v) for k, v in ours.state_dict().items())
    assert all(p.requires_grad for p in ours.parameters())
