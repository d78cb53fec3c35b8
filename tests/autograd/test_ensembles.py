"""`vmap` over stacked weights: an ensemble runs as one layer, with the bits and the derivatives of its members."""

import pytest
import torch
from closeness import assert_all_close, assert_close
from layers import CELLS, as_tuple, count_calls, pair, random_hx, weights_like
from torch.autograd import gradcheck, gradgradcheck
from torch.func import functional_call, grad, hessian, jvp, stack_module_state, vmap
from torch.nn.utils.rnn import PackedSequence

from rnnfast.backends.dispatch import load

F64 = {"dtype": torch.float64}


@pytest.mark.parametrize("cell", CELLS)
def test_an_ensemble_equals_its_members(cell, backend):
    members = [pair(cell, 3, 7, 2, bidirectional=True, **F64)[1] for _ in range(3)]
    parameters, buffers = stack_module_state(members)
    x = torch.randn(5, 4, 3, **F64)

    def call(parameters, buffers, x):
        return functional_call(members[0], (parameters, buffers), (x,))[0]

    expected = torch.stack([member(x)[0] for member in members])
    assert_close("shared input", expected, vmap(call, in_dims=(0, 0, None))(parameters, buffers, x))

    def loss(parameters, x):
        return call(parameters, buffers, x).square().sum()

    grads = vmap(grad(loss), in_dims=(0, None))(parameters, x)
    for n, member in enumerate(members):
        wanted = torch.autograd.grad(member(x)[0].square().sum(), list(member.parameters()))
        names = [name for name, _ in member.named_parameters()]
        assert_all_close(dict(zip(names, wanted, strict=True)), {name: grads[name][n] for name in names})


class Ensemble:
    """Models of one cell with equal sizes, as a function of their stacked weights, and alone."""

    def __init__(self, cell: str, size: int, *args, **options):
        self.models = [pair(cell, *args, **options)[1] for _ in range(size)]
        self.weights = stack_module_state(self.models)[0]

    def __call__(self, weights, x, hx=None, options=None):
        """Run one member with these weights: its results, one after another."""
        output, finals, *rest = functional_call(self.models[0], weights, (x, hx), options)
        output = output.data if isinstance(output, PackedSequence) else output
        return (output, *as_tuple(finals), *(rest[0] if rest else ()))

    def member(self, n: int) -> dict[str, torch.Tensor]:
        """Weights of one member, as leaves of their own."""
        return {name: w[n].detach().requires_grad_() for name, w in self.weights.items()}


def mapped_options(case: str):
    """Options of every member, [3] where they are mapped."""
    resets = (torch.arange(60) % 7 % 3 == 1).view(3, 5, 4)
    return {
        "lengths": {"lengths": torch.tensor([2, 0, 5, 3])},
        "resets": {"resets": resets[0]},
        "all states": {"all_states": True},
        "lengths of each": {"lengths": torch.tensor([[2, 0, 5, 3], [5, 5, 1, 4], [0, 1, 2, 3]])},
        "resets of each": {"resets": resets},
    }.get(case, {})


ENSEMBLES = [(cell, case) for cell in CELLS for case in ("shared input", "own input")] + [
    (cell, case)
    for cell in ("lstm_proj", "gru")
    for case in ("own states", "packed", "lengths", "resets", "all states", "lengths of each", "resets of each")
]


@pytest.mark.parametrize(("cell", "case"), ENSEMBLES)
def test_an_ensemble_has_the_bits_of_its_members(cell, case, backend):
    ensemble = Ensemble(cell, 3, 3, 6, 2, bidirectional="resets" not in case)
    options, own = mapped_options(case), case.endswith("of each")
    shape = (9, 3) if case == "packed" else (5, 4, 3)
    x = torch.randn(*(shape if case == "shared input" else (3, *shape)), requires_grad=True)
    batch_sizes = torch.tensor([4, 2, 2, 1])
    hx = [as_tuple(random_hx(ensemble.models[0], 4, seed)) for seed in range(3)] if case == "own states" else None
    stacked = hx and tuple(torch.stack(parts).detach().requires_grad_() for parts in zip(*hx, strict=True))

    def run(weights, x, hx, options):
        given = PackedSequence(x, batch_sizes) if case == "packed" else x
        return ensemble(weights, given, hx if hx is None or len(hx) > 1 else hx[0], options)

    dims = (0, 0 if x.shape != shape else None, None if hx is None else 0, 0 if own else None)
    got = vmap(run, in_dims=dims)(ensemble.weights, x, stacked, options)
    leaves = [*ensemble.weights.values(), *(stacked or ()), x]
    found = torch.autograd.grad(sum((g * weights_like(g)).sum() for g in got), leaves)

    by_input = []
    for n in range(3):
        weights = ensemble.member(n)
        alone = x if case == "shared input" else x[n].detach().requires_grad_()
        chosen = {name: option[n] for name, option in options.items()} if own else options
        expected = run(weights, alone, None if hx is None else hx[n], chosen)
        wanted = [*weights.values(), *(hx[n] if hx else ()), alone]
        loss = sum((e * weights_like(g)[n]).sum() for e, g in zip(expected, got, strict=True))
        *gradients, dx = torch.autograd.grad(loss, wanted)
        for one, all_of_them in zip(expected, got, strict=True):
            assert torch.equal(one, all_of_them[n])
        for one, all_of_them in zip(gradients, found[:-1], strict=True):
            assert torch.equal(one, all_of_them[n])
        by_input.append(dx)
    if case == "shared input":
        assert_close("gradient by the input", sum(by_input), found[-1])
    else:
        assert torch.equal(torch.stack(by_input), found[-1])


