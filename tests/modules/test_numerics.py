"""How right the kernels are: error against float64, repeatability, and what must not leak from row to row."""

import pytest
import torch
from closeness import assert_all_close, assert_close, assert_same, relative_error
from layers import CELLS, as_tuple, in_float64, pair, random_hx, run

from rnnfast import use_backend

F64 = {"dtype": torch.float64}
# T, B, I, H: multiples of nothing, both sides of every vector length and tile.
SIZES = [
    (1, 1, 1, 6),
    (7, 3, 17, 33),
    (33, 7, 3, 17),
    (17, 17, 7, 65),
    (9, 33, 65, 130),
    (65, 1, 33, 7),
    (3, 130, 5, 16),
]
ids = pytest.mark.parametrize("size", SIZES, ids=lambda s: "x".join(map(str, s)))


def exact_theirs_ours(cell, dtype, size) -> tuple[dict, dict, dict]:
    """Draw a layer and its input; return all results and gradients in float64, by torch and by rnnfast."""
    steps, batch, width, hidden = size
    theirs, ours = pair(cell, width, hidden, bidirectional=True, dtype=dtype)
    x = torch.randn(steps, batch, width, dtype=dtype, requires_grad=True)
    hx = random_hx(theirs, batch)
    exact_hx = tuple(s.detach().double().requires_grad_() for s in as_tuple(hx))
    exact_hx = exact_hx if isinstance(hx, tuple) else exact_hx[0]
    exact = run(in_float64(theirs), x.detach().double().requires_grad_(), exact_hx)
    return exact, run(theirs, x, hx), run(ours, x, hx)


def joined(tensors) -> torch.Tensor:
    """Return the numbers of all tensors as one vector in float64."""
    return torch.cat([each.detach().double().flatten() for each in tensors])


def worse_than_torchs(draws: list[tuple[dict, dict, dict]], dtype: torch.dtype) -> list[str]:
    """Return those results whose error, over all draws together, is larger than torch's."""
    floor = {torch.float32: 2e-6, torch.bfloat16: 8e-3, torch.float16: 1e-3}[dtype]
    # Both round what enters a product to bfloat16, so the errors are of one size, and which is larger is chance.
    chance = 1.25 if dtype == torch.bfloat16 else 1
    worse = []
    for name in draws[0][0]:
        exact, expected, got = (joined(results[name] for results in each) for each in zip(*draws, strict=True))
        error, allowed = relative_error(exact, got), max(floor, chance * relative_error(exact, expected))
        if error > allowed:
            worse.append(f"{name}: {error:.3g}, torch {allowed:.3g}")
    return worse


@ids
@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=["f32", "bf16", "f16"])
def test_error_against_float64_is_no_worse_than_torchs(cell, dtype, size, backend):
    torch.manual_seed(size[0])
    draws = [exact_theirs_ours(cell, dtype, size)]
    assert {each.dtype for each in draws[0][2].values()} == {dtype}
    worse = worse_than_torchs(draws, dtype)
    # One draw of few numbers of half precision, or of a relu's steps, may be worse by chance: more draws tell.
    if worse and dtype != torch.float32:
        draws += [exact_theirs_ours(cell, dtype, size) for _ in range(8)]
        worse = worse_than_torchs(draws, dtype)
    assert not worse, "\n".join(worse)


@ids
@pytest.mark.parametrize("cell", CELLS)
def test_float64_is_exact(cell, size, backend):
    steps, batch, width, hidden = size
    theirs, ours = pair(cell, width, hidden, bidirectional=True, **F64)
    x = torch.randn(steps, batch, width, **F64, requires_grad=True)
    hx = random_hx(theirs, batch)
    assert_all_close(run(theirs, x, hx), run(ours, x, hx))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["f32", "f64"])
@pytest.mark.parametrize("cell", CELLS)
def test_two_runs_are_bitwise_equal(cell, dtype, backend):
    _, ours = pair(cell, 33, 65, 2, bidirectional=True, dtype=dtype)
    x = torch.randn(19, 33, 33, dtype=dtype, requires_grad=True)
    first, second = run(ours, x), run(ours, x)
    for name in first:
        assert torch.equal(first[name], second[name]), name


