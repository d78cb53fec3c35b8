"""`torch.func` passes through every layer: vmap, grad, jacrev, jvp, hessian; also second derivatives."""

import itertools

import pytest
import torch
from closeness import assert_all_close, assert_close
from layers import CELLS, count_calls, pair, weights_like
from torch import nn
from torch.autograd import forward_ad, gradcheck, gradgradcheck
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, vmap
from torch.nn.utils.rnn import PackedSequence
from torch.utils._python_dispatch import TorchDispatchMode
from torch_releases import needs_compiled_jvp

import rnnfast

F64 = {"dtype": torch.float64}
OPTIONS = ("dense", "lengths", "resets", "lengths and resets", "packed")


def as_function(cell: str, option: str):
    """Return a function of x, the initial states and the weights, and values for these that want gradients."""
    _, layer = pair(cell, 2, 6 if cell == "lstm_proj" else 3, bidirectional="resets" not in option, **F64)
    names = [name for name, _ in layer.named_parameters()]
    directions = 2 if layer.bidirectional else 1
    widths = [layer.proj_size or layer.hidden_size, layer.hidden_size][: 2 if layer.mode == "LSTM" else 1]
    x = torch.randn((6, 2) if option == "packed" else (3, 3, 2), **F64, requires_grad=True)
    hx = [torch.randn(directions, 3, width, **F64, requires_grad=True) for width in widths]
    options = {}
    if "lengths" in option:
        options["lengths"] = torch.tensor([2, 0, 3])
    if "resets" in option:
        options["resets"] = torch.tensor([[False, True, False], [True, False, False], [False, False, True]])

    def function(x, *tensors):
        states, weights = tensors[: len(hx)], tensors[len(hx) :]
        given = PackedSequence(x, torch.tensor([3, 2, 1], device="cpu")) if option == "packed" else x
        state = states if len(hx) > 1 else states[0]
        output, finals = functional_call(layer, dict(zip(names, weights, strict=True)), (given, state), options)
        finals = finals if isinstance(finals, tuple) else (finals,)
        return output.data if option == "packed" else output, *finals

    return function, (x, *hx, *(p.detach().requires_grad_() for p in layer.parameters()))


@pytest.mark.parametrize(
    ("cell", "option"),
    # Gated cells with every kind of input; the others, whose rules are parts of theirs, where the most meets at once.
    [(c, o) for c in CELLS for o in OPTIONS if c in ("lstm", "gru") or o in ("packed", "lengths and resets")],
)
def test_first_and_second_derivatives_in_both_modes(cell, option, backend):
    function, inputs = as_function(cell, option)
    fast = {"fast_mode": True}
    assert gradcheck(function, inputs, check_forward_ad=True, **fast)
    assert gradgradcheck(function, inputs, check_fwd_over_rev=True, **fast)


@pytest.mark.parametrize("cell", CELLS)
def test_second_derivatives_equal_the_plain_loops(cell, backend):
    theirs, ours = pair(cell, 3, 7, 2, bidirectional=True, **F64)
    x = torch.randn(5, 4, 3, **F64, requires_grad=True)

    def penalty(layer) -> dict[str, torch.Tensor]:
        (gradient,) = torch.autograd.grad(layer(x)[0].sum(), x, create_graph=True)
        leaves = dict(layer.named_parameters()) | {"x": x}
        grads = torch.autograd.grad(
            (gradient.norm(dim=-1) - 1).square().mean(), list(leaves.values()), allow_unused=True
        )
        return {n: torch.zeros_like(v) if g is None else g for (n, v), g in zip(leaves.items(), grads, strict=True)}

    assert_all_close(penalty(theirs), penalty(ours))


def test_third_derivatives_equal_the_plain_loops(backend):
    layer, start = rnnfast.LSTM(2, 3, **F64), torch.randn(4, 2, 2, **F64)

    def third() -> torch.Tensor:
        x = start.clone().requires_grad_()
        value = layer(x)[0].square().sum()
        for _ in range(2):
            (gradient,) = torch.autograd.grad(value, x, create_graph=True)
            value = gradient.square().sum()
        return torch.autograd.grad(value, x)[0]

    got = third()
    with rnnfast.use_backend("reference"):
        assert_close("third derivative", third(), got)


