"""What must not go wrong silently with frozen layers, and what must leave a model as it was."""

import pytest
import torch
from conftest import backends_under_test
from torch import nn

import rnnfast

pytestmark = pytest.mark.skipif(backends_under_test() != ["numba"], reason="these are kernels of the CPU")


def frozen(weights="float32", **options):
    return rnnfast.freeze(rnnfast.LSTM(8, 16, **options), weights)


@pytest.mark.parametrize("calls", [0, 2])
def test_no_derivative_is_lost(calls):
    layer, x = frozen(), torch.randn(5, 3, 8)
    for _ in range(calls):
        layer(x)
    with pytest.raises(RuntimeError, match="no gradient can be taken"):
        torch.func.jvp(lambda a: layer(a)[0], (x,), (x,))
    with pytest.raises(RuntimeError, match="no gradient can be taken"):
        torch.func.grad(lambda a: layer(a)[0].sum())(x)
    with torch.autograd.forward_ad.dual_level():
        layer(x)
        with pytest.raises(RuntimeError, match="no gradient can be taken"):
            layer(torch.autograd.forward_ad.make_dual(x, x))


@pytest.mark.parametrize("calls", [0, 2])
def test_memory_that_is_not_there(calls):
    layer, x = frozen(), torch.randn(5, 3, 8)
    for _ in range(calls):
        layer(x)
    zeros = torch._efficientzerotensor((5, 3, 8))
    assert torch.equal(layer(zeros)[0], layer(torch.zeros(5, 3, 8))[0])
    x.untyped_storage().resize_(0)
    with pytest.raises(RuntimeError, match="has no memory"):
        layer(x)


def test_calls_that_are_prepared_already_are_not_prepared_again(monkeypatch):
    """Those that go another way for what their sizes do not tell."""
    layer, x, made = frozen(), torch.randn(5, 3, 8), []
    prepare = rnnfast.frozen_ops.kernels().Prepared
    monkeypatch.setattr(rnnfast.frozen_ops.kernels(), "Prepared", lambda *args: made.append(args) or prepare(*args))
    hx = (torch.randn(1, 16, 3).mT, torch.randn(1, 16, 3).mT)
    negative = torch.complex(x, -x).conj().imag
    assert negative.is_neg()
    for _ in range(3):
        layer(x, hx)
        layer(negative)
        layer(torch._efficientzerotensor((5, 3, 8)))
        with torch.autocast("cpu", torch.bfloat16):
            layer(x.bfloat16())
    assert len(made) == 2  # with initial states, and without


def test_the_oldest_prepared_calls_are_forgotten(monkeypatch):
    monkeypatch.setattr(rnnfast.frozen, "MOST", 4)
    layer = frozen()
    for steps in range(1, 8):
        layer(torch.zeros(steps, 3, 8))
        assert [key[2][0] for key in layer._prepared] == [*range(max(1, steps - 3), steps + 1)]


def test_attributes_that_change():
    layer, x = frozen(), torch.randn(3, 5, 8)
    for _ in range(2):
        layer(x)
    layer.batch_first = True
    assert torch.equal(layer(x)[0], layer(x.clone())[0])
    assert layer(x)[1][0].shape == (1, 3, 16)


@pytest.mark.parametrize("model", [nn.Linear(2, 2), nn.LSTM(2, 2, dtype=torch.float64)], ids=["none", "refused"])
def test_a_warning_names_the_line_of_the_caller(model):
    with pytest.warns(RuntimeWarning, match="freeze: ") as caught:
        rnnfast.freeze(model)
    assert [each.filename for each in caught] == [__file__]


def test_integers_that_freezing_never_makes():
    layer = frozen("int8")
    state = layer.state_dict()
    state["weight_ih_l0"][0, 0, 0] = -128
    assert (layer.state_dict()["weight_ih_l0"] != -128).all()
    with pytest.raises(RuntimeError, match="expected integers from -127 to 127, got -128"):
        layer.load_state_dict(state)


