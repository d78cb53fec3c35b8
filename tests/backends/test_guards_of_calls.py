"""Guards in front of kernels that few calls meet: each test fails where its guard is deleted."""

from dataclasses import replace

import pytest
import torch
from recurrent_layers import two_speeds
from torch.nn.utils.rnn import PackedSequence

import rnnfast
from rnnfast import fast_path, operator_checks, validate
from rnnfast.backends.cpu import pool
from rnnfast.functional import gru
from rnnfast.spec import Layer, Options, Weights


@pytest.fixture(autouse=True)
def forgotten():
    torch.manual_seed(0)
    fast_path.recorded.clear()


# The operators.


def gru_layer(**changes) -> Layer:
    """A GRU of 3 inputs, 4 units, 5 steps of 2 rows."""
    weights = Weights(torch.randn(12, 3), torch.randn(12, 4), torch.randn(12), torch.randn(12), None)
    return replace(Layer("gru", torch.randn(5, 2, 3), (torch.randn(1, 2, 4),), (weights,), (False,)), **changes)


WRONG = {
    "x of one dimension": ({"x": torch.randn(3)}, "expected x of shape"),
    "x of four": ({"x": torch.randn(1, 5, 2, 3)}, "expected x of shape"),
    "rows without sizes": ({"x": torch.randn(10, 3)}, "expected batch_sizes with an x of shape"),
    "hx of one dimension": ({"x": torch.randn(2, 3), "hx": (torch.randn(4),)}, r"expected hx\[0\] of shape"),
    "hx elsewhere": ({"hx": (torch.randn(1, 2, 4, device="meta"),)}, r"expected hx\[0\] of shape .* on cpu"),
}


@pytest.mark.parametrize(("changes", "words"), WRONG.values(), ids=WRONG)
def test_layers_that_do_not_fit_together(changes, words):
    operator_checks.check_layer(gru_layer())
    with pytest.raises(RuntimeError, match=words):
        operator_checks.check_layer(gru_layer(**changes))


@pytest.mark.parametrize("shape", [(5, 4), (5, 3, 4), (1, 1, 1, 1)], ids=str)
def test_signals_that_do_not_fit(shape):
    x, h = torch.randn(5, 2, 3), torch.randn(1, 2, 4)
    weights = Weights(torch.randn(12, 3), torch.randn(12, 4), torch.randn(12), torch.randn(12), None)
    layer = Layer(rnnfast.cells.augru.identity, x, (h,), (weights,), (False,), signals=(torch.randn(5, 1, 4),))
    operator_checks.check_layer(layer)
    layer = Layer(layer.cell, x, (h,), (weights,), (False,), signals=(torch.randn(shape),))
    with pytest.raises(RuntimeError, match="signal attention to be broadcastable"):
        operator_checks.check_layer(layer)


@pytest.mark.parametrize(("states", "gradients"), [(0, 2), (1, 1), (1, 3), (2, 2)])
def test_the_number_of_states_and_gradients(states, gradients):
    layer = gru_layer()
    state, final = torch.randn(5, 2, 1, 4), torch.randn(1, 2, 4)
    saved = [torch.empty(shape, dtype=dtype) for shape, dtype in operator_checks.load("numba").saved_like(layer)]
    operator_checks.check_backward(layer, "numba", [state], saved, [state, final])
    with pytest.raises(RuntimeError, match="expected 1 states and 2 gradients"):
        operator_checks.check_backward(layer, "numba", [state] * states, saved, [state, final, final][:gradients])


# The fast path.


def test_more_threads_than_cores_are_not_used(monkeypatch):
    asked, threads = [], torch.get_num_threads()
    usable = pool.usable
    monkeypatch.setattr(pool, "usable", lambda n: asked.append(n) or usable(n))
    layer, x = rnnfast.GRU(3, 4), torch.randn(5, 2, 3)
    layer(x)
    torch.set_num_threads(pool.known_cores + 1)
    try:
        with torch.no_grad():
            layer(x)
            del asked[:]
            layer(x)
    finally:
        torch.set_num_threads(threads)
    assert asked == [pool.known_cores + 1]


@pytest.mark.parametrize("train", [False, True])
def test_inputs_whose_last_stride_is_not_one(train):
    layer, x = rnnfast.GRU(3, 4), torch.randn(5, 3, 2).mT
    expected = layer(x.contiguous())[0]
    with torch.set_grad_enabled(train):
        for _ in range(4):
            assert torch.equal(layer(x)[0], expected)
    assert not [call for key, call in fast_path.recorded.items() if key[3] == x.stride()]


@pytest.mark.parametrize("sizes", [(0, 2), (5, 0), (0, 0)], ids=str)
def test_nothing_is_recorded_of_nothing(sizes):
    layer = rnnfast.LSTM(3, 4, num_layers=2)
    for _ in range(4):
        output, (h, c) = layer(torch.randn(*sizes, 3))
        assert output.shape == (*sizes, 4)
        assert h.shape == c.shape == (2, sizes[1], 4)
    assert not fast_path.recorded


def test_cells_whose_output_is_not_what_the_product_reads_are_not_stacked():
    @rnnfast.cell(gates="a", states="h c", output="h", read="c")
    def crossed(x, u, state):
        return torch.tanh(x.a + u.a), 0.5 * state[1] + state[0]

    assert fast_path.can_stack(Options(two_speeds.identity))
    assert not fast_path.can_stack(Options(crossed.identity))


