"""Padding with NaN, before a library's product sees it: what the product does with its neighbours is not ours."""

import pytest
import torch
from gpu_layers import Case, gradients_like, make

pytest.importorskip("triton", minversion="3.5")

from rnnfast.backends import gpu, gpu_rows

CPU = torch.device("cpu")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("layout", ["padded", "packed"])
def test_gates_of_live_rows_are_finite(layout, dtype):
    """Of odd widths, some libraries read rows in pairs that reach into the row behind."""
    for B, I in ((35, 3), (18, 5), (64, 7), (3, 33)):  # noqa: E741
        call = gpu_rows.lay_out(make(Case("lstm", T=2, B=B, I=I, H=33, dtype=dtype, layout=layout), CPU))
        gates, live = gpu.input_gates(call).flatten(0, -4), call.rows.live()
        assert (gates if live is None else gates[live[:, 0]]).isfinite().all()


@pytest.mark.parametrize("cell", ["rnn_tanh", "lstm"])
def test_no_product_is_given_nan(cell, monkeypatch):
    """Nor where the library of this machine would keep rows apart."""
    given = []

    def watched(function):
        return lambda *args: given.extend(t for t in args if t is not None) or function(*args)

    for name in ("multiply", "multiply_add"):
        monkeypatch.setattr(gpu, name, watched(getattr(gpu, name)))
    layer = make(Case(cell, T=4, B=7, layout="padded", resets=True), CPU)
    assert layer.x.isnan().any()
    call = gpu_rows.lay_out(layer)
    gpu.input_gates(call)
    dx, h = torch.zeros(4, 7, 2, call.cell.gates, call.H), torch.zeros(4, 7, 2, call.H)
    monkeypatch.setattr(gpu, "shift_rows", lambda *args: None)
    gpu.weight_gradients(call, h, (), dx, dx, None, None, 1)
    gpu.input_gradient(call, *gradients_like((dx,)))
    assert len(given) > 6
    assert all(t.isfinite().all() for t in given)
