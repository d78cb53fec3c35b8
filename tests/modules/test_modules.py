"""The modules behave as torch's: same constructor, parameters, results, gradients and errors."""

import copy
import io
import pickle

import pytest
import torch
from closeness import assert_all_close
from layers import CELLS, as_tuple, pair, random_hx, run, weights_like
from torch import nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pack_sequence

import rnnfast

F64 = {"dtype": torch.float64}
NAMES = ("RNN", "LSTM", "GRU")


@pytest.mark.parametrize("bidirectional", [False, True], ids=["one_way", "both_ways"])
@pytest.mark.parametrize("batch_first", [False, True], ids=["time_first", "batch_first"])
@pytest.mark.parametrize("bias", [False, True], ids=["no_bias", "bias"])
@pytest.mark.parametrize("cell", CELLS)
def test_results_and_gradients_equal_torch(cell, bias, batch_first, bidirectional, backend):
    options = {"bias": bias, "batch_first": batch_first, "bidirectional": bidirectional}
    theirs, ours = pair(cell, 3, 7, 2, **options, **F64)
    x = torch.randn(4, 5, 3, **F64, requires_grad=True)
    hx = random_hx(theirs, 4 if batch_first else 5)
    assert_all_close(run(theirs, x, hx), run(ours, x, hx))
    assert_all_close(run(theirs, x), run(ours, x))


@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("sort", [True, False], ids=["sorted", "unsorted"])
def test_packed_sequences_equal_torch(cell, sort, backend):
    theirs, ours = pair(cell, 3, 7, 2, bidirectional=True, **F64)
    lengths = [6, 4, 4, 1] if sort else [4, 6, 1, 4]
    rows = [torch.randn(n, 3, **F64) for n in lengths]
    with torch.device("cpu"):  # where torch wants the lengths that it makes
        packed = pack_sequence(rows, enforce_sorted=sort)
    packed.data.requires_grad_()
    hx = random_hx(theirs, 4)
    assert_all_close(run(theirs, packed, hx), run(ours, packed, hx))
    expected, got = theirs(packed)[0], ours(packed)[0]
    assert isinstance(got, PackedSequence)
    for field in ("batch_sizes", "sorted_indices", "unsorted_indices"):
        assert getattr(expected, field) is getattr(got, field)


@pytest.mark.parametrize("cell", CELLS)
def test_unbatched_input_equals_torch(cell, backend):
    theirs, ours = pair(cell, 3, 7, 2, **F64)
    x = torch.randn(5, 3, **F64)
    states = as_tuple(random_hx(theirs, 1))
    hx = tuple(s.detach().squeeze(1) for s in states)
    hx = hx if cell.startswith("lstm") else hx[0]
    for given in (hx, None):
        expected, got = theirs(x, given), ours(x, given)
        assert_all_close({"output": expected[0]}, {"output": got[0]})
        for n, (a, b) in enumerate(zip(as_tuple(expected[1]), as_tuple(got[1]), strict=True)):
            assert_all_close({f"final{n}": a}, {f"final{n}": b})


@pytest.mark.parametrize("name", NAMES)
def test_initial_values_and_state_dict_are_torchs(name):
    torch.manual_seed(3)
    theirs = getattr(nn, name)(4, 6, 2, bidirectional=True)
    torch.manual_seed(3)
    ours = getattr(rnnfast, name)(4, 6, 2, bidirectional=True)
    assert list(theirs.state_dict()) == list(ours.state_dict())
    for key, value in theirs.state_dict().items():
        assert torch.equal(value, ours.state_dict()[key])
    theirs.load_state_dict(ours.state_dict(), strict=True)
    assert repr(ours) == repr(theirs)[:-1] + ", rnnfast)"
    assert ours.all_weights[0][0] is ours.weight_ih_l0


def state(*shape, dtype=torch.float32):
    return torch.zeros(*shape, dtype=dtype)


