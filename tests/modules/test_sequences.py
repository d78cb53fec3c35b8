"""Sequences as they come: ragged, reset, every state. Each is compared with plain loops over single sequences."""

import subprocess
import sys

import pytest
import torch
from closeness import assert_all_close, assert_close, assert_same
from conftest import INTERPRETED
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from layers import CELLS, as_tuple, pair, random_hx, run
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

import rnnfast

F64 = {"dtype": torch.float64}
cells = pytest.mark.parametrize("cell", CELLS)
examples = settings(
    max_examples=4 if INTERPRETED else 25,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)


def row_by_row(layer, x, lengths, hx):
    """Run each row alone, cut to its length, and lay the results out as `lengths=` does. Time-major."""
    outputs, finals = [], []
    states = as_tuple(hx)
    for b, length in enumerate(lengths.tolist()):
        own = tuple(s[:, b : b + 1] for s in states)
        if length == 0:
            width = layer.hidden_size if layer.proj_size == 0 else layer.proj_size
            output, final = x.new_zeros(0, 1, width * (2 if layer.bidirectional else 1)), own
        else:
            output, final = layer(x[:length, b : b + 1], own if len(own) > 1 else own[0])
        outputs.append(torch.cat((output, output.new_zeros(len(x) - length, *output.shape[1:]))))
        finals.append(as_tuple(final))
    return torch.cat(outputs, 1), tuple(torch.cat(parts, 1) for parts in zip(*finals, strict=True))


@cells
@pytest.mark.parametrize("bidirectional", [False, True], ids=["one_way", "both_ways"])
def test_lengths_equal_single_sequences(cell, bidirectional, backend):
    theirs, ours = pair(cell, 3, 7, 2, bidirectional=bidirectional, **F64)
    lengths = torch.tensor([4, 0, 6, 1, 6, 3])
    x = torch.randn(6, 6, 3, **F64)
    hx = random_hx(theirs, 6)
    output, finals = row_by_row(theirs, x, lengths, hx)
    got, got_finals = ours(x, hx, lengths=lengths)
    assert_close("output", output, got)
    for n, (a, b) in enumerate(zip(finals, as_tuple(got_finals), strict=True)):
        assert_close(f"final{n}", a, b)


@cells
def test_lengths_have_the_gradients_of_a_packed_sequence(cell, backend):
    theirs, ours = pair(cell, 3, 7, 2, bidirectional=True, batch_first=True, **F64)
    lengths = torch.tensor([4, 6, 1, 3])
    x = torch.randn(4, 6, 3, **F64, requires_grad=True)
    hx = random_hx(theirs, 4)

    class Packed(torch.nn.Module):
        mode, named_parameters = theirs.mode, theirs.named_parameters

        def forward(self, x, hx):
            packed = pack_padded_sequence(x, lengths.cpu(), batch_first=True, enforce_sorted=False)
            output, finals = theirs(packed, hx)
            return pad_packed_sequence(output, batch_first=True)[0], finals

    assert_all_close(run(Packed(), x, hx), run(ours, x, hx, lengths=lengths))


@cells
def test_padding_reaches_nothing(cell, backend):
    _, ours = pair(cell, 3, 7, 2, bidirectional=True, **F64)
    lengths = torch.tensor([2, 5, 0, 3])
    x = torch.randn(5, 4, 3, **F64)
    clean = x.clone().requires_grad_()
    for b, length in enumerate(lengths.tolist()):
        x[length:, b] = float("nan")
    x.requires_grad_()
    expected, got = run(ours, clean, lengths=lengths), run(ours, x, lengths=lengths)
    for name in expected:
        assert torch.equal(got[name], expected[name]), name
    for b, length in enumerate(lengths.tolist()):
        assert (got["output"][length:, b] == 0).all()
        assert (got["dinput"][length:, b] == 0).all()


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.int16, torch.uint8], ids=str)
def test_lengths_of_any_integer_type(dtype, backend):
    ours = rnnfast.GRU(3, 7, **F64)
    x = torch.randn(5, 3, 3, **F64)
    lengths = torch.tensor([2, 5, 3])
    assert torch.equal(ours(x, lengths=lengths.to(dtype))[0], ours(x, lengths=lengths)[0])


@pytest.mark.parametrize(("dtype", "steps"), [(torch.uint8, 256), (torch.int8, 130), (torch.int16, 32768)], ids=str)
def test_more_steps_than_the_dtype_of_the_lengths_can_count(dtype, steps, backend):
    ours, x, lengths = rnnfast.RNN(1, 1), torch.randn(steps, 2, 1), torch.tensor([100, 3])
    assert torch.equal(ours(x, lengths=lengths.to(dtype))[0], ours(x, lengths=lengths)[0])


