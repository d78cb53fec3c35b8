"""Tensors whose memory is not what they mean, and what the quick path takes over from the first call."""

import copy
import warnings

import pytest
import torch
from torch.nn.utils.rnn import PackedSequence

import rnnfast
from rnnfast import fast_path
from rnnfast.backends import cpu
from rnnfast.backends.dispatch import automatic

LAYERS = {"rnn": rnnfast.RNN, "lstm": rnnfast.LSTM, "gru": rnnfast.GRU}


def negated(*size):
    """Return a view with the negative bit."""
    view = torch.randn(*size, dtype=torch.complex64).conj().imag
    assert view.is_neg()
    return view


def zeros(*size):
    return torch._efficientzerotensor(size)


@pytest.fixture(params=[False, True], ids=["inference", "training"])
def grad_mode(request):
    with torch.set_grad_enabled(request.param):
        yield request.param


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("make", [negated, zeros])
def test_input_state_and_incoming_gradient(name, make, grad_mode):
    ours = LAYERS[name](1, 2)
    x, h, dy = make(6, 3, 1), make(1, 3, 2), make(6, 3, 2)
    plain = [torch.zeros_like(t) + t for t in (x, h, dy)]
    for call in range(4):
        results = []
        for x_, h_, dy_ in ((x, h, dy), plain):
            output = ours(x_, (h_, h_) if name == "lstm" else h_)[0]
            grads = torch.autograd.grad(output, list(ours.parameters()), dy_) if grad_mode else ()
            results.append((output, *grads))
        torch.testing.assert_close(*results, msg=lambda text, call=call: f"call {call}: {text}")


@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta state")
@pytest.mark.parametrize("sparse", [torch.Tensor.to_sparse, torch.Tensor.to_sparse_csr], ids=["coo", "csr"])
@pytest.mark.parametrize("differentiated", [False, True])
def test_sparse_inputs_and_states(differentiated, sparse):
    layer, x, h = rnnfast.GRU(3, 5), torch.randn(4, 3), torch.randn(1, 5)
    frozen = rnnfast.freeze(copy.deepcopy(layer))
    with torch.set_grad_enabled(differentiated):
        expected = layer(x, h)[0]
        for _ in range(2):
            torch.testing.assert_close(layer(sparse(x), sparse(h))[0], expected)
        packed, rows = (PackedSequence(each, torch.tensor([3, 1])) for each in (sparse(x), x))
        torch.testing.assert_close(layer(packed)[0].data, layer(rows)[0].data)
        cell = rnnfast.GRUCell(3, 5)
        torch.testing.assert_close(cell(sparse(x), sparse(x @ torch.ones(3, 5))), cell(x, x @ torch.ones(3, 5)))
    with torch.no_grad():
        frozen(x, h)
        for given in ((sparse(x), h), (x, sparse(h)), (sparse(x), sparse(h))):
            torch.testing.assert_close(frozen(*given)[0], expected)


def test_sparse_weights():
    ours = rnnfast.GRU(3, 4)
    x = torch.randn(5, 2, 3)
    with torch.no_grad():
        want = ours(x)[0]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch warns once in a process that this layout is new
            sparse = ours.weight_ih_l0.detach().to_sparse_csr()
        for weight in (sparse, ours.weight_ih_l0.detach().to_sparse()):
            ours.weight_ih_l0 = torch.nn.Parameter(weight)
            for _ in range(3):
                torch.testing.assert_close(ours(x)[0], want)


def test_dead_wrapper():
    kept = []

    def loss(x):
        kept.append(x)
        return x.sum()

    torch.func.grad(loss)(torch.randn(5, 2, 3))
    ours = rnnfast.GRU(3, 4)
    with torch.no_grad():
        results = [ours(kept[0])[0] for _ in range(4)]
    assert all(torch.equal(results[0], each) for each in results)