@pytest.mark.parametrize("mapped", ["inputs", "states", "inputs and states"])
@pytest.mark.parametrize("cell", CELLS)
def test_vmap_over_inputs_and_states(cell, mapped, backend):
    function, (x, *tensors) = as_function(cell, "dense")
    states = 2 if cell.startswith("lstm") else 1
    given, weights = (x, *tensors[:states]), tensors[states:]
    dims = (1 if "inputs" in mapped else None, *(1 if "states" in mapped else None,) * states)
    members = [[t if d is None else t.detach() * n for t, d in zip(given, dims, strict=True)] for n in (1, 2, 3)]
    stacked = [t[0] if d is None else torch.stack(t, d) for t, d in zip(zip(*members, strict=True), dims, strict=True)]
    got = vmap(function, in_dims=(*dims, *(None,) * len(weights)))(*stacked, *weights)
    expected = [function(*member, *weights) for member in members]
    for n, parts in enumerate(zip(*expected, strict=True)):
        assert_close(f"result {n}", torch.stack(parts), got[n])


@pytest.mark.parametrize("own", [False, True], ids=["shared input", "own input"])
@pytest.mark.parametrize("cell", ["lstm_proj", "gru"])
def test_vmap_over_lengths(cell, own, backend):
    _, layer = pair(cell, 3, 6, 2, bidirectional=True, **F64)
    parameters = {name: p.detach() for name, p in layer.named_parameters()}
    x, lengths = torch.randn(3, 5, 4, 3, **F64), torch.tensor([[2, 0, 5, 3], [5, 5, 1, 4], [0, 1, 2, 3]])

    def loss(parameters, x, lengths):
        output = functional_call(layer, parameters, (x,), {"lengths": lengths})[0]
        return (output * weights_like(output)).sum(), output

    gradients = grad(loss, argnums=(0, 1), has_aux=True)
    (dparameters, dx), outputs = vmap(gradients, (None, 0 if own else None, 1))(
        parameters, x if own else x[0], lengths.T
    )
    for n in range(3):
        (wanted, wanted_dx), output = gradients(parameters, x[n if own else 0], lengths[n])
        assert_all_close(wanted, {name: g[n] for name, g in dparameters.items()})
        assert_all_close({"dx": wanted_dx, "output": output}, {"dx": dx[n], "output": outputs[n]})


class Calls(TorchDispatchMode):
    """Counts the calls of an operator."""

    def __init__(self, operator):
        super().__init__()
        self.operator, self.count = operator, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += function is self.operator
        return function(*args, **(kwargs or {}))


def test_lengths_of_all_members_are_sorted_at_once(device):
    lengths = torch.randint(0, 8, (2, 3, 5), device=device)
    sort = torch.ops.rnnfast.sort_lengths
    with Calls(sort.default) as calls:
        got = vmap(vmap(lambda row: sort(row, 7), in_dims=1), in_dims=2)(lengths)  # [5, 3] members of 2 rows
    assert calls.count == 1
    for n, m in itertools.product(range(5), range(3)):
        for one, every in zip(sort(lengths[:, m, n], 7), got, strict=True):
            assert torch.equal(one, every[n, m])
    with pytest.raises(ValueError, match="must lie between 0 and the number of steps, 3"):
        vmap(lambda row: sort(row, 3))(torch.tensor([[1, 2], [3, 4]]))


@pytest.mark.parametrize("cell", CELLS)
def test_per_sample_gradients(cell, backend):
    _, layer = pair(cell, 3, 7, **F64)
    parameters = {name: p.detach() for name, p in layer.named_parameters()}
    x = torch.randn(5, 4, 3, **F64)

    def loss(parameters, row):
        return functional_call(layer, parameters, (row.unsqueeze(1),))[0].square().sum()

    got = vmap(grad(loss), in_dims=(None, 1))(parameters, x)
    for n in range(4):
        wanted = grad(loss)(parameters, x[:, n])
        assert_all_close(wanted, {name: g[n] for name, g in got.items()})


def test_per_sample_gradients_are_one_call_for_each_layer(monkeypatch, backend):
    layer, x = rnnfast.LSTM(3, 7, 2), torch.randn(5, 4, 3)
    parameters = {name: p.detach() for name, p in layer.named_parameters()}
    calls = count_calls(monkeypatch, backend)
    vmap(grad(lambda p, row: functional_call(layer, p, (row,))[0].sum()), in_dims=(None, 1))(parameters, x)
    assert calls == ["forward"] * 2 + ["backward"] * 2


