"""The Numba kernels through the backend's contract, against float64 torch.nn: values, states and every gradient."""

import pytest
import torch
from cpu_layers import ALL, TOLERANCE, Case, cells, dtypes, relative, replaced, same, threads
from rnnfast_kernels.cells import TORCH_CELLS

from rnnfast import reference
from rnnfast.backends import Weights, cpu

# A rectifier's slope jumps where a rounded sum changes its sign: the error of a gradient may be of any size.
SMOOTH = ["rnn_tanh", "lstm", "gru"]
halves = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])

SIZES = [(1, 1, 1, 1), (3, 2, 7, 5), (7, 5, 3, 16), (5, 13, 33, 17), (4, 65, 1, 33), (9, 3, 65, 130), (40, 8, 16, 64)]


@cells
@dtypes
@pytest.mark.parametrize("sizes", SIZES, ids=lambda s: "x".join(map(str, s)))
def test_dense(cell, dtype, sizes):
    Case(cell, *sizes, dtype=dtype).check()


@cells
@pytest.mark.parametrize("layout", ["dense", "padded", "packed"])
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no_bias"])
def test_both_directions(cell, layout, bias):
    lengths = None if layout == "dense" else [7, 7, 6, 3, 1]
    Case(cell, 7, 5, 3, 18, lengths=lengths, layout=layout, bias=bias, bidirectional=True).check()


@dtypes
@pytest.mark.parametrize("layout", ["dense", "padded", "packed"])
@pytest.mark.parametrize("hidden", [5, 19, 40])
def test_projection(dtype, layout, hidden):
    lengths = None if layout == "dense" else [6, 4, 4, 1]
    Case("lstm", 6, 4, 3, hidden, lengths=lengths, layout=layout, dtype=dtype, proj_size=3, bidirectional=True).check()


@halves
@pytest.mark.parametrize("layout", ["dense", "padded", "packed"])
@pytest.mark.parametrize("cell", SMOOTH)
def test_half_precision(cell, layout, dtype):
    """Sizes are odd: the last term of a sum has no neighbour. (test_numerics compares the rectifier with torch's.)"""
    lengths = None if layout == "dense" else [6, 4, 4, 1]
    Case(cell, 6, 4, 5, 21, lengths=lengths, layout=layout, dtype=dtype, bidirectional=True).check()


@halves
@pytest.mark.parametrize("cell", SMOOTH)
@pytest.mark.parametrize("sizes", [(1, 9, 1, 9), (9, 1, 33, 40), (5, 13, 64, 48), (4, 65, 7, 130)], ids=str)
def test_sizes_in_half_precision(sizes, cell, dtype):
    Case(cell, *sizes, dtype=dtype).check()


@halves
def test_projection_in_half_precision(dtype):
    Case("lstm", 6, 4, 3, 19, dtype=dtype, proj_size=5, bidirectional=True).check()


@halves
@pytest.mark.parametrize("cell", SMOOTH)
def test_neighbours_in_memory_take_no_part(cell, dtype):
    """Rows of odd width lie side by side; what is beside a row's end is not read as part of it."""
    case = Case(cell, 4, 5, 3, 7, dtype=dtype)
    expected = case.run()["output"]
    layer = case.layer()
    layer.x[:, 1:] = float("nan")
    found = case.run(layer)["output"]
    assert torch.equal(found[:, 0], expected[:, 0])
    assert found[:, 1:].isnan().all()


@cells
@pytest.mark.parametrize("all_states", [True, False])
def test_results_without_saving_are_the_same(cell, all_states):
    layer = Case(cell, 9, 5, 3, 18, bidirectional=True).layer()
    states, finals, _ = cpu.forward(layer, save=True, all_states=True)
    again, finals_again, saved = cpu.forward(layer, save=False, all_states=all_states)
    assert saved == ()
    assert torch.equal(states[0], again[0])
    assert all(torch.equal(a, b) for a, b in zip(finals, finals_again, strict=True))
    assert all(
        s.shape == a.shape if all_states else a.shape == (0,) for s, a in zip(states[1:], again[1:], strict=True)
    )