@cells
def test_resets_equal_pieces(cell, backend):
    theirs, ours = pair(cell, 3, 7, **F64)
    x = torch.randn(9, 2, 3, **F64, requires_grad=True)
    hx = random_hx(theirs, 2)
    resets = torch.zeros(9, 2, dtype=torch.bool)
    resets[0, 1] = resets[3] = resets[7, 0] = True

    class Pieces(torch.nn.Module):
        mode, named_parameters = theirs.mode, theirs.named_parameters

        def forward(self, x, hx):
            outputs, states = [], as_tuple(hx)
            for t in range(9):
                states = tuple(torch.where(resets[t][:, None], torch.zeros_like(s), s) for s in states)
                output, states = theirs(x[t : t + 1], states if len(states) > 1 else states[0])
                states = as_tuple(states)
                outputs.append(output)
            return torch.cat(outputs), states if len(states) > 1 else states[0]

    assert_all_close(run(Pieces(), x, hx), run(ours, x, hx, resets=resets))


@cells
def test_resets_stop_nan_and_gradient(cell, backend):
    _, ours = pair(cell, 3, 7, **F64)
    x = torch.randn(6, 2, 3, **F64)
    resets = torch.zeros(6, 2, dtype=torch.bool)
    resets[3] = True
    x.requires_grad_()
    output = ours(x, resets=resets)[0]
    seed = torch.zeros_like(output)
    seed[4] = float("nan")
    (grad,) = torch.autograd.grad(output, x, seed)
    assert (grad[:3] == 0).all()
    assert grad[3].isnan().all()
    with torch.no_grad():
        x[1, 0] = float("nan")
    assert ours(x, resets=resets)[0][3:].isfinite().all()


@cells
@pytest.mark.parametrize("layout", ["time_first", "batch_first", "unbatched", "packed", "lengths"])
def test_resets_in_every_layout(cell, layout, backend):
    _, ours = pair(cell, 3, 7, 2, **F64)
    x, resets = torch.randn(6, 3, 3, **F64), torch.rand(6, 3) < 0.4
    lengths = torch.tensor([4, 6, 2])
    with rnnfast.use_backend("reference"):
        plain, ragged = ours(x, resets=resets)[0], ours(x, lengths=lengths, resets=resets)[0]
    if layout == "batch_first":
        ours.batch_first = True
        got = ours(x.transpose(0, 1), resets=resets.T)[0].transpose(0, 1)
    elif layout == "unbatched":
        got, plain = ours(x[:, 0], resets=resets[:, 0])[0], plain[:, 0]
    elif layout == "packed":
        packed = pack_padded_sequence(x, lengths.cpu(), enforce_sorted=False)
        got, plain = pad_packed_sequence(ours(packed, resets=resets)[0])[0], ragged
    elif layout == "lengths":
        got, plain = ours(x, lengths=lengths, resets=resets)[0], ragged
    else:
        got = ours(x, resets=resets)[0]
    assert_close("output", plain, got)


@cells
@pytest.mark.parametrize("ragged", [False, True], ids=["dense", "lengths"])
def test_all_states(cell, ragged, backend):
    theirs, ours = pair(cell, 3, 7, 2, batch_first=True, **F64)
    x = torch.randn(4, 6, 3, **F64, requires_grad=True)
    hx = random_hx(theirs, 4)
    options = {"lengths": torch.tensor([4, 6, 1, 0])} if ragged else {}
    with rnnfast.use_backend("reference"):
        expected = run(ours, x, hx, all_states=True, **options)
    got = run(ours, x, hx, all_states=True, **options)
    assert_all_close(expected, got)
    assert "states1" in got or not cell.startswith("lstm")
    if not ragged:
        prefix = as_tuple(theirs(x[:, :3], hx)[1])
        for n, final in enumerate(prefix):
            assert_close(f"states{n}", final[-1], got[f"states{n}"][:, 2])


def test_all_states_of_a_packed_sequence_are_packed(backend):
    ours = rnnfast.LSTM(3, 7, **F64)
    packed = pack_padded_sequence(torch.randn(5, 2, 3, **F64), [3, 5], enforce_sorted=False)
    output, (_, c), (h_all, c_all) = ours(packed, all_states=True)
    assert torch.equal(h_all.data, output.data)
    states, lengths = pad_packed_sequence(c_all)
    for b, length in enumerate(lengths.tolist()):
        assert torch.equal(states[length - 1, b], c[0, b])