@pytest.mark.parametrize("cell", CELLS)
def test_a_row_does_not_depend_on_its_batch(cell, backend):
    _, ours = pair(cell, 17, 33, 2)
    x = torch.randn(9, 23, 17)
    whole = ours(x)[0]
    for rows in (slice(0, 1), slice(5, 6), slice(3, 20), slice(7, 9), slice(22, 23)):
        assert_same(whole[:, rows], ours(x[:, rows])[0], backend)


@pytest.mark.parametrize("cell", CELLS)
def test_chunks_equal_one_call(cell, backend):
    _, ours = pair(cell, 17, 33, 2)
    x = torch.randn(30, 3, 17)
    whole, final = ours(x)
    parts, state = [], None
    for chunk in x.split([1, 7, 2, 13, 1, 6]):
        part, state = ours(chunk, state)
        parts.append(part)
    assert_same(whole, torch.cat(parts), backend)
    for a, b in zip(as_tuple(final), as_tuple(state), strict=True):
        assert_same(a, b, backend)


@pytest.mark.parametrize("cell", CELLS)
def test_nan_stays_in_its_row_and_is_not_lost(cell, backend):
    _, ours = pair(cell, 5, 17, 2)
    x = torch.randn(8, 7, 5)
    clean = ours(x)[0]
    x[3, 2] = float("nan")
    got = ours(x)[0]
    others = [b for b in range(7) if b != 2]
    assert torch.equal(got[:, others], clean[:, others])
    assert torch.equal(got[:3, 2], clean[:3, 2])
    assert got[3:, 2].isnan().all()


@pytest.mark.parametrize("scale", [1e3, 1e30], ids=["1e3", "1e30"])
@pytest.mark.parametrize("cell", ["rnn_tanh", "lstm", "lstm_proj", "gru"])
def test_saturated_gates_stay_finite(cell, scale, backend):
    theirs, ours = pair(cell, 5, 17)
    x = (torch.randn(8, 7, 5) * scale).requires_grad_()
    expected, got = run(theirs, x), run(ours, x)
    for name, value in got.items():
        assert value.isfinite().all(), name
    assert_close("output", expected["output"], got["output"])


@pytest.mark.parametrize("cell", ["rnn_tanh", "lstm", "gru"])
def test_infinite_input_saturates_as_torch_does(cell, backend):
    theirs, ours = pair(cell, 3, 5)
    x = torch.randn(2, 3, 3)
    x[0, 0, 0], x[0, 1, 1] = float("inf"), -float("inf")
    torch.testing.assert_close(ours(x)[0], theirs(x)[0], equal_nan=True)


@pytest.mark.parametrize("cell", CELLS)
def test_small_values_keep_their_relative_accuracy(cell, backend):
    theirs, ours = pair(cell, 5, 17, bias=False)
    x = torch.randn(4, 3, 5) * 1e-6
    exact = in_float64(theirs)(x.double())[0]
    assert_close("output", exact, ours(x)[0], 1e-6)


@pytest.mark.parametrize("cell", ["rnn_tanh", "lstm", "gru"])
def test_five_thousand_steps_stay_stable(cell, backend):
    theirs, ours = pair(cell, 3, 8)
    x = torch.randn(5000, 2, 3, requires_grad=True)
    exact = run(in_float64(theirs), x.detach().double().requires_grad_())
    expected, got = run(theirs, x), run(ours, x)
    for name, value in exact.items():
        assert relative_error(value, got[name]) <= max(2e-6, 1.5 * relative_error(value, expected[name])), name


@pytest.mark.parametrize("cell", CELLS)
def test_the_reference_loop_is_torchs_layer(cell):
    theirs, ours = pair(cell, 3, 7, 2, bidirectional=True, **F64)
    x = torch.randn(6, 4, 3, **F64, requires_grad=True)
    hx = random_hx(theirs, 4)
    with use_backend("reference"):
        assert_all_close(run(theirs, x, hx), run(ours, x, hx))
    with use_backend("torch"):
        assert_all_close(run(theirs, x, hx), run(ours, x, hx))