@cells
def test_resets_match_separate_sequences(cell):
    """A reset at step 3 of a row is a new sequence of that row with an initial state of zeros."""
    case = Case(cell, 7, 4, 3, 18)
    layer = case.layer()
    resets = torch.zeros(7, 4, dtype=torch.bool)
    resets[3, 1] = True
    whole = case.run(replaced(layer, resets=resets))
    case.dy = case.dy.clone()

    fresh = [initial.clone() for initial in layer.hx]
    for initial in fresh:
        initial[:, 1] = 0
    tail = replaced(layer, x=layer.x[3:], hx=tuple(fresh))
    states, _finals, saved = cpu.forward(tail, save=True, all_states=False)
    assert torch.equal(states[0][:, 1], whole["output"][3:, 1])
    dstates = (case.dy[3:].float(),) + (None,) * (len(states) - 1)
    gradients = cpu.backward(tail, states, saved, dstates, tuple(d.float() for d in case.dfinals), ALL)
    assert torch.equal(gradients.x[:, 1], whole["dx"][3:, 1])
    untouched = case.run(layer)
    assert torch.equal(whole["dx"][:, 0], untouched["dx"][:, 0])
    assert not torch.equal(whole["dhx0"][:, 1], untouched["dhx0"][:, 1])


def test_resets_keep_nan_out():
    case = Case("lstm", 5, 3, 3, 18)
    layer = case.layer()
    layer.hx[0][:, 1] = float("nan")
    resets = torch.zeros(5, 3, dtype=torch.bool)
    resets[0, 1] = True
    found = case.run(replaced(layer, resets=resets))
    assert all(tensor.isfinite().all() for tensor in found.values())
    assert (found["dhx0"][:, 1] == 0).all()


@cells
def test_nan_stays_in_its_row(cell):
    layer = Case(cell, 6, 5, 3, 18).layer()
    clean, _, _ = cpu.forward(layer, save=False, all_states=False)
    layer.x[2, 1, 0] = float("nan")
    found, _, _ = cpu.forward(layer, save=False, all_states=False)
    others = [0, 2, 3, 4]
    assert torch.equal(found[0][:, others], clean[0][:, others])
    assert found[0][2:, 1].isnan().all()


@cells
def test_saturated_gates_stay_finite(cell):
    case = Case(cell, 6, 3, 3, 18)
    layer = case.layer()
    layer.x.mul_(1e3)
    case.x = layer.x.double()
    found = case.run(layer)
    assert all(tensor.isfinite().all() for tensor in found.values())
    assert relative(found["output"], case.expected()["output"]) < TOLERANCE[torch.float32]


@cells
@pytest.mark.parametrize(("steps", "batch"), [(0, 3), (4, 0), (0, 0)])
def test_empty(cell, steps, batch):
    found = Case(cell, steps, batch, 3, 18, bidirectional=True)
    layer = found.layer()
    results = found.run(layer)
    assert results["output"].shape == (steps, batch, 2, 18)
    assert torch.equal(results["final0"], layer.hx[0])
    assert all((tensor == 0).all() for name, tensor in results.items() if name.startswith(("dw", "db")))


@cells
@pytest.mark.parametrize("groups", [2, 5])
def test_gradients_of_groups_add_up(cell, groups):
    case = Case(cell, 6, 10, 3, 18, bidirectional=True)
    layer = case.layer()
    states, _, saved = cpu.forward(layer, save=True, all_states=False)
    dstates = (case.dy.float(),) + (None,) * (len(states) - 1)
    arguments = (layer, states, saved, dstates, (None,) * len(layer.hx), ALL)
    whole = cpu.backward(*arguments).weights
    parts = cpu.backward(*arguments, groups=groups).weights
    for one, many in zip(whole, parts, strict=True):
        for a, b in zip(one[:4], many[:4], strict=True):
            assert b.shape == (groups, *a.shape)
            assert relative(b.sum(0), a.double()) < 1e-6


