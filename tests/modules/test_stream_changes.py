"""Stream: modules that change under it, copies, modes, graphs over its output, and states that do not fit."""

import copy
import pickle

import pytest
import torch
from closeness import assert_same, relative_error
from layers import CELLS, as_tuple, pair

import rnnfast

cells = pytest.mark.parametrize("cell", CELLS)
backends = pytest.mark.parametrize("name", ["auto", "reference", "torch"])


def rollout(stream, inputs) -> torch.Tensor:
    """Take a step for each input."""
    return torch.stack([stream(x).clone() for x in inputs])


@backends
def test_refresh_takes_another_size_with_a_state_of_zero(name):
    with rnnfast.use_backend(name):
        ours = rnnfast.LSTM(3, 5)
        stream = rnnfast.Stream(ours, 2)
        stream(torch.randn(2, 3))
        ours.__init__(40, 300, num_layers=2, proj_size=7)
        stream.refresh()
        x = torch.randn(4, 2, 40)
        torch.testing.assert_close(rollout(stream, x), ours(x)[0].detach())
        assert [s.shape for s in stream.state] == [(2, 2, 7), (2, 2, 300)]


@backends
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_refresh_takes_another_dtype_and_converts_the_state(name, dtype):
    with rnnfast.use_backend(name):
        ours = rnnfast.GRU(5, 17)
        stream = rnnfast.Stream(ours)
        stream(torch.randn(1, 5))
        state = stream.state.to(dtype)
        ours.to(dtype)
        stream.refresh()
        assert torch.equal(stream.state, state)
        x = torch.randn(1, 5, dtype=dtype)
        assert torch.equal(stream(x), ours(x[None], state)[0][0].detach())


def test_refresh_keeps_the_state_where_only_the_input_is_of_another_size(backend):
    ours = rnnfast.GRU(5, 17)
    stream = rnnfast.Stream(ours)
    stream(torch.randn(5))
    state = stream.state
    ours.__init__(64, 17)
    stream.refresh()
    assert torch.equal(stream.state, state)
    assert stream(torch.randn(64)).shape == (1, 17)


def test_refresh_refuses_what_does_not_fit_and_stays_as_it_was(backend):
    ours, x = rnnfast.GRU(5, 17), torch.randn(1, 5)
    stream = rnnfast.Stream(ours)
    expected = stream(x).clone()
    stream.reset()
    whole = ours.weight_hh_l0
    ours.weight_hh_l0 = torch.nn.Parameter(torch.randn(51, 4))
    with pytest.raises(RuntimeError, match=r"weights\[1\]"):
        stream.refresh()
    ours.weight_hh_l0 = torch.nn.Parameter(whole.detach().double())
    with pytest.raises(RuntimeError, match="same dtype"):
        stream.refresh()
    assert torch.equal(stream(x), expected)
    ours.__init__(5, 17, bidirectional=True)
    with pytest.raises(ValueError, match="one direction"):
        stream.refresh()


@backends
def test_changed_weights_are_not_seen_before_refresh(name):
    with rnnfast.use_backend(name), torch.no_grad():
        ours, x = rnnfast.LSTM(5, 17, 2), torch.randn(1, 5)
        stream = rnnfast.Stream(ours)
        expected = stream(x).clone()
        for weight in ours.parameters():
            weight.mul_(0.5)
        stream.reset()
        assert torch.equal(stream(x), expected)
        stream.refresh()
        stream.reset()
        assert not torch.equal(stream(x), expected)


@backends
@pytest.mark.parametrize(
    "copied", [copy.copy, copy.deepcopy, lambda s: pickle.loads(pickle.dumps(s))], ids=["copy", "deepcopy", "pickle"]
)
def test_a_copy_steps_by_itself(name, copied):
    with rnnfast.use_backend(name):
        ours, inputs = rnnfast.LSTM(5, 17, 2), torch.randn(6, 2, 5)
        expected = ours(inputs)[0].detach()
        stream = rnnfast.Stream(ours, 2)
        last = rollout(stream, inputs[:3])[-1]
        other = copied(stream)
        assert (other.module is ours) == (copied is copy.copy)
        assert torch.equal(other.output, last)
        torch.testing.assert_close(rollout(other, inputs[3:]), expected[3:])
        assert torch.equal(stream.output, last)
        torch.testing.assert_close(rollout(stream, inputs[3:]), expected[3:])
        other.reset()
        assert all(s.any() for s in stream.state)


