"""`RNNCell`, `LSTMCell` and `GRUCell` behave as torch's."""

import pytest
import torch
from closeness import assert_all_close, assert_close
from layers import as_tuple, weights_like
from torch import nn
from torch.autograd import gradcheck, gradgradcheck
from torch.func import vmap

import rnnfast

CELLS = {
    "tanh": ("RNNCell", {}),
    "relu": ("RNNCell", {"nonlinearity": "relu"}),
    "lstm": ("LSTMCell", {}),
    "gru": ("GRUCell", {}),
}
NAMES = ("RNNCell", "LSTMCell", "GRUCell")


def rollout(cell: nn.Module, x, hx) -> dict[str, torch.Tensor]:
    """Take one step per row of x and return the last states and all gradients."""
    leaves = {"x": x, **{f"hx{n}": s for n, s in enumerate(as_tuple(hx))}, **dict(cell.named_parameters())}
    for x_t in x:
        hx = cell(x_t, hx)
    results = {f"state{n}": s for n, s in enumerate(as_tuple(hx))}
    loss = sum((s * weights_like(s)).sum() for s in results.values())
    grads = torch.autograd.grad(loss, list(leaves.values()))
    return results | {f"d{name}": g for name, g in zip(leaves, grads, strict=True)}


@pytest.mark.parametrize("batched", [True, False], ids=["batched", "unbatched"])
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no_bias"])
@pytest.mark.parametrize("cell", CELLS)
def test_steps_and_gradients_equal_torch(cell, bias, batched, backend):
    name, options = CELLS[cell]
    theirs = getattr(nn, name)(3, 5, bias=bias, **options).double()
    ours = getattr(rnnfast, name)(3, 5, bias=bias, **options).double()
    ours.load_state_dict(theirs.state_dict())
    batch = (4,) if batched else ()
    x = torch.randn(6, *batch, 3, dtype=torch.float64, requires_grad=True)
    states = [
        torch.randn(*batch, 5, dtype=torch.float64, requires_grad=True) for _ in range(2 if cell == "lstm" else 1)
    ]
    hx = tuple(states) if cell == "lstm" else states[0]
    assert_all_close(rollout(theirs, x, hx), rollout(ours, x, hx))
    torch.testing.assert_close(ours(x[0]), theirs(x[0]))
    assert isinstance(ours, type(theirs))
    assert repr(ours) == repr(theirs)[:-1] + ", rnnfast)"


@pytest.mark.parametrize("name", NAMES)
def test_derivatives_and_vmap(name, backend):
    cell, x = getattr(rnnfast, name)(3, 5).double(), torch.randn(3, 4, 3, dtype=torch.float64)

    def step(x):
        return as_tuple(cell(x))

    row = x[0, :2].requires_grad_()
    assert gradcheck(step, (row,), check_forward_ad=True)
    assert gradgradcheck(step, (row,), check_fwd_over_rev=True)
    for n, every in enumerate(vmap(step)(x)):
        assert_close(f"state{n}", torch.stack([step(one)[n] for one in x]), every)


@pytest.mark.parametrize("name", NAMES)
def test_cells_compile_in_one_graph(name, backend):
    cell = getattr(rnnfast, name)(3, 5)
    torch._dynamo.reset()
    x = torch.randn(4, 3)
    torch.testing.assert_close(torch.compile(cell, fullgraph=True, backend="aot_eager")(x), cell(x))


@pytest.mark.parametrize("name", NAMES)
def test_torch_takes_the_steps_that_it_is_asked_for(name):
    theirs, ours = (getattr(module, name)(3, 5) for module in (nn, rnnfast))
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(4, 3)
    with rnnfast.use_backend("torch"):
        assert rnnfast.explain(ours, x).backend == "torch"
        for expected, got in zip(as_tuple(theirs(x)), as_tuple(ours(x)), strict=True):
            assert torch.equal(expected, got)
            assert type(expected.grad_fn) is type(got.grad_fn)


@pytest.mark.parametrize("nonlinearity", ["tanh", "relu"])
def test_auto_leaves_what_torch_does_faster_to_torch(nonlinearity):
    cell, x = rnnfast.RNNCell(3, 5, nonlinearity=nonlinearity), torch.randn(4, 3)
    with rnnfast.use_backend("auto"):
        assert rnnfast.explain(cell, x).backend == "torch"
        assert "faster" in rnnfast.explain(cell, x).reason
        assert type(cell(x).grad_fn) is type(nn.RNNCell(3, 5, nonlinearity=nonlinearity)(x).grad_fn)
        assert rnnfast.explain(rnnfast.GRUCell(3, 5), x).backend == "numba"
    with rnnfast.use_backend("numba"):
        assert rnnfast.explain(cell, x).backend == "numba"
