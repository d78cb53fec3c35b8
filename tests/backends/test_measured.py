"""`auto` steps aside where torch was measured faster: the table, who looks at it, and what is said of it."""

from contextlib import nullcontext

import pytest
import torch
from closeness import assert_close
from conftest import backends_under_test
from torch_releases import needs_saving_hooks

import rnnfast
from benchmarks import facts
from benchmarks.cases import Case
from rnnfast import functional
from rnnfast.backends import measured, slower
from rnnfast.backends.dispatch import backend_of, load

pytestmark = pytest.mark.skipif(backends_under_test() != ["numba"], reason="the facts are of the CPU kernels")
CPU = torch.device("cpu")


def row(cell="lstm", what="forward", T=(1, 2), B=(1, 8), H=(12, 40)):
    return (cell, what, T, B, H, 0.6)


@pytest.fixture
def table(monkeypatch):
    """Replace the measurements for the length of a test."""

    def forget():
        measured.facts.cache_clear()
        measured.slower.cache_clear()
        rnnfast.fast_path.recorded.clear()

    def set_rows(*rows, instructions=None):
        monkeypatch.setattr(measured, "MEASURED", {instructions or measured.instructions(): ("a processor", rows)})
        forget()

    with rnnfast.use_backend("auto"):
        yield set_rows
    monkeypatch.undo()
    forget()


def runs_on(layer, x, *args, **options):
    return rnnfast.explain(layer, x, **options).backend


@pytest.mark.parametrize(
    ("cell", "sizes", "found"),
    [
        ("lstm", (2, 8, 40, 40, False), True),
        ("lstm", (3, 8, 40, 40, False), False),
        ("lstm", (2, 9, 40, 40, False), False),
        ("lstm", (2, 8, 41, 41, False), False),
        ("lstm", (2, 8, 40, 40, True), False),
        ("lstm", (2, 8, 20, 40, False), True),
        ("lstm", (2, 8, 19, 40, False), False),
        ("lstm", (2, 8, 80, 40, False), True),
        ("lstm", (2, 8, 81, 40, False), False),
        ("gru", (2, 8, 40, 40, False), False),
    ],
)
def test_a_row_speaks_for_its_ranges(cell, sizes, found, table):
    table(row())
    assert (measured.slower(cell, measured.Sizes(*sizes)) is not None) == found


def test_rows_of_other_instructions_say_nothing(table):
    table(row(), instructions="a processor to come")
    assert measured.slower("lstm", measured.Sizes(1, 1, 16, 16, False)) is None


def test_explain_says_what_was_measured(table):
    table(row(), row("rnn", "training"))
    layer, x = rnnfast.LSTM(16, 16, batch_first=True).requires_grad_(False), torch.zeros(3, 2, 16)
    found = rnnfast.explain(layer, x)
    assert (found.backend, found.kernel) == ("torch", "torch.lstm")
    assert f"measured 0.60x torch's speed in forward on {measured.instructions()} at T 1 to 2, B 1 to 8" in found.reason
    assert rnnfast.explain(layer, torch.zeros(2, 3, 16)).backend == "numba"
    relu = rnnfast.RNN(16, 16, nonlinearity="relu")
    assert runs_on(relu, torch.zeros(2, 3, 16)) == "torch"
    with torch.no_grad():
        assert runs_on(relu, torch.zeros(2, 3, 16)) == "numba"


def test_what_torch_lacks_and_what_was_not_measured_stays_with_the_kernels(table):
    table(row(T=(1, 100)), row(what="training", T=(1, 100)))
    x = torch.zeros(2, 3, 16)
    layer = rnnfast.LSTM(16, 16)
    assert runs_on(layer, x) == "torch"
    assert runs_on(layer, x, resets=torch.zeros(2, 3, dtype=torch.bool)) == "numba"
    assert runs_on(layer, x, all_states=True) == "numba"
    assert runs_on(layer, torch.nn.utils.rnn.pack_sequence([x[:, 0]])) == "numba"
    for options in ({"num_layers": 2}, {"bidirectional": True}, {"proj_size": 5}):
        assert runs_on(rnnfast.LSTM(16, 16, **options), x) == "numba"
    assert runs_on(layer.double(), x.double()) == "numba"
    with rnnfast.use_backend("numba"):
        assert runs_on(layer.float(), x) == "numba"


def count_torch(monkeypatch) -> list:
    """Count calls that are recorded for torch's operator."""
    calls, recorded = [], rnnfast.native.record_call
    monkeypatch.setattr(rnnfast.native, "record_call", lambda *args: calls.append(args) or recorded(*args))
    return calls


@pytest.mark.parametrize(
    "differentiated",
    [pytest.param(False, id="forward"), pytest.param(True, id="training", marks=needs_saving_hooks)],
)
@pytest.mark.parametrize("kind", ["LSTM", "GRU", "RNN"])
@pytest.mark.parametrize("options", [{}, {"batch_first": True}, {"bias": False}], ids=str)
def test_every_call_of_such_sizes_is_torchs_own(kind, options, differentiated, table, monkeypatch):
    """One recording serves all calls of a form; with a state handed in, too."""
    table(row(kind.lower(), "training" if differentiated else "forward"))
    ours, theirs = getattr(rnnfast, kind)(16, 16, **options), getattr(torch.nn, kind)(16, 16, **options)
    theirs.load_state_dict(ours.state_dict())
    calls = count_torch(monkeypatch)
    hx = torch.randn(1, 2, 16)
    for given in (None, (hx, hx) if kind == "LSTM" else hx):
        for _ in range(4):
            x = torch.randn(2, 2, 16, requires_grad=differentiated)
            with torch.set_grad_enabled(differentiated):
                (got, finals), (expected, wanted) = ours(x, given), theirs(x, given)
            assert type(finals) is type(wanted)
            assert all(torch.equal(a, b) for a, b in zip((got, *finals), (expected, *wanted), strict=True))
            if differentiated:
                (dx,), (wanted,) = (torch.autograd.grad(y.sum(), x) for y in (got, expected))
                assert torch.equal(dx, wanted)
    assert len(calls) == 2
    with rnnfast.use_backend("numba"):
        ours(x)
    ours(torch.randn(9, 9, 16))
    assert len(calls) == 2


