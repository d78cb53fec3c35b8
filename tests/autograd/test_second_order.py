"""Derivatives beyond the gradient, for every cell and option, against the reference loop; and who computes them."""

import pytest
import torch
from closeness import TOLERANCES, assert_all_close, assert_close
from layers import CELLS, as_tuple, pair, random_hx
from rnnfast_kernels import cells as table
from rnnfast_kernels.bind import bind
from torch.autograd import forward_ad
from torch.func import functional_call, jvp, stack_module_state, vmap
from torch.nn.utils.rnn import PackedSequence

import rnnfast
from rnnfast import reference, torch_functions, use_backend
from rnnfast.backends import cpu

F64 = {"dtype": torch.float64}
OPTIONS = {
    "plain": {},
    "both directions": {"bidirectional": True},
    "no bias": {"bias": False},
    "two layers, batch first": {"num_layers": 2, "batch_first": True},
    "packed": {"packed": True, "bidirectional": True},
    "lengths": {"lengths": torch.tensor([2, 5, 0, 1]), "bidirectional": True},
    "resets": {"resets": torch.arange(20).reshape(5, 4) % 3 == 0},
    "lengths and resets": {"lengths": torch.tensor([5, 3, 4, 1]), "resets": torch.arange(20).reshape(5, 4) % 7 == 2},
}
AT_CALL = ("lengths", "resets", "packed")
cells = pytest.mark.parametrize("cell", CELLS)
options = pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)


def make(cell, options, sizes=(5, 4, 3, 17), dtype=torch.float64):
    """Return a function from input, initial states and weights to all results, and tensors to call it with.

    sizes: T, B, I, H.
    """
    torch.manual_seed(0)
    steps, batch, inputs, hidden = sizes
    layer = pair(cell, inputs, hidden, **{k: v for k, v in options.items() if k not in AT_CALL}, **F64)[1].to(dtype)
    x = torch.randn(*((12,) if "packed" in options else (steps, batch)), inputs, **F64).to(dtype)
    at_call = {name: options[name].to(x.device) for name in AT_CALL[:2] if name in options}
    names, weights = zip(*layer.named_parameters(), strict=True)
    hx = as_tuple(random_hx(layer, batch))

    def function(x, *rest):
        state = rest[: len(hx)] if len(hx) > 1 else rest[0]
        given = PackedSequence(x, torch.tensor([4, 3, 3, 1, 1], device="cpu")) if "packed" in options else x
        functional = dict(zip(names, rest[len(hx) :], strict=True))
        results = functional_call(layer, functional, (given, state), {**at_call, "all_states": True})
        output, finals, states = results
        found = (output, *as_tuple(finals), *states)
        return tuple(each.data if isinstance(each, PackedSequence) else each for each in found)

    return function, ((x.transpose(0, 1) if layer.batch_first else x).requires_grad_(), *hx, *weights)


def weighed(values):
    """Sum values with fixed weights."""
    generator = torch.Generator().manual_seed(7)
    return sum((v * torch.randn(v.shape, generator=generator, **F64).to(v)).sum() for v in values)


def penalty(function, tensors, first):
    """Differentiate a function of the gradients by some tensors, `first`, by all of them."""
    loss = weighed(result.sin() for result in function(*tensors))
    gradients = torch.autograd.grad(loss, first, create_graph=True)
    return named(torch.autograd.grad(weighed(g.square() for g in gradients), tensors, materialize_grads=True))


def named(tensors) -> dict[str, torch.Tensor]:
    return {f"tensor {n}": tensor for n, tensor in enumerate(tensors)}


@pytest.fixture
def calls(monkeypatch, backend) -> dict[str, list]:
    """Keep the arguments of the kernels' calls; for backends without these kernels, there is no such test."""
    if backend != "numba":
        pytest.skip("for backends with kernels for second derivatives")
    kept: dict[str, list] = {"backward": [], "hvp": [], "jvp": []}
    for name, into in kept.items():
        function = getattr(cpu, name)

        def watched(*args, function=function, into=into):
            into.append(args)
            return function(*args)

        monkeypatch.setattr(cpu, name, watched)
    return kept


@pytest.mark.parametrize("first", ["input", "states", "weights", "all"])
@options
@cells
def test_second_derivatives_equal_the_loops(cell, options, first, backend):
    function, tensors = make(cell, options)
    states = 3 if cell.startswith("lstm") else 2
    part = {"input": tensors[:1], "states": tensors[1:states], "weights": tensors[states:], "all": tensors}[first]
    got = penalty(function, tensors, part)
    with use_backend("reference"):
        assert_all_close(penalty(function, tensors, part), got, 1e-11)


