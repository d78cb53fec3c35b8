"""Wrong input to layers and cells is refused in torch's words; empty sizes and single biases work as in torch."""

import pytest
import torch
from layers import as_tuple
from torch import nn

import rnnfast
from rnnfast.backends.dispatch import automatic

CELLS = ("RNNCell", "LSTMCell", "GRUCell")
STATES = {"three": lambda s: (s, s, s), "one": lambda s: (s,), "none": lambda s: ()}


def refusal(call) -> tuple[type, str]:
    """Return the type and the message of what a call raises."""
    with pytest.raises(Exception) as caught:  # noqa: PT011
        call()
    return caught.type, str(caught.value)


@pytest.mark.parametrize("states", ["three", "one", "none"])
@pytest.mark.parametrize("name", ["LSTM", "LSTMCell"])
def test_a_wrong_number_of_states(name, states):
    x, s = (torch.randn(4, 2, 3), torch.zeros(1, 2, 5)) if name == "LSTM" else (torch.randn(2, 3), torch.zeros(2, 5))
    theirs, ours = (refusal(lambda m=m: getattr(m, name)(3, 5)(x, STATES[states](s))) for m in (nn, rnnfast))
    assert ours == theirs


@pytest.mark.parametrize("name", ["LSTM", "LSTMCell"])
def test_one_stacked_tensor_is_no_pair(name):
    x, s = (torch.randn(4, 2, 3), torch.zeros(1, 2, 5)) if name == "LSTM" else (torch.randn(2, 3), torch.zeros(2, 5))
    layer = getattr(rnnfast, name)(3, 5)
    for _ in range(3):
        with pytest.raises(TypeError, match="must be tuple of Tensors, not Tensor"):
            layer(x, torch.stack((s, s)))


@pytest.mark.parametrize("name", CELLS)
@pytest.mark.parametrize("sizes", [(3, 0), (0, 5), (0, 0)], ids=str)
def test_cells_of_no_inputs_or_no_units(name, sizes, backend):
    theirs, ours = (getattr(m, name)(*sizes) for m in (nn, rnnfast))
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(2, sizes[0], requires_grad=True)
    for a, b in zip(as_tuple(theirs(x)), as_tuple(ours(x)), strict=True):
        torch.testing.assert_close(a, b)
    as_tuple(ours(x))[0].sum().backward()


@pytest.mark.parametrize("missing", ["bias_ih", "bias_hh"])
@pytest.mark.parametrize("name", CELLS)
def test_cells_with_one_bias(name, missing, backend):
    theirs, ours = (getattr(m, name)(3, 5) for m in (nn, rnnfast))
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(2, 3)
    for cell in (theirs, ours):
        setattr(cell, missing, None)
        as_tuple(cell(x))[0].sum().backward()
    for a, b in zip(as_tuple(theirs(x)), as_tuple(ours(x)), strict=True):
        torch.testing.assert_close(a, b)
    for a, b in zip(theirs.parameters(), ours.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad)


@pytest.mark.parametrize("name", CELLS)
def test_a_wrong_size_is_named_before_a_wrong_dtype(name, backend):
    x = torch.randn(2, 4, dtype=torch.float64)
    theirs, ours = (refusal(lambda m=m: getattr(m, name)(3, 5)(x)) for m in (nn, rnnfast))
    assert ours == theirs


@pytest.mark.parametrize("name", ["LSTM", "GRU", "RNN", *CELLS])
def test_arrays_are_refused_as_torch_refuses_them(name, backend):
    x, s = (torch.randn(2, 3), torch.zeros(2, 5)) if "Cell" in name else (torch.randn(4, 2, 3), torch.zeros(1, 2, 5))
    for args in ((x.cpu().numpy(),), (x, s.cpu().numpy())):
        theirs, ours = (refusal(lambda m=m, args=args: getattr(m, name)(3, 5)(*args)) for m in (nn, rnnfast))
        assert ours == theirs


def test_a_cell_that_torch_lacks_is_refused_there_and_looped_under_auto(monkeypatch):
    meta = torch.device("meta")
    before = automatic("gru", meta, torch.float32, False).backend
    assert before == "torch"
    monkeypatch.setattr(torch._VF, "vf", object())
    automatic.cache_clear()
    try:
        layer = rnnfast.GRU(3, 5)
        assert automatic("gru", meta, torch.float32, False).backend == "reference"
        for made, x in (
            (layer.to("meta"), torch.randn(4, 2, 3, device="meta")),
            (rnnfast.GRU(3, 5, dtype=torch.complex64), torch.randn(4, 2, 3, dtype=torch.complex64)),
        ):
            assert made(x)[0].shape == (4, 2, 5)
            assert made(x)[0].shape == (4, 2, 5)
        with rnnfast.use_backend("torch"), pytest.raises(RuntimeError, match=r"torch\.nn lacks the cell gru"):
            rnnfast.GRU(3, 5)(torch.randn(4, 2, 3))
    finally:
        automatic.cache_clear()


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("grad", [False, True])
def test_no_states_are_no_initial_state(frozen, grad):
    """Nor once the call without states is recorded."""
    layer = rnnfast.LSTM(4, 5).eval()
    layer, x = rnnfast.freeze(layer) if frozen else layer, torch.zeros(2, 3, 4)
    with torch.set_grad_enabled(grad):
        for _ in range(3):
            for empty in ((), []):
                with pytest.raises(IndexError):
                    layer(x, empty)
            layer(x)
