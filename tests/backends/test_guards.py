"""Each guard of `autograd.py` and `vmap.py` has a test here that fails where it is deleted."""

import warnings
from functools import partial

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.func import functional_call, grad, hessian, jacrev, jvp, vmap
from torch.utils._python_dispatch import TorchDispatchMode

import rnnfast
from rnnfast import autograd, context, operators
from rnnfast.functional import gru, lstm

# torch's forward mode scripts its own decompositions when it is first used.
pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated:DeprecationWarning")

F64 = {"dtype": torch.float64}
GATES = {gru: 3, lstm: 4}


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def weights(cell, *members: int) -> list[Tensor]:
    """Return weights for 2 inputs and 3 units."""
    rows = 3 * GATES[cell]
    return [torch.randn(*members, *shape, **F64) for shape in ((rows, 2), (rows, 3), (rows,), (rows,))]


def each(function, size: int, *args):
    """Do what `vmap` does, in a loop over members."""
    found = [function(*(a[n] for a in args)) for n in range(size)]
    return tuple(map(torch.stack, zip(*found, strict=True))) if isinstance(found[0], tuple) else torch.stack(found)


def spied(monkeypatch, name: str) -> list[tuple]:
    """Return a list that grows by the arguments of every call of an operator."""
    calls, function = [], getattr(operators, name)
    monkeypatch.setattr(operators, name, lambda *args: calls.append(args) or function(*args))
    return calls


# vmap: which members run together


def test_members_with_lengths_of_their_own():
    w, x, lengths = weights(gru), torch.randn(4, 2, 2, **F64), torch.tensor([[1, 4], [0, 2], [3, 3]])

    def run(lengths):
        return gru(x, w, lengths=lengths)[0]

    def gradient(lengths):
        return jacrev(lambda x: gru(x, w, lengths=lengths)[0].sin().sum())(x)

    for function in (run, gradient):
        torch.testing.assert_close(vmap(function)(lengths), each(function, 3, lengths))


@pytest.mark.parametrize("differentiated", [False, True])
def test_members_with_weights_and_resets_of_their_own(differentiated):
    w, x, resets = weights(gru, 3), torch.randn(4, 2, 2, **F64), torch.rand(3, 4, 2) < 0.5

    def run(resets, *w):
        return gru(x, list(w), resets=resets)[0].sin().sum()

    function = grad(run, (1, 2)) if differentiated else run
    torch.testing.assert_close(vmap(function)(resets, *w), each(function, 3, resets, *w))


@pytest.mark.parametrize("own_weights", [False, True])
def test_states_that_were_not_asked_for_have_no_members(own_weights):
    w, x = weights(lstm, *(3,) * own_weights), torch.randn(3, 4, 2, 2, **F64)
    found = vmap(lambda x, w: lstm(x, w)[0], (0, 0 if own_weights else None))(x, w)
    expected = [lstm(x[n], [each[n] for each in w] if own_weights else w)[0] for n in range(3)]
    torch.testing.assert_close(found, torch.stack(expected))


def test_a_shared_input_has_a_gradient_of_each_member():
    w, x = weights(gru, 3), torch.randn(4, 2, 2, **F64)
    gradient = grad(lambda x, *w: gru(x, list(w))[0].sin().sum())
    torch.testing.assert_close(vmap(partial(gradient, x))(*w), each(partial(gradient, x), 3, *w))


# vmap: gradients of samples


def loss(w_hh: Tensor, x: Tensor, w: list[Tensor]) -> Tensor:
    return gru(x[:, None], [w[0], w_hh, *w[2:]])[0].sin().sum()