@pytest.mark.parametrize("option", ["plain", "lengths", "resets"])
@pytest.mark.parametrize("own", [False, True], ids=["shared input", "own input"])
def test_an_ensemble_is_one_call_for_each_layer(own, option, monkeypatch, backend):
    ensemble = Ensemble("lstm", 3, 3, 7, 2, bidirectional=option != "resets")
    x = torch.randn(*((3,) if own else ()), 5, 4, 3)

    def run(weights, x):
        return ensemble(weights, x, None, mapped_options(option))[0]

    together, in_dims = 1 if load(backend).TAKES_ENSEMBLES else 3, (0, 0 if own else None)
    calls = count_calls(monkeypatch, backend)
    vmap(run, in_dims)(ensemble.weights, x).sum().backward()
    assert calls == ["forward"] * 2 * together + ["backward"] * 2 * together
    calls.clear()
    detached = {name: w.detach() for name, w in ensemble.weights.items()}
    vmap(grad(lambda weights, x: run(weights, x).sum()), in_dims)(detached, x)
    assert calls == ["forward"] * 2 * together + ["backward"] * 2 * together


@pytest.mark.parametrize(
    ("cell", "option"),
    [
        *(("gru", option) for option in ("lengths", "resets", "packed")),
        ("lstm_proj", "lengths"),
        *(pytest.param("lstm_proj", option, marks=pytest.mark.long) for option in ("resets", "packed")),
    ],
)
def test_second_derivatives_of_an_ensemble_in_both_modes(cell, option, backend):
    ensemble = Ensemble(cell, 2, 2, 6, bidirectional=option != "resets", **F64)
    lead = () if option == "lengths" else (2,)  # lengths with an input that the members share
    x = torch.randn(*lead, *((6, 2) if option == "packed" else (5, 4, 2)), **F64, requires_grad=True)

    def function(x, *weights):
        def run(x, *weights):
            given = PackedSequence(x, torch.tensor([3, 2, 1])) if option == "packed" else x
            named = dict(zip(ensemble.weights, weights, strict=True))
            return ensemble(named, given, None, mapped_options(option))

        return vmap(run, (0 if lead else None, *(0,) * len(weights)))(x, *weights)

    fast = {"fast_mode": True}
    assert gradcheck(function, (x, *ensemble.weights.values()), check_forward_ad=True, **fast)
    assert gradgradcheck(function, (x, *ensemble.weights.values()), check_fwd_over_rev=True, **fast)


def test_an_ensemble_passes_through_every_nesting(backend):
    ensemble = Ensemble("gru", 3, 2, 3, bidirectional=True, **F64)
    weights = {name: w.detach() for name, w in ensemble.weights.items()}
    x = torch.randn(4, 2, 2, **F64)

    def loss(weights, x):
        return ensemble(weights, x)[0].square().sum()

    def members(function, *args):
        return torch.stack([function({name: w[n] for name, w in weights.items()}, *args) for n in range(3)])

    def gradient(weights, x):
        return grad(loss, argnums=1)(weights, x)

    def tangent(weights, x):
        return jvp(lambda x: loss(weights, x), (x,), (torch.ones_like(x),))[1]

    def curvature(weights, x):
        return hessian(loss, argnums=1)(weights, x)

    for function in (gradient, tangent, curvature):
        assert_close(function.__name__, members(function, x), vmap(function, (0, None))(weights, x))
    got = jvp(lambda x: vmap(loss, (0, None))(weights, x), (x,), (torch.ones_like(x),))[1]
    assert_close("jvp of vmap", members(tangent, x), got)
    got = grad(lambda x: vmap(loss, (0, None))(weights, x).sum())(x)
    assert_close("grad of vmap", grad(lambda x: members(loss, x).sum())(x), got)
    got = hessian(lambda x: vmap(loss, (0, None))(weights, x).sum())(x)
    assert_close("hessian of vmap", members(curvature, x).sum(0), got)


