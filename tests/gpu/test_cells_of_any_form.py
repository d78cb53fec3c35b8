"""Cells of other forms than torch's on the GPU's kernels: what they compute against the plain loop in float64.

In Triton's interpreter, or on a GPU; as compiled for GPUs that are not there in `test_compiled_cells.py`.
"""

import pytest
import torch
from any_form import CELLS, compare, everything, make, pointwise, results
from conftest import backends_under_test
from gpu_plans import ALONE
from rnnfast_kernels.cells import CELLS as KNOWN
from torch.nn.utils.rnn import pack_padded_sequence

import rnnfast
from rnnfast.backends import dispatch

if backends_under_test() != ["triton"]:
    pytest.skip("these are kernels of the GPU", allow_module_level=True)

from rnnfast_kernels.gpu import plan

F32, F64, BF16 = torch.float32, torch.float64, torch.bfloat16
# Lanes outside of a tensor hold zeros, by which NumPy divides.
pytestmark = pytest.mark.filterwarnings("ignore:(divide by zero|invalid value) encountered:RuntimeWarning")


@pytest.mark.long
@pytest.mark.parametrize("dtype", [F32, F64, BF16], ids=str)
@pytest.mark.parametrize("name", CELLS)
def test_published_cells(name, dtype):
    # A spike's slope near the threshold is steep, and computed from the rounded state.
    coarse = 0.2 if name == "recurrent_lif" else 6e-2
    compare(make(CELLS[name], dtype, H=17), tolerance=coarse if dtype == BF16 else None)


@pytest.mark.parametrize("cell", [everything, pointwise], ids=lambda cell: cell.__name__)
def test_forward_and_backward(cell):
    compare(make(cell, F32, D=1))


OPTIONS = {
    "lengths": lambda: {"lengths": torch.tensor([2, 0, 3])},
    "resets": lambda: {"resets": torch.rand(3, 3) < 0.4, "all_states": True},
    "both": lambda: {"lengths": torch.tensor([3, 3, 0]), "resets": torch.rand(3, 3) < 0.4},
}


@pytest.mark.long
@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("cell", [everything, pointwise], ids=lambda cell: cell.__name__)
def test_options(cell, option):
    reset = option != "lengths"
    compare(make(cell, F64, D=1 if reset else 2, layers=2), **OPTIONS[option]())


SHAPES = ((3, 3, 19), (3, 3, 1), (3, 1, 19), (1, 3, 19), (3, 1, 1), (1, 3, 1), (1, 1, 19), (1, 1, 1))


@pytest.mark.long
@pytest.mark.parametrize("n", range(4))
def test_signals_of_any_shape(n):
    compare(make(pointwise, F64, shapes=SHAPES[2 * n : 2 * n + 2]))


@pytest.mark.long
def test_a_broadcast_dimension_takes_no_memory():
    layer, x, hx, signals = make(pointwise, F64, shapes=((3, 1, 19), (1, 3, 1)))
    spread = {name: signal.expand(3, 3, 19) for name, signal in signals.items()}
    got, expected = results("triton", layer, x, hx, spread), results("triton", layer, x, hx, signals)
    assert all(torch.equal(got[name], expected[name]) for name in ("output", "dx", "dq_l0"))


@pytest.mark.long
@pytest.mark.parametrize("loop", ALONE)
def test_every_loop(loop):
    with plan.override(ALONE[loop]):
        compare(make(everything, F32), lengths=torch.tensor([2, 3, 1]))


@pytest.mark.long
@pytest.mark.parametrize("cell", [everything, pointwise], ids=lambda cell: cell.__name__)
def test_packed_is_padded_with_lengths(cell):
    layer, x, hx, signals = make(cell, F64)
    lengths = torch.tensor([3, 1, 2])
    packed = pack_padded_sequence(x, lengths, enforce_sorted=False)
    with rnnfast.use_backend("triton"):
        output, _ = layer(x, hx, signals=signals, lengths=lengths)
        got, _ = layer(packed, hx, signals=signals)
    leaves = (x, *signals.values(), *layer.parameters())
    for a, b in zip(
        torch.autograd.grad(output.sum(), leaves), torch.autograd.grad(got.data.sum(), leaves), strict=True
    ):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


@pytest.mark.long
def test_padding_reaches_nothing():
    layer, x, hx, signals = make(pointwise, F64)
    lengths = torch.tensor([2, 0, 3])
    expected = results("triton", layer, x, hx, signals, lengths=lengths)
    spoiled = x.detach().clone()
    for row, length in enumerate(lengths):
        spoiled[length:, row] = float("nan")
    got = results("triton", layer, spoiled.requires_grad_(), hx, signals, lengths=lengths)
    assert all(torch.equal(expected[name], got[name]) for name in expected)


@pytest.mark.long
def test_other_derivatives_go_by_the_plain_loop():
    layer, x, hx, signals = make(pointwise, F64, D=1)
    found = {}
    for backend in ("reference", "triton"):
        with rnnfast.use_backend(backend):
            output, _ = layer(x, hx, signals=signals)
        (dx,) = torch.autograd.grad(output.square().sum(), x, create_graph=True)
        (found[backend],) = torch.autograd.grad(dx.square().sum(), layer.p_l0)
    torch.testing.assert_close(found["triton"], found["reference"], rtol=1e-10, atol=1e-12)
    with rnnfast.use_backend("triton"):
        assert "other derivatives and transforms by the plain loop" in rnnfast.explain(layer, x).kernel
        with pytest.raises(RuntimeError, match="'triton' backend cannot run this: it has no kernels for forward mode"):
            torch.func.vmap(
                lambda each: layer(each[:, None], signals={"s": signals["s"][:, :1], "r": torch.ones(1)})[0]
            )(x.transpose(0, 1))


@rnnfast.cell(gates="a", states="h c")
def with_a_number(x, u, state):
    """A state that is always the same number."""
    return torch.tanh(x.a + u.a + state[1]), 0.5


def test_what_is_refused():
    assert KNOWN[with_a_number.identity].standard
    why = dispatch.unsupported("triton", with_a_number.identity, torch.device("cpu"), F32, False)
    assert why == "it has no kernels for cells with a state that is a number"