def test_parameters_of_a_cell_train_in_every_call():
    layer, x = rnnfast.Recurrent(two_speeds, 3, 5, 2), torch.randn(4, 2, 3)
    found = []
    for backend in ("reference", *["auto"] * 4):
        with rnnfast.use_backend(backend):
            output, _ = layer(x)
        found.append(torch.autograd.grad(output.square().sum(), list(layer.parameters())))
    for grads in found[1:]:
        for a, b in zip(grads, found[0], strict=True):
            torch.testing.assert_close(a, b)


# Checks of arguments.


def test_states_and_weights_on_another_device():
    x, weights = torch.randn(5, 2, 3), [torch.randn(12, 3), torch.randn(12, 4), torch.randn(12), torch.randn(12)]
    with pytest.raises(RuntimeError, match="found input tensor at cpu and hidden tensor at meta"):
        gru(x, weights, torch.zeros(1, 2, 4, device="meta"))
    with pytest.raises(RuntimeError, match="found input tensor at cpu and parameter tensor at meta"):
        gru(x, [weight.to("meta") for weight in weights])


def test_states_of_another_dtype():
    """By name, where a later check speaks of all tensors."""
    words = "Input and hidden tensors are not the same dtype, got torch.float32 and torch.float64"
    with pytest.raises(RuntimeError, match=words):
        rnnfast.RNN(3, 4)(torch.randn(5, 2, 3), torch.zeros(1, 2, 4, dtype=torch.float64))


@pytest.mark.parametrize("count", [9, 7, 6])
def test_a_number_of_weights_that_layers_do_not_share(count):
    shapes = [(12, 3), (12, 4), (12,), (12,), (12, 4), (12, 4), (12,), (12,), (12,)]
    with pytest.raises(RuntimeError, match=f"expected 2 or 4 tensors for each of 2 layers, got {count} in all"):
        gru(torch.randn(5, 2, 3), [torch.randn(shape) for shape in shapes[:count]], num_layers=2)


def test_a_wrong_number_of_weights_for_a_declared_cell():
    layer = rnnfast.Recurrent(two_speeds, 3, 5)
    with pytest.raises(RuntimeError, match="weights: expected 5 tensors, got 4"):
        rnnfast.recurrent.recurrent(layer.options(), torch.randn(4, 2, 3), layer.weights()[:-1])


@pytest.mark.parametrize(
    ("data", "sizes", "words"),
    [
        (torch.randn(2, 2, 3), torch.tensor([2]), "input must have 2 dimensions, got 3"),
        (torch.randn(4, 3), torch.tensor([2, 2], dtype=torch.int32), "expected int64 numbers"),
        (torch.randn(4, 3), torch.tensor([1, 3]), "that never grow"),
        (torch.randn(4, 3), torch.tensor([2, 1]), "add up to the 4 rows"),
        (torch.randn(4, 3), torch.tensor([5, -1]), "that never grow"),
    ],
)
def test_a_packed_sequence_that_is_none(data, sizes, words):
    sequence = PackedSequence(torch.randn(4, 3), torch.tensor([2, 2]))._replace(data=data, batch_sizes=sizes)
    with pytest.raises(RuntimeError, match=words):
        rnnfast.GRU(3, 4)(sequence)


def test_autocast_is_asked_for_by_device(monkeypatch):
    """Autocast of another device changes nothing here; a device without it is not asked."""
    layer, x = rnnfast.GRU(3, 4), torch.randn(5, 2, 3)
    monkeypatch.setattr(validate._torch, "is_any_autocast_enabled", lambda: True)
    assert layer(x)[0].dtype == torch.float32
    assert not validate.is_autocast_on("meta")


# Streams.


@pytest.mark.parametrize("shape", [(2,), (4,), (1, 1, 3), (2, 3), ()], ids=str)
def test_a_stream_refuses_other_shapes(shape):
    stream = rnnfast.Stream(rnnfast.GRU(3, 4))
    stream(torch.randn(3))
    stream(torch.randn(1, 3))
    with pytest.raises(ValueError, match=r"expected input of shape \[1, 3\]"):
        stream(torch.randn(shape))
    with pytest.raises(ValueError, match=r"expected input of shape \[2, 3\]"):
        rnnfast.Stream(rnnfast.GRU(3, 4), 2)(torch.randn(3))


def test_a_copied_stream_over_another_module_has_no_output_of_the_first():
    stream = rnnfast.Stream(rnnfast.GRU(3, 4))
    stream(torch.randn(1, 3))
    kept = stream.__getstate__() | {"module": rnnfast.GRU(3, 5)}
    other = rnnfast.Stream.__new__(rnnfast.Stream)
    other.__setstate__(kept)
    assert torch.equal(other.output, torch.zeros(1, 5))


def test_sparse_weights_of_a_stream():
    layer = rnnfast.GRU(3, 4)
    expected = layer(x := torch.randn(1, 1, 3))[0][0]
    layer.weight_ih_l0 = torch.nn.Parameter(layer.weight_ih_l0.detach().to_sparse(), requires_grad=False)
    torch.testing.assert_close(rnnfast.Stream(layer)(x[0]), expected)