MISTAKES = {
    "input of 4 dimensions": lambda m: m(state(2, 2, 2, 3)),
    "input of 1 dimension": lambda m: m(state(3)),
    "input too wide": lambda m: m(state(2, 2, 4)),
    "input of another dtype": lambda m: m(state(2, 2, 3, dtype=torch.float64)),
    "unbatched state for batched input": lambda m: m(state(2, 2, 3), hidden(m, 1, 5)),
    "batched state for unbatched input": lambda m: m(state(2, 3), hidden(m, 1, 1, 5)),
    "state of another batch": lambda m: m(state(2, 2, 3), hidden(m, 1, 3, 5)),
    "state of another width": lambda m: m(state(2, 2, 3), hidden(m, 1, 2, 6)),
    "state of another number of layers": lambda m: m(state(2, 2, 3), hidden(m, 2, 2, 5)),
    "packed data too wide": lambda m: m(pack_padded_sequence(state(2, 2, 4), [2, 1])),
    "packed, state of another batch": lambda m: m(pack_padded_sequence(state(2, 2, 3), [2, 1]), hidden(m, 1, 3, 5)),
}


# Where torch lets a product of a packed LSTM fail rather than say what is wrong, ours says it.
UNCHECKED_BY_TORCH = [check for name, check in MISTAKES.items() if name.startswith("packed")]


def hidden(module, *shape):
    return (state(*shape), state(*shape)) if module.mode == "LSTM" else state(*shape)


@pytest.mark.parametrize("mistake", MISTAKES.values(), ids=MISTAKES)
@pytest.mark.parametrize("name", NAMES)
def test_mistakes_get_torchs_words(name, mistake, backend):
    with pytest.raises(Exception) as expected:  # noqa: PT011 - torch decides the type
        mistake(getattr(nn, name)(3, 5))
    with pytest.raises(type(expected.value)) as got:
        mistake(getattr(rnnfast, name)(3, 5))
    assert type(got.value) is type(expected.value)
    older = str(expected.value).startswith("input must have the type")  # torch 2.6 of another dtype
    if not older and (name != "LSTM" or mistake not in UNCHECKED_BY_TORCH):
        assert str(got.value) == str(expected.value)


def with_weight(name: str, weight: torch.Tensor):
    """Return a layer with a plain tensor in a parameter's place."""
    layer = rnnfast.LSTM(3, 5)
    delattr(layer, name)
    setattr(layer, name, weight)
    return layer


# What a kernel would follow past the end of a tensor.
MISFITS = {
    "recurrent weight too narrow": (
        lambda x: with_weight("weight_hh_l0", state(20, 4))(x),
        r"\[20, 5\], got \[20, 4\]",
    ),
    "input weight too short": (lambda x: with_weight("weight_ih_l0", state(16, 3))(x), r"\[20, 3\], got \[16, 3\]"),
    "bias too short": (lambda x: with_weight("bias_hh_l0", state(1))(x), r"weights\[3\]: expected shape \[20\]"),
    "weight of another dtype": (
        lambda x: with_weight("weight_hh_l0", state(20, 5, dtype=torch.float64))(x),
        "same dtype",
    ),
    "cell's input of another dtype": (lambda x: rnnfast.LSTMCell(3, 5)(x[0].double()), "dtype"),
    "weights of another device": (lambda x: rnnfast.LSTM(3, 5, device="meta")(x), "same device"),
    "resets of another device": (
        lambda x: rnnfast.LSTM(3, 5)(x, resets=torch.zeros(2, 2, dtype=torch.bool, device="meta")),
        "same device",
    ),
    "too few weights": (lambda x: rnnfast.functional.lstm(x, [state(20, 3), state(20, 5)] * 2, num_layers=3), "got 4"),
    "too many weights": (lambda x: rnnfast.functional.gru(x, [state(15, 3), state(15, 5), state(5, 5)]), "2 or 4"),
    "second layer of another width": (
        lambda x: rnnfast.functional.lstm(x, [state(20, 3), state(20, 5)] * 2, num_layers=2),
        r"weights\[2\]: expected shape \[20, 5\]",
    ),
    "growing batch sizes": (lambda x: rnnfast.LSTM(3, 5)(PackedSequence(x[0], torch.tensor([0, 2]))), "never grow"),
    "negative batch sizes": (lambda x: rnnfast.LSTM(3, 5)(PackedSequence(x[0], torch.tensor([3, -1]))), "never grow"),
    "too few packed rows": (lambda x: rnnfast.LSTM(3, 5)(PackedSequence(x[0], torch.tensor([2, 1]))), "2 rows"),
}