@pytest.mark.parametrize("make", [negated, zeros])
def test_weights_that_are_not_what_memory_holds(make, grad_mode):
    ours, x = rnnfast.GRU(1, 2), torch.randn(5, 2, 1)
    for name in ("weight_ih_l0", "weight_hh_l0", "bias_hh_l0"):
        shape = getattr(ours, name).shape
        delattr(ours, name)
        setattr(ours, name, make(*shape))
        plain = {key: torch.zeros_like(value) + value for key, value in [(name, getattr(ours, name))]}
        for _ in range(4):
            torch.testing.assert_close(ours(x), torch.func.functional_call(ours, plain, (x,)))


def test_dead_wrappers_as_weights(grad_mode):
    kept = []

    def loss(weights):
        kept.append(weights)
        return sum(w.sum() for w in weights.values())

    ours, x = rnnfast.GRU(3, 4), torch.randn(5, 2, 3)
    torch.func.grad(loss)({name: w.detach() for name, w in ours.named_parameters()})
    for _ in range(4):
        result = torch.func.functional_call(ours, kept[0], (x,))
        torch.testing.assert_close(result, ours(x), rtol=0, atol=0)


@pytest.mark.parametrize("before", [0, 3])
@pytest.mark.parametrize("which", ["input", "weight"])
def test_memory_that_was_given_back(which, before, grad_mode):
    ours, x = rnnfast.GRU(3, 4), torch.randn(5, 2, 3)
    for _ in range(before):
        ours(x)
    (x if which == "input" else ours.weight_hh_l0).untyped_storage().resize_(0)
    with pytest.raises(RuntimeError, match="has no memory"):
        ours(x)


def test_memory_that_was_given_back_before_backward():
    for calls in (1, 3):
        ours, x = rnnfast.GRU(3, 4), torch.randn(5, 2, 3)
        for _ in range(calls):
            output = ours(x)[0]
        x.untyped_storage().resize_(0)
        with pytest.raises(RuntimeError, match="has no memory"):
            output.sum().backward()


def test_unsupported_at_every_call(monkeypatch, grad_mode):
    monkeypatch.setattr(cpu, "unsupported", lambda *args: "a reason")
    automatic.cache_clear()
    fast_path.recorded.clear()
    try:
        ours, x = rnnfast.GRU(3, 4), torch.randn(5, 2, 3)
        for _ in range(3):
            assert ours(x)[0].isfinite().all()
        assert not fast_path.recorded
    finally:
        automatic.cache_clear()


def test_complex_at_every_call(grad_mode):
    ours, x = rnnfast.GRU(3, 4, dtype=torch.complex64), torch.randn(5, 2, 3, dtype=torch.complex64)
    results = [ours(x)[0] for _ in range(3)]
    assert all(torch.equal(results[0], each) for each in results)


def test_form_of_the_state_at_every_call(grad_mode):
    ours, x, h = rnnfast.GRU(3, 4), torch.randn(5, 2, 3), torch.zeros(1, 2, 4)
    for _ in range(3):
        ours(x, h)
    for hx in ((h,), iter((h,))):
        with pytest.raises((AttributeError, TypeError, RuntimeError)):
            ours(x, hx)


def test_pre_dispatch_trace():
    from torch.fx.experimental.proxy_tensor import make_fx

    ours, x = rnnfast.GRU(3, 4), torch.randn(5, 2, 3)
    with torch.no_grad():
        graph = make_fx(lambda a: ours(a)[0], tracing_mode="real", pre_dispatch=True)(x)
        other = torch.randn(5, 2, 3)
        torch.testing.assert_close(graph(other), ours(other)[0])


@pytest.mark.parametrize("name", LAYERS)
def test_a_dimension_of_size_one_has_any_stride(name, grad_mode):
    ours, x = LAYERS[name](3, 4), torch.randn(5, 1, 3)
    odd = x.as_strided((5, 1, 3), (3, 2**62, 1))
    for _ in range(3):
        for lengths in (None, torch.tensor([4])):
            assert torch.equal(ours(odd, lengths=lengths)[0], ours(x, lengths=lengths)[0])
    for one in (x[:1].as_strided((1, 1, 3), (2**62, 2**61, 1)), x[:1].as_strided((1, 3), (2**62, 1))):
        assert torch.equal(ours(one)[0].flatten(), ours(x[:1])[0].flatten())