def test_transforms_lengths_and_graphs_run_as_before(table, monkeypatch):
    table(row(T=(1, 9)), row(what="training", T=(1, 9)))
    layer, x = rnnfast.LSTM(16, 16), torch.randn(5, 3, 16)
    calls = count_torch(monkeypatch)
    layer(x, lengths=torch.tensor([2, 5, 0]))
    mapped = torch.func.vmap(lambda row: layer(row)[0])(x[None])
    torch._dynamo.reset()
    compiled = torch.compile(lambda x: layer(x)[0], fullgraph=True, backend="eager")(x)
    assert not calls
    with torch.no_grad():
        expected = layer(x)[0]
    assert len(calls) == 1
    assert_close("mapped", expected, mapped[0])
    assert_close("compiled", expected, compiled)


class Ragged(torch.nn.Module):
    """Calls a layer with lengths."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x):
        return self.layer(x, lengths=torch.tensor([2, 5, 0]))[0]


@pytest.mark.parametrize("around", [nullcontext, lambda: torch.autocast("cpu", torch.bfloat16)], ids=["", "autocast"])
def test_explain_says_what_runs(around, table, monkeypatch):
    """Calls with lengths, or in another dtype, were not measured."""
    table(row(T=(1, 9)), row(what="training", T=(1, 9)))
    layer, cell, x = rnnfast.LSTM(16, 16), rnnfast.LSTMCell(16, 16), torch.randn(5, 3, 16)
    ran, choose = [], functional.backend_of
    monkeypatch.setattr(functional, "backend_of", lambda *args: ran.append((choose(*args), args[2])) or ran[-1][0])
    with around():
        assert runs_on(layer, x) == ("torch" if around is nullcontext else "numba")
        Ragged(layer)(x)
        cell(x[0])
        told = [rnnfast.explain(layer, x, lengths=torch.tensor([2, 5, 0])), rnnfast.explain(cell, x[0])]
        (of_model,) = rnnfast.explain(Ragged(layer), x)
    assert of_model.explanation == told[0]
    for (backend, dtype), each in zip(ran, told, strict=False):
        assert each.backend == backend == "numba"
        assert each.kernel == load("numba").describe("lstm", 16, 0, CPU, dtype)


def test_the_stored_rows_are_ones():
    for _, rows in slower.MEASURED.values():
        for fact in (measured.Fact(*each) for each in rows):
            assert all(1 <= low <= high for low, high in (fact.T, fact.B, fact.H))
            assert fact.ratio < facts.SLOW
            assert fact.cell in measured.FAMILIES.values()
            assert fact.what in measured.PASSES.values()


def test_the_stored_rows_are_as_written():
    parts = [facts.part(name, *slower.MEASURED[name]) for name in slower.MEASURED]
    assert facts.FILE.read_text() == facts.HEAD + "".join(parts) + "}\n"


def record(T, B, H, *ratio, noise=0.02):
    """ratio: median, 20th and 80th percentile."""
    case = Case("gru", T, B, H, H, mode="training").to_json()
    row = {"contender": "rnnfast:numba", "status": "ok", "ratio": ratio}
    return {"question": "facts", "case": case, "noise": noise, "rows": [row]}


def test_measurements_become_rows(tmp_path):
    """Where the noise is large, the spread reaches 1, or the two are even, there is no row."""
    file = tmp_path / "rows.py"
    file.write_text(facts.HEAD + facts.part("new", "long ago", (row(),)) + facts.part("old", "here", (row(),)) + "}")
    results = {
        "machine": {"device": "A processor", "threads": 2, "versions": {"torch": "2.13.0"}},
        "started": "2026-01-02 03:04:05",
        "records": [
            record(2, 4, 400, 0.6, 0.5, 0.7),
            record(4, 4, 400, 0.96, 0.95, 0.97),
            record(1, 4, 64, 0.9, 0.8, 1.1),
            record(1, 4, 128, 0.6, 0.5, 0.7, noise=0.5),
        ],
    }
    assert facts.write(results, "new", file) == 1
    found = {}
    exec(file.read_text(), found)
    where = "A processor, 2 threads, torch 2.13.0, 2026-01-02"
    wanted = (("gru", "training", (2, 2), (3, 8), (321, 505), 0.6),)
    assert found["MEASURED"] == {"new": (where, wanted), "old": ("here", (row(),))}
    assert facts.write(results | {"records": []}, "new", file) == 0
    exec(file.read_text(), found)
    assert found["MEASURED"]["new"] == (where, ())


@pytest.mark.parametrize(("size", "expected"), [(1, (1, 1)), (2, (2, 2)), (4, (3, 8)), (16, (9, 32))])
def test_a_size_speaks_to_halfway_to_its_neighbours(size, expected):
    assert facts.span(size, (1, 2, 4, 16)) == expected


def test_a_backend_without_sizes_is_as_before(table):
    table(row())
    assert backend_of("lstm", CPU, torch.float32, False) == "numba"
