"""Each guard of `autograd.py`'s Functions has a test here that fails where it is deleted."""

import warnings

import pytest
import torch
from small_layers import F64, each, spied, weights
from torch.autograd import forward_ad
from torch.func import functional_call, grad, jvp, vmap
from torch.utils._python_dispatch import TorchDispatchMode

import rnnfast
from rnnfast import context
from rnnfast.functional import gru

# torch's forward mode scripts its own decompositions when it is first used.
pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated:DeprecationWarning")


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


# Who is differentiated


def test_nothing_is_kept_where_nothing_is_differentiated(monkeypatch):
    calls, x = spied(monkeypatch, "layer"), torch.randn(4, 2, 2, **F64)
    gru(x, weights(gru), lengths=torch.tensor([4, 2]))
    assert [call[4] for call in calls] == [False]


def test_gradients_around_and_below_a_map():
    w, x = weights(gru), torch.randn(3, 4, 2, 2, **F64, requires_grad=True)
    found = torch.autograd.grad(vmap(lambda x: gru(x, w)[0])(x).sin().sum(), x)[0]
    torch.testing.assert_close(found, torch.autograd.grad(each(lambda x: gru(x, w)[0], 3, x).sin().sum(), x)[0])


@pytest.mark.parametrize("nested", [1, 2])
def test_forward_mode(nested):
    """A Function's own rule sees the innermost `jvp` alone."""
    w, x, dx = weights(gru), *torch.randn(2, 4, 2, 2, **F64)
    step, results = 1e-4, []

    def run(x):
        return gru(x, w)[0]

    def once(x):
        return jvp(run, (x,), (dx,))[1]

    if nested == 1:
        results = [once(x), (run(x + step * dx) - run(x - step * dx)) / (2 * step)]
        with forward_ad.dual_level():
            results.append(forward_ad.unpack_dual(run(forward_ad.make_dual(x, dx))).tangent)
    else:
        results = [jvp(once, (x,), (dx,))[1], (once(x + step * dx) - once(x - step * dx)) / (2 * step)]
    for found in results:
        torch.testing.assert_close(found, results[1], rtol=1e-5, atol=1e-6)


def test_a_kept_wrapper_in_training():
    kept = []
    grad(lambda x: kept.append(x) or x.sum())(torch.randn(4, 2, 2, **F64))
    w = [each.requires_grad_() for each in weights(gru)]
    results = [gru(kept[0], w)[0] for _ in range(3)]
    assert all(torch.equal(results[0], each) for each in results)
    torch.autograd.grad(results[0].sum(), w)


# What stands before a tensor


class Seen(TorchDispatchMode):
    """Notes the operators that pass."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.append(function.name())
        return function(*args, **(kwargs or {}))


def test_modes_and_profilers_see_the_operator():
    module, x = rnnfast.GRU(2, 3), torch.randn(4, 2, 2)
    with torch.no_grad():
        for _ in range(3):
            module(x)
            with Seen() as seen:
                module(x)
            assert "rnnfast::layer" in seen.names
            with torch.profiler.profile() as profile:
                module(x)
            assert "rnnfast::layer" in {event.key for event in profile.key_averages()}


def test_fake_tensors_outside_of_their_mode():
    from torch._subclasses.fake_tensor import FakeTensorMode

    mode, w = FakeTensorMode(), weights(gru)
    fake = [mode.from_tensor(t) for t in (torch.randn(4, 2, 2, **F64), *w)]
    with torch.no_grad():
        for _ in range(3):
            assert gru(fake[0], fake[1:], all_states=True)[0].shape == (4, 2, 3)


def test_a_tensor_being_traced_is_not_plain():
    found, x = [], torch.randn(3)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # torch's of this way to trace
        torch.jit.trace(lambda a: found.append(context.is_plain((a,))) or a * 2, x, check_trace=False)
    assert found == [False]
    assert context.is_plain((x,))


# What of a derivative is computed, and by whom


def test_nothing_comes_of_no_gradient():
    class Nothing(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, g):
            return None

    w, x = weights(gru), torch.randn(4, 2, 2, **F64, requires_grad=True)
    Nothing.apply(gru(x, w, lengths=torch.tensor([4, 4]))[0]).sum().backward()
    assert x.grad is None


def test_only_what_is_asked_for_is_computed(monkeypatch):
    w, x = [each.requires_grad_() for each in weights(gru)], torch.randn(4, 2, 2, **F64, requires_grad=True)
    output = gru(x, w, lengths=torch.tensor([4, 2]))[0]
    calls = spied(monkeypatch, "layer_backward")
    torch.autograd.grad(output.sum(), x, create_graph=True)
    assert [call[4] for call in calls] == [[True, False, False, False]]


def test_a_third_derivative():
    """The second one must then be made of what autograd knows."""
    w, start, results = weights(gru), torch.randn(4, 2, 2, **F64), []
    for name in ("numba", "reference"):
        x = start.clone().requires_grad_()
        with rnnfast.use_backend(name):
            value = gru(x, w)[0].sin().sum()
            for _ in range(2):
                value = torch.autograd.grad(value, x, create_graph=True)[0].sin().sum()
            results.append(torch.autograd.grad(value, x)[0])
    torch.testing.assert_close(*results)


@pytest.mark.parametrize(("create_graph", "order"), [(False, 1), (True, 1), (True, 2)])
def test_forward_mode_over_backward(create_graph, order):
    """The tangent of a gradient, and of a gradient of a gradient, of x alone."""
    w, start, dx = weights(gru), *torch.randn(2, 4, 2, 2, **F64)
    results = []
    for name in ("numba", "reference"):
        with rnnfast.use_backend(name), forward_ad.dual_level():
            x = start.clone().requires_grad_()
            dual = forward_ad.make_dual(x, dx)
            # Without a graph the reference's gradients have no tangent.
            graph = create_graph or name == "reference" or order == 2
            found = torch.autograd.grad(gru(dual, w)[0].sin().sum(), dual, create_graph=graph)[0]
            if order == 2:
                found = torch.autograd.grad(found.sin().sum(), dual)[0]
            results.append(forward_ad.unpack_dual(found).tangent)
    torch.testing.assert_close(*results)


@pytest.mark.parametrize("argnum", [0, 1])
def test_forward_mode_over_some_gradients_under_torch_func(argnum):
    """Gradients that were not asked for have no change."""
    w, x = weights(gru), torch.randn(4, 2, 2, **F64)
    tangents = torch.randn_like(x), torch.randn_like(w[1])
    function = grad(lambda x, w_hh: gru(x, [w[0], w_hh, *w[2:]])[0].sin().sum(), argnum)
    results = []
    for name in ("numba", "reference"):
        with rnnfast.use_backend(name):
            results.append(jvp(function, (x, w[1]), tangents)[1])
    torch.testing.assert_close(*results)


def test_functional_call_under_grad_of_grad():
    module = rnnfast.GRU(2, 3, **F64)
    p = {name: each.detach() for name, each in module.named_parameters()}
    x, results = torch.randn(4, 2, 2, **F64), []

    def value(x):
        return functional_call(module, p, (x,))[0].sin().sum()

    for name in ("numba", "reference"):
        with rnnfast.use_backend(name):
            results.append(grad(lambda x: grad(value)(x).sin().sum())(x))
    torch.testing.assert_close(*results)