@pytest.mark.parametrize("order", ["samples of members", "members of samples", "samples of batches"])
def test_nested_maps_give_each_pair_its_gradients(order, backend):
    ensemble = Ensemble("lstm", 2, 3, 7, **F64)
    weights = {name: w.detach() for name, w in ensemble.weights.items()}
    x = torch.randn(2, 3, 5, 1, 3, **F64)

    def gradient(weights, x):
        return grad(lambda weights: ensemble(weights, x)[0].square().sum())(weights)

    first = {name: w[0] for name, w in weights.items()}
    expected = {
        "samples of members": lambda n, m: gradient(ensemble.member(n), x[0, m]),
        "members of samples": lambda n, m: gradient(ensemble.member(n), x[0, m]),
        "samples of batches": lambda n, m: gradient(first, x[n, m]),
    }[order]
    got = {
        "samples of members": lambda: vmap(lambda w: vmap(lambda row: gradient(w, row))(x[0]))(weights),
        "members of samples": lambda: vmap(lambda row: vmap(lambda w: gradient(w, row))(weights), out_dims=1)(x[0]),
        "samples of batches": lambda: vmap(lambda rows: vmap(lambda row: gradient(first, row))(rows))(x),
    }[order]()
    for n in range(2):
        for m in range(3):
            assert_all_close(expected(n, m), {name: g[n, m] for name, g in got.items()})


def test_members_may_differ_in_one_weight_alone(backend):
    ensemble = Ensemble("lstm", 3, 3, 7, bidirectional=True, **F64)
    name = "weight_hh_l0_reverse"
    shared = {each: w[0].detach() for each, w in ensemble.weights.items()}
    x = torch.randn(5, 4, 3, **F64)

    def run(weight, shared):
        return ensemble(shared | {name: weight}, x)[0].square().sum()

    got = vmap(grad(run, argnums=(0, 1)), (0, None))(ensemble.weights[name].detach(), shared)
    for n in range(3):
        wanted = grad(run, argnums=(0, 1))(ensemble.weights[name][n].detach(), shared)
        assert_close(name, wanted[0], got[0][n])
        assert_all_close(wanted[1], {k: g[n] for k, g in got[1].items()})


@pytest.mark.parametrize("own", [False, True], ids=["shared input", "own input"])
def test_an_ensemble_trains_in_one_compiled_graph(own, backend):
    ensemble = Ensemble("gru", 3, 3, 7, 2, bidirectional=True)
    x = torch.randn(*((3,) if own else ()), 5, 4, 3)
    function = vmap(lambda weights, x: ensemble(weights, x)[0], (0, 0 if own else None))
    torch._dynamo.reset()
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    expected, got = function(ensemble.weights, x), compiled(ensemble.weights, x)
    assert torch.equal(expected, got)
    leaves = list(ensemble.weights.values())
    wanted, found = (torch.autograd.grad(result.square().sum(), leaves) for result in (expected, got))
    assert all(map(torch.equal, wanted, found))
    weights = {name: w.detach() for name, w in ensemble.weights.items()}
    function = vmap(grad(lambda weights, x: ensemble(weights, x)[0].sum()), (0, 0 if own else None))
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    wanted, found = function(weights, x), compiled(weights, x)
    assert all(torch.equal(wanted[name], found[name]) for name in weights)


@pytest.mark.parametrize("own", [False, True], ids=["shared input", "own input"])
def test_the_operators_map_over_weights(own, backend):
    ensemble = Ensemble("lstm_proj", 3, 3, 6, bidirectional=True, **F64)
    weights = [w.detach() for w in ensemble.weights.values()]
    x, *states = torch.randn(3, 5, 4, 3, **F64), torch.randn(2, 4, 5, **F64), torch.randn(2, 4, 6, **F64)
    present = [True] * 5 + [False] * 3
    constants, dy = (backend, "lstm", [False, True], present), torch.randn(5, 4, 2, 5, **F64)

    def run(x, *weights):
        tensors = [x, *states, *weights]
        results = torch.ops.rnnfast.layer(*constants, True, True, tensors)
        flows, needs = [dy, None, None, None], [True, True, True, False]
        backward = torch.ops.rnnfast.layer_backward
        return *results, *backward(*constants, needs, 1, tensors, results[:2], results[4:], flows)

    got = vmap(run, (0 if own else None, *(0,) * len(weights)))(x if own else x[0], *weights)
    for n in range(3):
        for one, all_of_them in zip(run(x[n if own else 0], *(w[n] for w in weights)), got, strict=True):
            assert torch.equal(one, all_of_them[n])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_an_ensemble_in_half_precision_has_the_bits_of_its_members(dtype, backend):
    ensemble = Ensemble("lstm", 3, 3, 7, 2, bidirectional=True, dtype=dtype)
    x = torch.randn(3, 5, 4, 3, dtype=dtype)
    got = vmap(lambda weights, x: ensemble(weights, x)[0])(ensemble.weights, x)
    found = torch.autograd.grad(got.square().sum(), list(ensemble.weights.values()))
    for n, model in enumerate(ensemble.models):
        output = model(x[n])[0]
        wanted = torch.autograd.grad(output.square().sum(), list(model.parameters()))
        assert torch.equal(output, got[n])
        for one, others in zip(wanted, found, strict=True):
            assert torch.equal(one, others[n])