@cells
@pytest.mark.parametrize("layout", ["dense", "padded", "packed"])
def test_an_ensemble_is_its_members_side_by_side(cell, layout):
    lengths = None if layout == "dense" else sorted((1 + n % 40 for n in range(33)), reverse=True)
    case = Case(cell, 40, 33, 24, 50, bidirectional=True, layout=layout, lengths=lengths)
    layer, dy = case.layer(), case.dy.float() if layout != "packed" else case.live(case.dy).float()
    members = []
    for n in (1, 2, 3):
        weights = tuple(Weights._make(w if w is None else w / n for w in each) for each in layer.weights)
        members.append(replaced(layer, x=layer.x.roll(n, -1), hx=tuple(h * n for h in layer.hx), weights=weights))
    whole = replaced(
        layer,
        x=torch.cat([m.x for m in members], -1),
        hx=tuple(torch.cat(parts) for parts in zip(*(m.hx for m in members), strict=True)),
        weights=tuple(w for m in members for w in m.weights),
        reverse=layer.reverse * 3,
    )

    def run(layer, dy):
        states, finals, saved = cpu.forward(layer, save=True, all_states=False)
        dstates = (dy, *(None for _ in states[1:]))
        return (states, finals), cpu.backward(layer, states, saved, dstates, (None,) * len(finals), ALL)

    for count in (1, 2):
        with threads(count):
            (states, finals), gradients = run(whole, torch.cat([dy] * 3, -2))
            for n, member in enumerate(members):
                (own_states, own_finals), own = run(member, dy)
                here = slice(2 * n, 2 * n + 2)
                pairs = [(s[..., here, :], o) for s, o in zip(states, own_states, strict=True)]
                pairs += [(f[here], o) for f, o in zip(finals, own_finals, strict=True)]
                pairs += [(gradients.x.chunk(3, -1)[n], own.x)]
                pairs += [(h[here], o) for h, o in zip(gradients.hx, own.hx, strict=True)]
                for one, other in zip(gradients.weights[here], own.weights, strict=True):
                    pairs += [(w, o) for w, o in zip(one, other, strict=True) if o is not None]
                assert all(torch.equal(*each) for each in pairs)
    assert relative(states[0], reference.run(whole)[0][0].double()) < TOLERANCE[torch.float32]


@cells
def test_a_sequence_may_be_cut_in_time(cell):
    layer = Case(cell, 30, 3, 5, 40).layer()
    whole, finals, _ = cpu.forward(layer, save=False, all_states=False)
    hx, outputs = layer.hx, []
    for start in range(0, 30, 7):
        states, hx, _ = cpu.forward(replaced(layer, x=layer.x[start : start + 7], hx=hx), save=False, all_states=False)
        outputs.append(states[0])
    assert torch.equal(torch.cat(outputs), whole[0])
    assert all(torch.equal(a, b) for a, b in zip(hx, finals, strict=True))


@cells
def test_strides_of_the_input(cell):
    case = Case(cell, 6, 5, 4, 18)
    layer = case.layer()
    expected = case.run(layer)
    batch_first = layer.x.transpose(0, 1).contiguous().transpose(0, 1)
    features_first = layer.x.permute(2, 0, 1).contiguous().permute(1, 2, 0)
    for x in (batch_first, features_first):
        assert not x.is_contiguous()
        assert not same(expected, case.run(replaced(layer, x=x)))
    expanded = layer.x[:, :1].expand(6, 5, 4)
    assert not same(case.run(replaced(layer, x=expanded.contiguous())), case.run(replaced(layer, x=expanded)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
@pytest.mark.parametrize("cell", TORCH_CELLS)
def test_saved_memory(cell, dtype):
    """What `saved_like` promises is what is saved, and an LSTM keeps at most 7 tensors of the size of its output."""
    layer = Case(cell, 4, 3, 5, 20, dtype=dtype).layer()
    states, _, saved = cpu.forward(layer, save=True, all_states=False)
    assert tuple((tuple(tensor.shape), tensor.dtype) for tensor in saved) == cpu.saved_like(layer)
    assert sum(tensor.numel() for tensor in (*states, *saved)) <= 7 * states[0].numel()


@pytest.mark.parametrize(
    ("cell", "device", "dtype", "word"),
    [
        ("lstm", "cuda", torch.float32, "cuda"),
        ("gru", "cpu", torch.int64, "int64"),
        ("peephole", "cpu", torch.float32, "peephole"),
    ],
)
def test_unsupported_cases_are_named(cell, device, dtype, word):
    assert word in cpu.unsupported(cell, torch.device(device), dtype)