@backends
@pytest.mark.parametrize("layers", [1, 2])
def test_inference_mode_may_begin_and_end_between_steps(name, layers):
    with rnnfast.use_backend(name):
        ours, inputs = rnnfast.GRU(5, 17, layers), torch.randn(6, 2, 5)
        expected = ours(inputs)[0].detach()
        with torch.inference_mode():
            inside = rnnfast.Stream(ours, 2)
            inside(inputs[0])
        outside = rnnfast.Stream(ours, 2)
        outside(inputs[0])
        for x, y in zip(inputs[1:], expected[1:], strict=True):
            torch.testing.assert_close(inside(x), y)
            with torch.inference_mode():
                torch.testing.assert_close(outside(x), y)
                inside.state = inside.state
            outside.state = outside.state
        with torch.inference_mode():
            outside.reset()
            outside.refresh()
        outside.reset()
        torch.testing.assert_close(outside(inputs[0]), expected[0])
        (inside(inputs[0]) * torch.ones(17, requires_grad=True)).sum().backward()


@backends
def test_a_module_made_in_inference_mode_can_be_streamed_outside(name):
    with rnnfast.use_backend(name):
        with torch.inference_mode():
            ours, x = rnnfast.LSTM(5, 17), torch.randn(3, 1, 5)
            expected = ours(x)[0]
        torch.testing.assert_close(rollout(rnnfast.Stream(ours), x), expected.clone())


@backends
def test_an_output_in_a_graph_may_not_be_overwritten(name):
    with rnnfast.use_backend(name):
        stream = rnnfast.Stream(rnnfast.GRU(5, 17))
        scale = torch.ones(17, requires_grad=True)
        product = stream(torch.randn(1, 5)) * scale
        stream(torch.randn(1, 5))
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            product.sum().backward()


@backends
def test_a_reset_leaves_the_output_alone(name):
    with rnnfast.use_backend(name):
        stream = rnnfast.Stream(rnnfast.GRU(5, 17))
        y = stream(torch.randn(1, 5))
        before = y.clone()
        stream.reset()
        assert torch.equal(y, before)


def test_a_state_that_does_not_fit_changes_nothing(backend):
    stream = rnnfast.Stream(rnnfast.LSTM(3, 5), 2)
    stream(torch.randn(2, 3))
    before, good = stream.state, torch.zeros(1, 2, 5)
    for bad in (torch.zeros(1, 1, 5), good.double(), torch.zeros(1, 2, 5, device="meta")):
        with pytest.raises(ValueError, match="Stream: expected a state of"):
            stream.state = (good, bad)
    for bad in (good.numpy() if good.is_cpu else 3, None):
        with pytest.raises(TypeError, match="Stream: expected a state of type Tensor"):
            stream.state = (good, bad)
    for wrong in (good, (good,), (good, good, good), ()):
        with pytest.raises(ValueError, match="expected 2 state tensor"):
            stream.state = wrong
    for old, now in zip(before, stream.state, strict=True):
        assert torch.equal(old, now)


@cells
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["f32", "f64"])
def test_chunks_and_steps_give_the_bits_of_one_call(cell, dtype, backend):
    _, ours = pair(cell, 5, 17, 2, dtype=dtype)
    x = torch.randn(11, 3, 5, dtype=dtype)
    with torch.no_grad():
        whole, finals = ours(x)
        state, parts = None, []
        for chunk in x.split(4):
            output, state = ours(chunk, state)
            parts.append(output)
    assert_same(whole, torch.cat(parts), backend)
    for a, b in zip(as_tuple(finals), as_tuple(state), strict=True):
        assert_same(a, b, backend)
    assert_same(whole, rollout(rnnfast.Stream(ours, 3), x), backend)


@cells
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["f16", "bf16"])
def test_half_precision_rounds_the_state_between_calls(cell, dtype, backend):
    """A stream is then a call for each step, and is off one call by a few roundings of the state."""
    _, ours = pair(cell, 5, 17, dtype=dtype)
    x = torch.randn(40, 3, 5, dtype=dtype)
    with torch.no_grad():
        whole, state, parts = ours(x)[0], None, []
        for step in x.split(1):
            output, state = ours(step, state)
            parts.append(output[0])
    steps = rollout(rnnfast.Stream(ours, 3), x)
    assert_same(torch.stack(parts), steps, backend)
    assert relative_error(whole, steps) <= 4 * torch.finfo(dtype).eps
    assert not torch.equal(whole, steps) or cell.startswith("rnn")  # whose state is its output