@options
@cells
def test_third_derivatives_equal_the_loops(cell, options, backend):
    function, tensors = make(cell, options, (5, 4, 3, 6))

    def third():
        value = weighed(result.sin() for result in function(*tensors))
        for _ in range(2):
            gradients = torch.autograd.grad(value, tensors, create_graph=True, materialize_grads=True)
            value = weighed(g.square() for g in gradients)
        return named(torch.autograd.grad(value, tensors, materialize_grads=True))

    got = third()
    with use_backend("reference"):
        assert_all_close(third(), got, 1e-10)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("sizes", [(7, 1, 1, 33), (3, 13, 65, 65), (9, 7, 17, 130)], ids=str)
@cells
def test_second_derivatives_of_any_size(cell, sizes, dtype, backend, calls):
    function, tensors = make(cell, {}, sizes, dtype)
    got = penalty(function, tensors, tensors)
    exact = [t.detach().double().requires_grad_() for t in tensors]
    with use_backend("reference"):
        # The layer's own tensors are replaced, so that its dtype does not matter.
        expected = penalty(function, exact, exact)
    assert len(calls["hvp"]) == 1
    assert_all_close(expected, got, 20 * TOLERANCES[dtype])


@cells
def test_gradients_of_any_strides(cell, backend):
    """Gradients arrive as an expanded one, transposed, and every second."""
    function, (x, *rest) = make(cell, {})

    def second(x, *rest):
        output, *others = function(x, *rest)
        loss = output[:, 1:].transpose(1, 2).cumsum(1).sum() + sum(t[:, ::2].sum() for t in others)
        gradients = torch.autograd.grad(loss, (x, *rest), create_graph=True)
        value = sum(g.sum() + g.transpose(0, -1)[::2].square().sum() for g in gradients)
        return named(torch.autograd.grad(value, (x, *rest), materialize_grads=True))

    got = second(x, *rest)
    with use_backend("reference"):
        assert_all_close(second(x, *rest), got, 1e-11)


@pytest.mark.parametrize("own", [True, False], ids=["inputs of their own", "one input"])
@pytest.mark.parametrize("cell", ["lstm_proj", "gru"])
def test_second_derivatives_of_an_ensemble(cell, own, backend):
    members = [pair(cell, 3, 7, bidirectional=own, **F64)[1] for _ in range(3)]
    weights, _ = stack_module_state(members)
    tensors = (torch.randn(*[3] * own, 5, 4, 3, **F64, requires_grad=True), *weights.values())

    def function(x, *rest):
        def member(weights, x):
            return functional_call(members[0], weights, (x,))[0]

        return (vmap(member, (0, 0 if own else None))(dict(zip(weights, rest, strict=True)), x),)

    got = penalty(function, tensors, tensors)
    with use_backend("reference"):
        assert_all_close(penalty(function, tensors, tensors), got, 1e-11)


@pytest.mark.parametrize(("steps", "batch"), [(0, 3), (4, 0)])
def test_second_derivatives_of_nothing(steps, batch, backend):
    function, tensors = make("lstm", {}, (steps, batch, 3, 5))
    assert not any(gradient.any() for gradient in penalty(function, tensors, tensors[:1]).values())


@pytest.mark.parametrize("threads", [2, 3])
@options
def test_second_derivatives_have_the_same_bits_on_any_number_of_threads(options, threads, backend):
    function, tensors = make("lstm", options, (5, 4, 70, 130))
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        expected = penalty(function, tensors, tensors)
        torch.set_num_threads(threads)
        got = penalty(function, tensors, tensors)
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(expected[name], got[name]) for name in got)


@pytest.mark.parametrize("repeated", [0, 2])
def test_no_more_is_computed_than_was_asked_for(repeated, calls):
    """In a call that is the first of its kind, and in one that was prepared."""
    layer = rnnfast.GRU(3, 4)
    x = torch.randn(5 + repeated, 2, 3, requires_grad=True)
    for _ in range(repeated):
        layer(x)
    (gradient,) = torch.autograd.grad(layer(x)[0].sum(), x, create_graph=True)
    torch.autograd.grad(gradient.square().sum(), layer.weight_hh_l0, retain_graph=True)
    assert calls["backward"][0][5] == (True, False, False, False)
    assert calls["hvp"][0][-1] == (False, False, True, False)
    gradient.square().sum().backward(inputs=[x])
    assert calls["hvp"][1][-1] == (True, False, False, False)
    assert torch.autograd.grad(layer(x)[0].sum(), layer.bias_ih_l0, create_graph=True)[0].requires_grad