@pytest.mark.parametrize("cell", ["rnn_relu", "lstm", "gru"])
def test_jacobians_and_hessians_of_every_nesting_agree(cell, backend):
    _, layer = pair(cell, 2, 3, **F64)
    x = torch.randn(3, 2, 2, **F64)

    def loss(x):
        return layer(x)[0].square().sum()

    expected = torch.autograd.functional.hessian(loss, x)
    assert_close("jacobian", torch.autograd.functional.jacobian(loss, x), jacfwd(loss)(x))
    nestings = {
        "hessian": hessian(loss),
        "reverse over reverse": jacrev(jacrev(loss)),
        "reverse over forward": jacrev(jacfwd(loss)),
        "forward over forward": jacfwd(jacfwd(loss)),
    }
    for name, function in nestings.items():
        assert_close(name, expected, function(x))


def test_forward_mode_needs_no_gradients_and_keeps_none(backend):
    layer = rnnfast.GRU(2, 3, **F64).requires_grad_(False)
    x, dx = torch.randn(2, 4, 3, 2, **F64)
    _, expected = jvp(lambda x: layer(x)[0], (x,), (dx,))
    with torch.no_grad(), forward_ad.dual_level():
        output = layer(forward_ad.make_dual(x, dx))[0]
        assert_close("tangent", expected, forward_ad.unpack_dual(output).tangent)
    step = 1e-6
    numeric = (layer(x + step * dx)[0] - layer(x - step * dx)[0]) / (2 * step)
    assert_close("tangent", numeric, expected, 1e-8)


@pytest.mark.parametrize("transform", ["grad", "vmap", "per-sample", pytest.param("jvp", marks=needs_compiled_jvp)])
def test_transforms_compile_in_one_graph(transform, backend):
    layer, x = rnnfast.LSTM(2, 3, **F64), torch.randn(4, 3, 2, **F64)

    def loss(x):
        return layer(x)[0].square().sum()

    function = {
        "grad": grad(loss),
        "vmap": vmap(lambda row: layer(row)[0], in_dims=1),
        "per-sample": vmap(grad(loss), in_dims=1),
        "jvp": lambda x: jvp(loss, (x,), (torch.ones_like(x),))[1],
    }[transform]
    torch._dynamo.reset()
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    assert_close(transform, function(x), compiled(x))


def test_what_cannot_be_compiled_says_so(backend):
    layer, x = rnnfast.LSTM(2, 3, **F64), torch.randn(4, 3, 2, **F64)
    torch._dynamo.reset()
    nested = torch.compile(jacfwd(jacfwd(lambda x: layer(x)[0].sum())), fullgraph=True, backend="aot_eager")
    with pytest.raises(Exception, match="nested forward-mode transforms"):
        nested(x)


class Critic(nn.Module):
    """A recurrent critic as of a WGAN-GP."""

    def __init__(self, layer: nn.Module):
        super().__init__()
        self.layer, self.head = layer, nn.Linear(7, 1, **F64)

    def forward(self, x):
        return self.head(self.layer(x)[0][-1])


@pytest.mark.parametrize("cell", ["rnn_tanh", "lstm", "gru"])
def test_a_gradient_penalty_trains_as_with_torch(cell, backend):
    critics = [Critic(layer) for layer in pair(cell, 3, 7, 2, **F64)]
    critics[1].load_state_dict(critics[0].state_dict())
    real, fake = torch.randn(2, 5, 4, 3, **F64)

    def train(critic) -> dict[str, torch.Tensor]:
        optimizer = torch.optim.SGD(critic.parameters(), 0.1)
        for _ in range(3):
            mixed = (0.3 * real + 0.7 * fake).requires_grad_()
            (gradient,) = torch.autograd.grad(critic(mixed).sum(), mixed, create_graph=True)
            penalty = (gradient.flatten(2).norm(dim=2) - 1).square().mean()
            optimizer.zero_grad()
            (critic(fake).mean() - critic(real).mean() + 10 * penalty).backward()
            optimizer.step()
        return dict(critic.state_dict())

    assert_all_close(train(critics[0]), train(critics[1]))