def test_weights_that_bfloat16_does_not_hold():
    layer = rnnfast.LSTM(8, 16)
    with torch.no_grad():
        layer.weight_ih_l0[0, 0] = 3.4e38
    with pytest.raises(ValueError, match=r"expected weights that bfloat16 holds, got 3.4e\+38 in weight_ih_l0"):
        rnnfast.freeze(layer, "bfloat16")


def test_a_failure_changes_nothing(monkeypatch):
    model = nn.Sequential(rnnfast.LSTM(8, 16), rnnfast.GRU(16, 4))
    before = {name: each.clone() for name, each in model.state_dict().items()}
    real = rnnfast.frozen.Frozen.hold

    def fail(self, weights):
        if self.mode == "GRU":
            raise MemoryError
        real(self, weights)

    monkeypatch.setattr(rnnfast.frozen.Frozen, "hold", fail)
    with pytest.raises(MemoryError):
        rnnfast.freeze(model, "int8")
    assert all(torch.equal(before[name], each) for name, each in model.state_dict().items())
    assert model[0](torch.randn(2, 1, 8))[0].requires_grad


def test_under_another_default_device():
    layer = rnnfast.LSTM(8, 16)
    with torch.device("meta"):
        rnnfast.freeze(layer, "int8")
    assert layer(torch.zeros(2, 1, 8))[0].isfinite().all()


@pytest.mark.filterwarnings("ignore:.*weight_norm.*is deprecated")
def test_weights_that_hooks_make_and_wrong_shapes_are_left_alone():
    normed = nn.utils.weight_norm(nn.LSTM(8, 16), "weight_hh_l0")
    wide = rnnfast.LSTM(8, 16)
    wide.weight_ih_l0 = nn.Parameter(torch.randn(64, 9))
    for layer, reason in ((normed, "weight_hh_l0 is no parameter"), (wide, r"expected shape \[64, 8\], got \[64, 9\]")):
        with pytest.warns(RuntimeWarning, match=reason):
            rnnfast.freeze(layer, "int8")
        assert layer.weight_ih_l0.requires_grad
    assert normed(torch.randn(2, 1, 8))[0].requires_grad


def test_autocast_and_sparse_input():
    layer, x = frozen(), torch.randn(5, 3, 8)
    expected, (h, c) = layer(x)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(layer(x, (0 * h, (0 * c).bfloat16()))[0], expected)
    assert torch.equal(layer(x.to_sparse())[0], expected)


def test_the_largest_weight_stays_finite():
    layer = rnnfast.LSTM(8, 16)
    with torch.no_grad():
        layer.weight_ih_l0[0] = torch.finfo(torch.float32).max
    layer = rnnfast.freeze(layer, "int8")
    assert all(weight.isfinite().all() for weight in layer.dequantised())
    with rnnfast.use_backend("reference"):
        assert layer(torch.zeros(2, 1, 8))[0].isfinite().all()


@pytest.mark.parametrize(
    ("name", "value"),
    [("hidden_size", 3), ("num_layers", 2), ("bidirectional", True), ("bias", False), ("panels", None)],
)
@pytest.mark.parametrize("calls", [0, 2])
def test_what_a_call_depends_on_does_not_change(name, value, calls):
    layer = frozen("int8")
    for _ in range(calls):
        layer(torch.zeros(2, 1, 8))
    with pytest.raises(RuntimeError, match=f"{name} is frozen"):
        setattr(layer, name, value)
    with pytest.raises(RuntimeError, match=f"{name} is frozen"):
        delattr(layer, name)
    with pytest.raises(RuntimeError, match="weight_new is frozen"):
        layer.register_parameter("weight_new", nn.Parameter(torch.zeros(1)))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.int64])
def test_an_input_of_another_dtype_is_told_what_helps(dtype):
    with pytest.raises(ValueError, match=rf"FrozenLSTM: .* got {dtype}; convert it by input.float\(\)"):
        frozen().to(torch.float64)(torch.zeros(5, 3, 8, dtype=dtype))