@options
@cells
def test_forward_mode_equals_the_loops(cell, options, backend):
    function, tensors = make(cell, options)
    tensors = tuple(t.detach() for t in tensors)
    changes = tuple(torch.randn_like(t) for t in tensors)
    _, got = jvp(function, tensors, changes)
    with use_backend("reference"):
        _, expected = jvp(function, tensors, changes)
    assert_all_close(named(expected), named(got), 1e-11)


@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16], ids=str)
def test_forward_mode_of_halves(half, calls):
    function, tensors = make("lstm", {}, dtype=half)
    tensors = tuple(t.detach() for t in tensors)
    changes = tuple(torch.ones_like(t) for t in tensors)
    _, got = jvp(function, tensors, changes)
    with use_backend("reference"):
        _, expected = jvp(function, tuple(t.double() for t in tensors), tuple(t.double() for t in changes))
    assert len(calls["jvp"]) == 1
    assert_all_close(named(expected), named(got), 2 * TOLERANCES[half])


def test_forward_mode_runs_in_kernels_where_nobody_differentiates_it(calls):
    layer = rnnfast.LSTM(3, 4, **F64)
    x, dx = torch.randn(2, 5, 2, 3, **F64)
    frozen = {name: p.detach() for name, p in layer.named_parameters()}

    def output(x):
        return functional_call(layer, frozen, (x,))[0]

    _, expected = jvp(output, (x,), (dx,))
    with torch.no_grad(), forward_ad.dual_level():
        got = layer(forward_ad.make_dual(x, dx))[0]
        assert_close("tangent", expected, forward_ad.unpack_dual(got).tangent)
    assert len(calls["jvp"]) == 2
    # The weights want a gradient of the tangent.
    jvp(lambda x: layer(x)[0], (x,), (dx,))[1].sum().backward()
    assert layer.weight_hh_l0.grad is not None
    torch.func.jacfwd(lambda x: jvp(output, (x,), (dx,))[1])(x)
    assert len(calls["jvp"]) == 2


@pytest.mark.parametrize("create_graph", [True, False])
@cells
def test_forward_mode_over_reverse(cell, create_graph, backend):
    function, (x, *rest) = make(cell, {})
    dx = torch.randn_like(x)

    def change():
        with forward_ad.dual_level():
            dual = forward_ad.make_dual(x, dx)
            loss = weighed(result.sin() for result in function(dual, *rest))
            (gradient,) = torch.autograd.grad(loss, dual, create_graph=create_graph)
            return forward_ad.unpack_dual(gradient).tangent

    got = change()
    with use_backend("reference"):
        assert_close("change of the gradient", change(), got, 1e-11)


@pytest.mark.parametrize("cell", table.TORCH_CELLS)
def test_derived_equations(cell):
    """What is derived from a step is what autograd finds, from values far outside of the usual range too."""
    row, names = table.CELLS[cell], torch_functions.BACKWARD | {"zeros_like": torch.zeros_like}
    names["sigmoid_hvp"] = lambda dot, dy, y: dot * dy * (1 - 2 * y)
    names["tanh_hvp"] = lambda dot, dy, y: -2 * dot * dy * y
    cell_jvp, cell_hvp = (bind(function, names) for function in (row.jvp, row.hvp))
    backward = bind(row.backward, names)
    torch.manual_seed(0)

    def some(count, scale=1.0):
        return tuple(scale * torch.randn(9, **F64) for _ in range(count))

    states = len(row.states)
    x, u, state = some(row.gates, 3), some(row.gates, 3), some(states)
    along = some(row.gates), some(row.gates), some(states)
    (new_state, saved), expected = jvp(reference.FORWARD[cell], (x, u, state), along)
    found = cell_jvp(*along, saved, state, new_state)
    torch.testing.assert_close(found, expected)

    given = (some(states), saved, state, new_state)
    along = (some(states), some(row.saved), some(states), some(states))
    values, expected = jvp(backward, given, along)
    torch.testing.assert_close(cell_hvp(*given, *along), (values, expected))