@pytest.mark.parametrize("samples", [1, 3])
def test_gradients_of_samples_of_samples(samples):
    w, x = weights(gru), torch.randn(2, samples, 4, 2, **F64)
    gradient = grad(partial(loss, w=w))
    found = vmap(vmap(gradient, (None, 0)), (None, 0))(w[1], x)
    expected = torch.stack([torch.stack([gradient(w[1], sample) for sample in row]) for row in x])
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("by", ["weights", "x"])
@pytest.mark.parametrize("nested", [1, 2])
def test_autograd_over_gradients_of_samples(nested, by):
    """Below a map a tensor does not say itself that it wants a gradient."""
    w, x, results = weights(gru), torch.randn(2, 2, 4, 2, **F64), []
    gradient = grad(partial(loss, w=w))

    def mapped(p, x):
        once = vmap(gradient, (None, 0))
        return vmap(once, (None, 0))(p, x) if nested == 2 else once(p, x[0])

    def plain(p, x):
        found = torch.stack([torch.stack([gradient(p, sample) for sample in row]) for row in x])
        return found if nested == 2 else found[0]

    for function in (mapped, plain):
        leaves = [each.clone().requires_grad_(name == by) for name, each in (("weights", w[1]), ("x", x))]
        leaf = leaves[by == "x"]
        results.append(torch.autograd.grad(function(*leaves).sin().sum(), leaf)[0])
    torch.testing.assert_close(*results)


def test_forward_mode_over_gradients_of_samples():
    w, x = weights(gru), torch.randn(3, 4, 2, **F64)
    dp, gradient = torch.randn_like(w[1]), grad(partial(loss, w=w))
    expected = jvp(lambda p: torch.stack([gradient(p, s) for s in x]), (w[1],), (dp,))[1]
    torch.testing.assert_close(jvp(lambda p: vmap(gradient, (None, 0))(p, x), (w[1],), (dp,))[1], expected)
    with forward_ad.dual_level():
        found = vmap(gradient, (None, 0))(forward_ad.make_dual(w[1], dp), x)
        torch.testing.assert_close(forward_ad.unpack_dual(found).tangent, expected)


def test_no_groups_where_weights_want_no_gradient(monkeypatch):
    calls, w = spied(monkeypatch, "layer_backward"), weights(gru)
    vmap(grad(lambda x: gru(x, w)[0].sum()))(torch.randn(3, 4, 2, 2, **F64))
    assert [call[5] for call in calls] == [1] or not calls  # the operator may be called by the dispatcher


@pytest.mark.parametrize("batched", [True, False])
def test_incoming_gradients_of_torchs_older_vmap(batched):
    w, x = weights(gru), torch.randn(4, 2, 2, **F64, requires_grad=True)
    output, incoming = gru(x, w)[0], torch.randn(3, 4, 2, 3, **F64)
    if not batched:
        output.backward(incoming[0])
        assert x.grad is not None
        return
    found = torch.autograd.grad(output, x, incoming, is_grads_batched=True, retain_graph=True)[0]
    expected = [torch.autograd.grad(output, x, g, retain_graph=True)[0] for g in incoming]
    torch.testing.assert_close(found, torch.stack(expected))


# autograd: who is differentiated


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


# autograd: the operator itself


PRESENT = [True] * 4 + [False] * 4


def operator(x, w, save=False):
    tensors = [x, *[x.new_zeros(1, 2, 3)] * 2, *w]
    return torch.ops.rnnfast.layer("numba", "lstm", [False], PRESENT, save, False, tensors)


def test_the_operator_under_autograd():
    w, x = [each.requires_grad_() for each in weights(lstm)], torch.randn(4, 2, 2, **F64)
    found = operator(x, w)
    assert found[1].shape == (0,)
    assert len(found) == 4
    assert operator(x, w, save=True)[1].shape == (4, 2, 1, 3)
    for a, b in zip(torch.autograd.grad(found[0].sum(), w), torch.autograd.grad(lstm(x, w)[0].sum(), w), strict=True):
        torch.testing.assert_close(a, b)
    with torch.no_grad():
        assert not operator(x, w)[0].requires_grad


