"""Which calls have a key of the fast path, and what is recorded: each guard has a test that fails without it."""

from contextlib import nullcontext

import pytest
import torch
from recurrent_layers import two_speeds
from torch.autograd import forward_ad
from torch_releases import needs_saving_hooks

import rnnfast
from rnnfast import fast_path
from rnnfast.functional import gru
from rnnfast.spec import Options

with_training = pytest.mark.parametrize("training", [False, pytest.param(True, marks=needs_saving_hooks)])


@pytest.fixture(autouse=True)
def forgotten():
    torch.manual_seed(0)
    fast_path.recorded.clear()


def weights() -> list[torch.Tensor]:
    """Return those of a GRU of 3 inputs and 4 units."""
    return [torch.randn(12, 3), torch.randn(12, 4), torch.randn(12), torch.randn(12)]


def has_key(x=None, states=(), options=None, training=False) -> bool:
    """Say whether a call of a GRU has a key, with or without a gradient."""
    given = [weight.requires_grad_(training) for weight in weights()]
    x = torch.randn(5, 2, 3) if x is None else x
    with torch.set_grad_enabled(training):
        return fast_path.key_of(options or Options("gru"), x, states, given) is not None


@with_training
def test_plain_calls_have_a_key(training):
    assert has_key(training=training)
    assert has_key(states=(torch.zeros(1, 2, 4),), training=training)


def test_calls_off_the_cpu_or_with_another_number_of_states_have_none():
    assert not has_key(torch.randn(5, 2, 3, device="meta"))
    assert fast_path.states_of(Options("lstm"), (torch.zeros(1, 2, 4),) * 3) is None


@pytest.mark.parametrize(
    "around",
    [
        lambda: rnnfast.use_backend("reference"),
        lambda: rnnfast.use_backend("torch"),
        lambda: torch.autocast("cpu", torch.bfloat16),
        torch.profiler.profile,
        forward_ad.dual_level,
    ],
    ids=["reference", "torch", "autocast", "profiler", "dual level"],
)
def test_calls_inside_of_something_have_none(around):
    with around():
        assert not has_key()


def test_tensors_that_are_not_laid_out_or_mean_something_else_have_none():
    assert not has_key(states=(torch.zeros(1, 4, 2).mT,))
    assert not has_key(torch.view_as_complex(torch.randn(5, 2, 3, 2)).conj().imag)


@pytest.mark.parametrize(
    ("name", "x", "options", "around"),
    [
        ("unbatched", torch.zeros(5, 3), Options("gru"), nullcontext),
        ("recomputed", None, Options("gru", recompute=True), nullcontext),
        ("hooks", None, Options("gru"), lambda: torch.autograd.graph.saved_tensors_hooks(id, id)),
    ],
    ids=lambda each: each if isinstance(each, str) else "",
)
def test_calls_that_training_alone_keeps_off(name, x, options, around):
    with around():
        assert has_key(x, options=options)
        assert not has_key(x, options=options, training=True)


@needs_saving_hooks
def test_dropout_is_on_the_fast_path_in_training_with_gradients_alone():
    options = Options("gru", dropout=0.5, training=True)
    assert has_key(options=options, training=True)
    assert not has_key(options=options)
    assert has_key(options=options._replace(training=False))


def test_calls_stay_recorded():
    with torch.no_grad():
        for steps in (3, 4, 5):
            gru(torch.randn(steps, 2, 3), weights())
    assert len(fast_path.recorded) == 3


def test_layers_that_are_not_stacked_are_not_recorded(monkeypatch):
    x, given = torch.randn(5, 2, 3), weights()
    key = fast_path.key_of(Options("gru"), x, (), given)
    assert fast_path.record(key, x, (), given, None) is not None
    monkeypatch.setattr(fast_path, "can_stack", lambda options: False)
    assert fast_path.record(key, x, (), given, None) is None


@with_training
def test_weights_are_laid_out_where_a_cell_has_parameters_alone(monkeypatch, training):
    arranged, arrange = [], fast_path.flat_weights
    monkeypatch.setattr(fast_path, "flat_weights", lambda *args: arranged.append(args) or arrange(*args))
    for layer, expected in ((rnnfast.GRU(3, 4), 0), (rnnfast.Recurrent(two_speeds, 3, 4), 3)):
        with torch.set_grad_enabled(training):
            results = [layer(torch.ones(5, 2, 3))[0] for _ in range(3)]
        assert len(arranged) == expected
        with rnnfast.use_backend("reference"):
            torch.testing.assert_close(results[2], layer(torch.ones(5, 2, 3))[0])


class Nothing(torch.autograd.Function):
    """Has no gradient."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, g):
        return None


@needs_saving_hooks
def test_nothing_comes_of_no_gradient_on_the_fast_path():
    given = weights()
    for _ in range(3):
        x = torch.randn(5, 2, 3, requires_grad=True)
        Nothing.apply(gru(x, given)[0]).sum().backward()
        assert x.grad is None
    assert fast_path.recorded