@pytest.mark.parametrize(("call", "words"), MISFITS.values(), ids=MISFITS)
def test_tensors_that_do_not_fit_together_reach_no_kernel(call, words, backend):
    with pytest.raises((RuntimeError, ValueError), match=words):
        call(state(2, 2, 3))


@pytest.mark.parametrize(
    ("args", "kwargs"),
    [((3, 5), {"dropout": 2}), ((3, 5), {"dropout": True}), ((3, 0), {}), ((3, 5, 0), {}), ((0, 5), {}),
     ((3.0, 5), {}), ((3, 5), {"bias": 1}), ((3, 5), {"batch_first": 1}), ((3, 5), {"unknown": 1}), ((3,), {})],
)  # fmt: skip
@pytest.mark.parametrize("name", NAMES)
def test_constructor_mistakes_get_torchs_type(name, args, kwargs):
    try:
        getattr(nn, name)(*args, **kwargs)
    except Exception as error:  # torch decides the type
        with pytest.raises(type(error)):
            getattr(rnnfast, name)(*args, **kwargs)
    else:  # older versions of torch check less, and so do ours there
        getattr(rnnfast, name)(*args, **kwargs)


def test_constructor_refuses_what_the_cell_does_not_have():
    with pytest.raises(ValueError, match="Unknown nonlinearity 'elu'"):
        rnnfast.RNN(3, 5, nonlinearity="elu")
    for module in (rnnfast.RNN, rnnfast.GRU):
        with pytest.raises(ValueError, match="proj_size argument is only supported for LSTM"):
            module(3, 5, proj_size=2)
    with pytest.raises(ValueError, match="proj_size has to be smaller than hidden_size"):
        rnnfast.LSTM(3, 5, proj_size=5)
    with pytest.warns(UserWarning, match="dropout option adds dropout after all but last"):
        rnnfast.LSTM(3, 5, dropout=0.5)


@pytest.mark.parametrize("name", NAMES)
def test_copies_and_conversions(name, backend):
    ours = getattr(rnnfast, name)(3, 5, 2)
    x = torch.randn(4, 2, 3)
    expected = ours(x)[0]
    buffer = io.BytesIO()
    torch.save(ours, buffer)
    buffer.seek(0)
    copies = [copy.deepcopy(ours), pickle.loads(pickle.dumps(ours)), torch.load(buffer, weights_only=False)]
    for made in copies:
        assert torch.equal(made(x)[0], expected)
    doubled = ours.double()
    assert doubled(x.double())[0].dtype == torch.float64
    assert torch.allclose(doubled(x.double())[0].float(), expected, atol=1e-6)


@pytest.mark.parametrize("cell", CELLS)
def test_states_may_come_as_a_list_or_expanded(cell, backend):
    theirs, ours = pair(cell, 3, 7, **F64)
    hx = random_hx(theirs, 4)
    x = torch.randn(5, 4, 3, **F64, requires_grad=True)
    if isinstance(hx, tuple):
        assert torch.equal(ours(x, list(hx))[0], ours(x, hx)[0])
    expand = tuple(s[:, :1].detach().expand(1, 4, s.shape[-1]) for s in as_tuple(hx))
    expand = expand if isinstance(hx, tuple) else expand[0]
    assert_all_close(run(theirs, x, expand), run(ours, x, expand))


