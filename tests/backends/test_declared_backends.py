"""Declared cells of torch's form on the backends that run LSTM and GRU, with functions that those two have not."""

import pytest
import torch
from closeness import assert_all_close
from conftest import backends_under_test

import rnnfast
from rnnfast import cells, functional

F64 = {"dtype": torch.float64}


@rnnfast.cell(gates="a b", states="h c")
def many_functions(x, u, state):
    """Most of what a step may call."""
    h, c = state
    a = torch.exp(-torch.abs(x.a + u.a)) + torch.log1p(torch.exp(-c * c)) + torch.nn.functional.softplus(h)
    b = torch.maximum(x.b, u.b) + torch.nn.functional.logsigmoid(x.b) - torch.nn.functional.elu(u.b)
    c = torch.where(a > b, torch.sin(a), torch.erf(b)) + torch.sign(a) * torch.sqrt(c * c + 1) * 0.5
    return torch.tanh(a) * torch.clamp(b, -1, 1) + torch.expm1(-c * c), torch.tanh(c)


# On the CPU it takes a minute to compile.
CELLS = [pytest.param(many_functions, marks=pytest.mark.long) if backends_under_test() == ["numba"] else many_functions]
if backends_under_test() == ["triton"]:
    CELLS += [cells.janet, cells.minimal_gated_unit, cells.slstm]


# Lanes outside of a tensor hold zeros, by which NumPy divides.
@pytest.mark.filterwarnings("ignore:(divide by zero|invalid value) encountered:RuntimeWarning")
@pytest.mark.parametrize("cell", CELLS, ids=lambda cell: cell.__name__)
def test_kernels_compute_what_the_users_function_does(cell, backend):
    torch.manual_seed(0)
    layer = rnnfast.Recurrent(cell, 3, 5, bidirectional=True, **F64)
    x = torch.randn(4, 3, 3, **F64, requires_grad=True)
    hx = tuple(torch.rand(2, 3, 5, **F64).add(0.5).requires_grad_() for _ in cell.states)
    leaves, lengths, found = (x, *hx, *layer.parameters()), torch.tensor([4, 2, 3]), {}
    for name in ("reference", backend):
        with rnnfast.use_backend(name):
            given = hx if len(hx) > 1 else hx[0]
            output, finals = functional.recurrent(layer.options(), x, layer.weights(), given, lengths=lengths)
        finals = finals if isinstance(finals, tuple) else (finals,)
        loss = sum((r * torch.arange(r.numel(), **F64).view_as(r).cos()).sum() for r in (output, *finals))
        grads = torch.autograd.grad(loss, leaves, create_graph=True)
        second = torch.autograd.grad(sum((grad**2).sum() for grad in grads), leaves)
        found[name] = dict(enumerate((output, *finals, *grads, *second)))
    assert_all_close(found["reference"], found[backend], 1e-10)
