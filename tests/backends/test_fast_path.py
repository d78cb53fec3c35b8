"""The fast path gives the same bits as the ordinary one, and is taken only where nothing else can tell."""

import pytest
import torch
from layers import ordinary_path
from torch import nn

import rnnfast
from rnnfast import fast_path

MODULES = {"rnn": rnnfast.RNN, "lstm": rnnfast.LSTM, "gru": rnnfast.GRU}
FORMS = {
    "plain": {},
    "stacked": {"num_layers": 3, "bias": False},
    "both": {"num_layers": 2, "bidirectional": True},
    "batch-first": {"batch_first": True, "bidirectional": True},
    "double": {"dtype": torch.float64},
    "bfloat16": {"dtype": torch.bfloat16, "num_layers": 2},
    "float16": {"dtype": torch.float16},
}


@pytest.fixture(autouse=True)
def forgotten():
    fast_path.recorded.clear()


def flat(result) -> list[torch.Tensor]:
    output, finals = result
    return [output, *(finals if isinstance(finals, tuple) else (finals,))]


def states_for(module: nn.RNNBase, batch: int):
    rows = module.num_layers * (1 + module.bidirectional)
    dtype = module.weight_hh_l0.dtype
    h = torch.randn(rows, batch, module.proj_size or module.hidden_size, dtype=dtype)
    return (h, torch.randn(rows, batch, module.hidden_size, dtype=dtype)) if module.mode == "LSTM" else h


def check_repeats(module: nn.RNNBase, *args) -> None:
    with torch.no_grad():
        with ordinary_path():
            expected = module(*args)
        assert not fast_path.recorded
        results = [module(*args) for _ in range(2)]
    assert len(fast_path.recorded) == 1
    for found in results:
        for a, b in zip(flat(expected), flat(found), strict=True):
            assert a.shape == b.shape
            assert a.stride() == b.stride()
            assert torch.equal(a, b)


@pytest.mark.parametrize("given", [False, True], ids=["zero", "given"])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("cell", MODULES)
def test_repeated_calls_give_the_same_bits(cell, form, given):
    module = MODULES[cell](5, 19, **FORMS[form])
    x = torch.randn(7, 3, 5, dtype=module.weight_hh_l0.dtype)
    check_repeats(module, x, *((states_for(module, 7 if module.batch_first else 3),) if given else ()))


def test_repeated_calls_of_other_layouts():
    check_repeats(rnnfast.LSTM(5, 19, proj_size=4), torch.randn(6, 2, 5))
    fast_path.recorded.clear()
    check_repeats(rnnfast.GRU(5, 19, batch_first=True), torch.randn(6, 5))
    fast_path.recorded.clear()
    check_repeats(rnnfast.GRU(5, 19), torch.randn(2, 6, 5).transpose(0, 1))
    fast_path.recorded.clear()
    check_repeats(rnnfast.GRU(5, 19), torch.randn(6, 1, 5).expand(6, 4, 5))


def test_every_call_reads_weights_and_inputs_anew():
    module = rnnfast.LSTM(5, 19)
    theirs = nn.LSTM(5, 19)
    with torch.no_grad():
        for scale in (1.0, 0.5, 2.0, 0.25):
            module.weight_hh_l0.data.mul_(scale)
            theirs.load_state_dict(module.state_dict())
            x = torch.randn(4, 2, 5)
            for a, b in zip(flat(module(x)), flat(theirs(x)), strict=True):
                torch.testing.assert_close(a, b)
    assert fast_path.recorded


def test_results_are_the_callers_own():
    module = rnnfast.GRU(5, 19)
    x = torch.randn(4, 2, 5)
    with torch.no_grad():
        results = [flat(module(x)) for _ in range(4)]
    addresses = {tensor.data_ptr() for result in results for tensor in result}
    assert len(addresses) == 8


def test_mistakes_are_never_prepared():
    module = rnnfast.LSTM(5, 19)
    wrong = (torch.zeros(1, 2, 18), torch.zeros(1, 2, 19))
    with torch.no_grad():
        for _ in range(3):
            with pytest.raises(RuntimeError, match="size"):
                module(torch.randn(4, 2, 5), wrong)
    assert not fast_path.recorded


def test_calls_that_something_watches_go_the_long_way():
    module, x = rnnfast.LSTM(5, 19), torch.randn(4, 2, 5)
    with torch.no_grad():
        for _ in range(3):
            with rnnfast.use_backend("reference"):
                module(x)
            with torch.autocast("cpu", torch.bfloat16):
                module(x)
            module(x, lengths=torch.tensor([4, 2]))
            torch.func.vmap(module)(x[None])
            rnnfast.LSTM(5, 19, num_layers=2, dropout=0.5)(x)
    assert not fast_path.recorded


def test_kinds_are_forgotten_when_there_are_too_many(monkeypatch):
    monkeypatch.setattr(fast_path, "MOST", 4)
    module = rnnfast.RNN(5, 19)
    with torch.no_grad():
        for steps in range(1, 12):
            module(torch.randn(steps, 1, 5))
            module(torch.randn(steps, 1, 5))
            kept = [key[5][0][0][0] for key in fast_path.recorded]  # T, of the shape of x
            assert kept == [*range(max(1, steps - 3), steps + 1)]


@pytest.mark.parametrize("given", [False, True])
@pytest.mark.parametrize("cell", [rnnfast.RNN, rnnfast.LSTM, rnnfast.GRU])
def test_every_base_of_a_prepared_call_gets_an_address(cell, given):
    layer, x = cell(3, 4, num_layers=2), torch.randn(2, 1, 3)
    states = 2 if cell is rnnfast.LSTM else 1
    hx = tuple(torch.zeros(2, 1, 4) for _ in range(states)) if given else None
    fast_path.recorded.clear()
    with torch.no_grad():
        for _ in range(3):
            layer(x, hx[0] if given and states == 1 else hx)
    (prepared,) = fast_path.recorded.values()
    assert len(prepared.stack.executable.recipe.named) == 2 + states * (1 + given) + len(layer.weights())


def test_calls_that_are_recorded_already_are_not_recorded_again(monkeypatch):
    """Tensors without memory have the sizes of others."""
    layer, made, record = rnnfast.GRU(3, 4), [], fast_path.record
    monkeypatch.setattr(fast_path, "record", lambda *args: made.append(args) or record(*args))
    with torch.no_grad():
        for _ in range(3):
            zeros = layer(torch._efficientzerotensor((5, 2, 3)))[0]
        assert torch.equal(zeros, layer(torch.zeros(5, 2, 3))[0])
    assert len(made) == 1