def test_the_operator_refuses_nested_forward_mode():
    w, x = weights(lstm), torch.randn(4, 2, 2, **F64)
    once = lambda x: jvp(lambda x: operator(x, w)[0], (x,), (x,))[1]  # noqa: E731
    torch.testing.assert_close(once(x), jvp(lambda x: lstm(x, w)[0].unsqueeze(2), (x,), (x,))[1])
    with pytest.raises(RuntimeError, match="nested forward-mode"):
        jvp(once, (x,), (x,))


def nested(function, v, dv):
    """Return second derivatives by v, by nestings of transforms."""
    yield jvp(grad(function), (v,), (dv,))[1]
    yield grad(lambda v: grad(function)(v).sin().sum())(v)
    yield grad(lambda v: jvp(function, (v,), (dv,))[1])(v)
    yield vmap(grad(lambda v: grad(function)(v).sin().sum()))(torch.stack([v, dv]))
    yield hessian(function)(v)


@pytest.mark.parametrize("by", ["x", "weights"])
def test_the_operator_under_nested_transforms(by):
    """That is how compiled graphs meet them; the outer derivative lost what went through the inner one's results."""
    w, x = weights(lstm), torch.randn(4, 2, 2, **F64)
    v = x if by == "x" else w[1]

    def by_operator(v):
        given = (v, w) if by == "x" else (x, [w[0], v, *w[2:]])
        return operator(*given)[0].sin().sum()

    def by_layer(v):
        given = (v, w) if by == "x" else (x, [w[0], v, *w[2:]])
        return lstm(*given)[0].sin().sum()

    dv = torch.randn_like(v)
    for found, expected in zip(nested(by_operator, v, dv), nested(by_layer, v, dv), strict=True):
        torch.testing.assert_close(found, expected)


@pytest.mark.long
@pytest.mark.parametrize("cell", [gru, lstm])
def test_nested_transforms_in_a_compiled_graph(cell):
    w, x = weights(cell), torch.randn(4, 2, 2, **F64)

    def derivatives(v):
        def loss(v, x):
            return cell(x, [w[0], v, *w[2:]])[0].sin().sum()

        samples = jvp(lambda v: vmap(grad(loss), (None, 0))(v, torch.stack([x, x.cos()])), (v,), (v.cos(),))[1]
        return samples, *nested(lambda v: loss(v, x), v, v.cos())

    found = torch.compile(derivatives, backend="aot_eager", fullgraph=True)(w[1])
    for a, b in zip(found, derivatives(w[1]), strict=True):
        torch.testing.assert_close(a, b)


# autograd: what stands before a tensor


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


# autograd: what of a derivative is computed, and by whom


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


@pytest.mark.parametrize("create_graph", [False, True])
@pytest.mark.parametrize("order", [1, 2])
def test_forward_mode_over_backward(create_graph, order):
    """The tangent of a gradient, and of a gradient of a gradient, of x alone."""
    w, start, dx = weights(gru), *torch.randn(2, 4, 2, 2, **F64)
    if order == 2 and not create_graph:
        return
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


def test_gradients_in_groups_have_no_derivative():
    w = [each.requires_grad_() for each in weights(gru)]
    x, h = torch.randn(4, 2, 2, **F64), torch.zeros(1, 2, 3, **F64)
    constants, tensors = ("numba", "gru", [False], PRESENT), [x, h, *w]
    results = torch.ops.rnnfast.layer(*constants, True, False, tensors)
    states, saved = [results[0].detach()], [results[2].detach()]
    gradients, needs = [states[0].new_ones(4, 2, 1, 3), None], [False, False, True, False]
    grads = torch.ops.rnnfast.layer_backward(*constants, needs, 2, tensors, states, saved, gradients)
    assert grads[2].shape == (2, 9, 2)
    with pytest.raises(RuntimeError, match="gradients in groups"):
        torch.autograd.grad(grads[3].sum(), w)
    with pytest.raises(RuntimeError, match="gradients in groups"):
        autograd.add_tangents(torch.zeros(2, 9, 2), torch.zeros(9, 2))


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