@pytest.mark.parametrize("cell", CELLS)
def test_inputs_of_any_layout(cell, backend):
    theirs, ours = pair(cell, 3, 7, **F64)
    base = torch.randn(3, 4, 5, **F64)
    layouts = {
        "permuted": base.permute(2, 1, 0),
        "expanded": torch.randn(1, 4, 3, **F64).expand(5, 4, 3),
        "broadcast": torch.randn(5, 4, 1, **F64).expand(5, 4, 3),
        "strided": torch.randn(10, 4, 6, **F64)[::2, :, ::2],
        "flipped": torch.randn(5, 4, 3, **F64).flip(0),
    }
    for name, x in layouts.items():
        x = x.detach().requires_grad_()
        expected, got = run(theirs, x), run(ours, x)
        assert_all_close({f"{name} {k}": v for k, v in expected.items()}, {f"{name} {k}": v for k, v in got.items()})


@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("trained", ["weight_hh", "bias_ih", "weight_ih_l1", "none"])
def test_frozen_parameters(cell, trained, backend):
    theirs, ours = pair(cell, 3, 7, 2, **F64)
    for layer in (theirs, ours):
        for name, parameter in layer.named_parameters():
            parameter.requires_grad_(name.startswith(trained))
    x = torch.randn(5, 4, 3, **F64, requires_grad=trained == "none")
    assert_all_close(run(theirs, x), run(ours, x))


@pytest.mark.parametrize("cell", CELLS)
def test_weights_are_read_by_name(cell, backend):
    theirs, ours = pair(cell, 3, 7, **F64)
    x = torch.randn(5, 4, 3, **F64)
    half = {name: value.detach() * 0.5 for name, value in ours.named_parameters()}
    expected = torch.func.functional_call(theirs, half, (x,))[0]
    assert_all_close(
        {"functional_call": expected}, {"functional_call": torch.func.functional_call(ours, half, (x,))[0]}
    )
    with torch.no_grad():
        theirs.weight_hh_l0.mul_(0.25)
    replacement = ours.weight_hh_l0.detach() * 0.25
    del ours.weight_hh_l0
    ours.weight_hh_l0 = replacement
    assert_all_close({"replaced": theirs(x)[0]}, {"replaced": ours(x)[0]})


@pytest.mark.parametrize("cell", CELLS)
def test_no_steps_and_no_rows(cell, backend):
    theirs, ours = pair(cell, 3, 7, 2, bidirectional=True, **F64)
    hx = random_hx(theirs, 4)
    results = run(ours, torch.zeros(0, 4, 3, **F64), hx)
    assert results["output"].shape == (0, 4, 2 * (ours.proj_size or 7))
    for n, initial in enumerate(as_tuple(hx)):
        assert torch.equal(results[f"final{n}"], initial)
        assert torch.equal(results[f"dhx{n}"], weights_like(initial))
    empty = run(ours, torch.zeros(5, 0, 3, **F64), random_hx(theirs, 0))
    assert empty["output"].shape == (5, 0, 2 * (ours.proj_size or 7))
    assert (empty["dweight_hh_l0"] == 0).all()


def test_dropout_between_layers(backend):
    ours = rnnfast.LSTM(8, 64, 2, dropout=0.5)
    x = torch.randn(20, 4, 8)
    torch.manual_seed(0)
    first = ours(x)[0]
    assert not torch.equal(first, ours(x)[0])
    torch.manual_seed(0)
    assert torch.equal(first, ours(x)[0])
    ours.eval()
    assert torch.equal(ours(x)[0], ours(x)[0])
    ours.train()
    ours.dropout = 1.0
    zeroed = ours(x)[0]
    ours.dropout = 0.0
    alone = rnnfast.LSTM(64, 64)
    alone.load_state_dict({k.replace("_l1", "_l0"): v for k, v in ours.state_dict().items() if k.endswith("_l1")})
    assert torch.equal(zeroed, alone(torch.zeros(20, 4, 64))[0])


def test_flatten_parameters_does_and_says_nothing():
    ours = rnnfast.GRU(3, 5)
    before = {k: v.data_ptr() for k, v in ours.named_parameters()}
    assert ours.flatten_parameters() is None
    assert {k: v.data_ptr() for k, v in ours.named_parameters()} == before