BAD = {
    "negative": (ValueError, "lengths must lie between 0 and", {"lengths": torch.tensor([1, -1])}),
    "too long": (ValueError, "lengths must lie between 0 and", {"lengths": torch.tensor([1, 6])}),
    "one too many": (ValueError, r"expected shape \[2\].*got \[3\]", {"lengths": torch.tensor([1, 2, 3])}),
    "not integers": (TypeError, "integer tensor.*got dtype torch.float32", {"lengths": torch.tensor([1.0, 2.0])}),
    "a list": (TypeError, "integer tensor.*got list", {"lengths": [1, 2]}),
    "resets of the wrong shape": (
        ValueError,
        r"expected shape \[5, 2\].*got \[2, 5\]",
        {"resets": torch.zeros(2, 5) > 0},
    ),
    "resets not bool": (TypeError, "bool tensor.*got dtype torch.float32", {"resets": torch.zeros(5, 2)}),
    "resets a list": (TypeError, "bool tensor.*got list", {"resets": [[False] * 2] * 5}),
}


@pytest.mark.parametrize(("error", "words", "options"), BAD.values(), ids=BAD)
def test_bad_lengths_and_resets(error, words, options, backend):
    with pytest.raises(error, match=words):
        rnnfast.LSTM(3, 7)(torch.randn(5, 2, 3), **options)


def test_options_that_exclude_each_other(backend):
    packed = pack_padded_sequence(torch.randn(5, 2, 3), [5, 2])
    with pytest.raises(ValueError, match="PackedSequence, which carries its own"):
        rnnfast.LSTM(3, 7)(packed, lengths=torch.tensor([5, 2]))
    with pytest.raises(ValueError, match="bidirectional"):
        rnnfast.LSTM(3, 7, bidirectional=True)(torch.randn(5, 2, 3), resets=torch.zeros(5, 2, dtype=torch.bool))
    with pytest.raises(ValueError, match="unbatched"):
        rnnfast.LSTM(3, 7)(torch.randn(5, 3), lengths=torch.tensor([5]))


@examples
@given(data=st.data(), cell=st.sampled_from(list(CELLS)), steps=st.integers(1, 9), width=st.integers(1, 20))
def test_any_ragged_batch_equals_its_rows(data, cell, steps, width, backend):
    lengths = torch.tensor(data.draw(st.lists(st.integers(0, steps), min_size=1, max_size=9)))
    bidirectional = data.draw(st.booleans())
    theirs, ours = pair(cell, 3, 6 + width, bidirectional=bidirectional, **F64)
    x = torch.randn(steps, len(lengths), 3, **F64)
    hx = random_hx(theirs, len(lengths))
    output, finals = row_by_row(theirs, x, lengths, hx)
    got, got_finals = ours(x, hx, lengths=lengths)
    assert_close("output", output, got)
    for n, (a, b) in enumerate(zip(finals, as_tuple(got_finals), strict=True)):
        assert_close(f"final{n}", a, b)


@examples
@given(data=st.data(), cell=st.sampled_from(list(CELLS)), steps=st.integers(1, 12), batch=st.integers(1, 9))
def test_any_chunks_equal_one_call(data, cell, steps, batch, backend):
    cuts = sorted(data.draw(st.lists(st.integers(0, steps), max_size=4)))
    _, ours = pair(cell, 3, 9)
    x = torch.randn(steps, batch, 3)
    whole, final = ours(x)
    parts, state = [], None
    for start, end in zip([0, *cuts], [*cuts, steps], strict=True):
        part, state = ours(x[start:end], state)
        parts.append(part)
    assert_same(whole, torch.cat(parts), backend)
    for a, b in zip(as_tuple(final), as_tuple(state), strict=True):
        assert_same(a, b, backend)


LONG = """
import resource, time, torch, rnnfast
layer, x = rnnfast.LSTM(1, 32), torch.randn(1_000_000, 1, 1)
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
with torch.no_grad():
    layer(x[:1000])
    before = peak()
    output, (h, c) = layer(x)
    assert peak() - before < 32 * 4 + 40, peak() - before
    state = layer(x[:999_990])[1]
    assert torch.equal(layer(x[999_990:], state)[0], output[999_990:])
"""


def test_a_million_steps_need_no_more_memory_than_their_output():
    run = subprocess.run([sys.executable, "-c", LONG], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
