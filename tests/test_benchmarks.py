"""The benchmark suite judges rightly: wrong contenders are not timed, crashes are rows, changes are told from noise."""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks import compare, driver, measure, memory, options, oracle, plot, questions, readme, report, store, tables
from benchmarks.__main__ import main
from benchmarks.cases import CELLS, Case, operations, parameter_shapes, parse_sizes, traffic
from benchmarks.contenders import PEERS, Call, Contender, by_backend, torch_nn
from benchmarks.progress import Progress
from benchmarks.run import Settings, run_case
from benchmarks.workload import draw

ROOT = Path(__file__).parent.parent
TINY = Case("lstm", T=3, B=2, I=4, H=5)
QUICKLY = Settings(effort=measure.Effort(seconds=0.001, fewest=3, most=3))


@dataclass(frozen=True)
class Misbehaving(Contender):
    """torch.nn, except for one fault. It is its own module, so that it can travel to the worker process."""

    fault: str = ""

    def load(self):
        return self

    def unsupported(self, case: Case) -> str | None:
        return "declines" if self.fault == "declines" else None

    def prepare(self, work) -> Call:
        honest = torch_nn.prepare(work)
        runs = 0

        def run():
            nonlocal runs
            runs += 1
            if self.fault == "raises":
                raise MemoryError("no room")
            if self.fault == "raises later" and runs > 3:
                raise RuntimeError("gave up")
            if self.fault == "dies":
                os.kill(os.getpid(), signal.SIGKILL)
            if self.fault == "hangs":
                time.sleep(3600)
            return honest.run()

        def read(result):
            tensors = honest.read(result)
            if self.fault == "wrong":
                tensors["output"] = tensors["output"] * 1.001
            if self.fault == "silent":
                del tensors["h"]
            if self.fault == "nan":
                tensors["output"] = tensors["output"] * float("nan")
            return tensors

        return Call(run, read, honest.context)


def misbehaving(fault: str) -> Misbehaving:
    return Misbehaving(name=fault, module="", fault=fault)


def rows_of(record: dict) -> dict[str, dict]:
    return {row["contender"]: row for row in record["rows"]}


@pytest.mark.parametrize("fault", ["wrong", "silent", "nan"])
def test_a_wrong_contender_is_reported_and_not_timed(fault):
    rows = rows_of(run_case(TINY, [PEERS["torch"], misbehaving(fault)], QUICKLY, lambda name: None))
    assert rows[fault]["status"] == "wrong"
    assert ("output" if fault != "silent" else "h") in rows[fault]["reason"]
    assert "ms" not in rows[fault]
    assert rows["torch"]["status"] == "ok"


@pytest.mark.parametrize(
    ("fault", "status"), [("raises", "crashed"), ("raises later", "crashed"), ("declines", "skipped")]
)
def test_a_contender_that_fails_is_a_row_and_the_rest_goes_on(fault, status):
    rows = rows_of(run_case(TINY, [PEERS["torch"], misbehaving(fault), misbehaving("")], QUICKLY, lambda name: None))
    assert rows[fault]["status"] == status
    assert "ms" not in rows[fault]
    assert rows[""]["ratio"][0] > 0


@pytest.mark.parametrize(("fault", "reason"), [("dies", "signal 9"), ("hangs", "no answer")])
def test_a_contender_that_takes_the_process_down_is_a_row(fault, reason):
    with driver.working(threads=1, patience=12) as worker:
        contenders = [PEERS["torch"], misbehaving(fault), misbehaving("")]
        record = driver.measure(worker, TINY, contenders, QUICKLY, Progress(1.0))
    rows = rows_of(record)
    assert rows[fault]["status"] == "crashed"
    assert reason in rows[fault]["reason"]
    assert rows["torch"]["status"] == rows[""]["status"] == "ok"


@pytest.mark.parametrize("form", ["dense", "packed", "lengths", "resets", "permuted"])
@pytest.mark.parametrize("cell", CELLS)
def test_ours_runs_every_form_and_agrees_with_the_oracle(cell, form):
    case = Case(
        cell, T=9, B=5, I=3, H=7, mode="training", form=form, live=0.5 if form in ("packed", "lengths") else 1.0
    )
    rows = rows_of(run_case(case, [PEERS["torch"], by_backend("reference")], QUICKLY, lambda name: None))
    assert {name: row["status"] for name, row in rows.items()} == {"torch": "ok", "rnnfast:reference": "ok"}


def test_every_cell_state_agrees_with_the_oracle():
    case = Case("lstm", T=9, B=5, I=3, H=7, mode="training", form="states")
    rows = rows_of(run_case(case, [PEERS["torch"], by_backend("reference")], QUICKLY, lambda name: None))
    assert rows["rnnfast:reference"]["status"] == "ok"


PEER_CASES = [
    Case("rnn", T=9, B=5, I=3, H=7),
    Case("rnn", T=9, B=5, I=3, H=7, mode="training", dtype="float64"),
    Case("lstm", T=9, B=5, I=3, H=7, layers=2, bidirectional=True),
    Case("gru", T=9, B=5, I=3, H=7, bias=False),
    Case("lstm", T=1, B=5, I=3, H=7, layers=2, mode="step"),
    Case("rnn", T=9, B=5, I=3, H=7, mode="training"),
    Case("gru", T=9, B=5, I=3, H=7, layers=2, bidirectional=True, mode="training"),
]


@pytest.mark.parametrize("case", PEER_CASES, ids=lambda case: case.id)
@pytest.mark.parametrize("name", ["onnxruntime", "jax", "numpy"])
def test_a_peer_computes_the_same_function(name, case):
    peer = PEERS[name]
    if peer.missing("cpu"):
        pytest.skip(peer.missing("cpu"))
    module = peer.load()
    if module.unsupported(case):
        assert name != "jax"
        return
    work = draw(case, "cpu", seed=3)
    assert oracle.verdict(oracle.errors(oracle.expected(work), oracle.results(module.prepare(work))), case.dtype) == ""


def test_a_seed_gives_the_same_numbers_and_another_seed_gives_others():
    first, again, other = (draw(TINY, "cpu", seed) for seed in (1, 1, 2))
    assert torch.equal(first.x, again.x)
    assert not torch.equal(first.x, other.x)
    assert all(torch.equal(first.weights[name], again.weights[name]) for name in first.weights)


@pytest.mark.parametrize("live", [0.25, 0.5, 0.75])
def test_lengths_keep_the_live_fraction(live):
    work = draw(Case("gru", T=200, B=32, I=2, H=2, form="lengths", live=live), "cpu", seed=0)
    assert work.lengths.double().mean().item() / 200 == pytest.approx(live, abs=0.03)
    assert work.lengths.max() == 200
    assert work.lengths.min() >= 1


@pytest.mark.parametrize("case", [TINY, replace(TINY, layers=2, bidirectional=True, proj=2, bias=False)])
def test_parameters_are_those_of_torch(case):
    module = torch.nn.LSTM(
        case.I, case.H, case.layers, bias=case.bias, bidirectional=case.bidirectional, proj_size=case.proj
    )
    assert parameter_shapes(case) == {name: tuple(value.shape) for name, value in module.named_parameters()}


def test_operations_and_traffic_are_counted():
    case = Case("lstm", T=10, B=2, I=3, H=5)
    assert operations(case) == 10 * 2 * 2 * 4 * 5 * (3 + 5)
    assert operations(replace(case, mode="training")) == 3 * operations(case)
    assert traffic(case) == 4 * (10 * 2 * (3 + 5) + 4 * 5 * (3 + 5 + 2))


def test_cases_have_names_of_their_own():
    for device in ("cpu", "cuda"):
        for question in (*questions.full(device), *questions.quick(device)):
            names = [case.id for case in question.cases]
            assert len(set(names)) == len(names)


def test_a_case_survives_json():
    for question in questions.full("cpu"):
        for case in question.cases:
            assert Case(**json.loads(json.dumps(case.to_json()))) == case


def test_the_grid_follows_its_seed_and_limits():
    limits = questions.Limits(T=(10, 50), B=(1, 4), I=(3, 9), H=(16, 40), operations=1e8)
    cases = questions.grid(20, 5, limits).cases
    assert cases == questions.grid(20, 5, limits).cases
    assert cases != questions.grid(20, 6, limits).cases
    assert len(cases) == 20 * len(CELLS) * 2
    for case in cases:
        assert 10 <= case.T <= 50
        assert 16 <= case.H <= 40
        assert operations(replace(case, cell="lstm", mode="inference")) <= 1e8


def test_quantiles_are_those_of_numpy():
    values = list(np.random.default_rng(0).normal(size=17))
    for at in (0.2, 0.5, 0.8):
        assert measure.quantile(values, at) == pytest.approx(np.quantile(values, at))


def test_contenders_alternate_and_turn_around():
    seen = []

    def named(name):
        return Call(run=lambda: seen.append(name), read=dict)

    samples = measure.alternate(
        {"a": named("a"), "b": named("b")}, lambda call, runs: call.run() or 0.01, QUICKLY.effort, lambda name: None
    )
    assert "".join(seen[-6:]) == "abbaab"
    assert {name: len(times) for name, times in samples.items()} == {"a": 3, "b": 3}


def test_noise_grows_with_bias_and_with_spread():
    assert measure.noise([1.0] * 5, [1.0] * 5) == 0
    assert measure.noise([1.0] * 5, [1.1] * 5) == pytest.approx(0.1)
    assert measure.noise([1.0, 2.0, 1.0, 2.0, 1.0], [2.0, 1.0, 2.0, 1.0, 2.0]) > 0.5


def test_saved_bytes_counts_each_storage_once_and_no_parameter():
    weight = torch.nn.Parameter(torch.ones(8))
    x = torch.ones(8)
    call = Call(run=lambda: ((x * weight) + (x * weight)).sum().backward(), read=dict)
    assert memory.saved_bytes(call) == x.nbytes


@pytest.mark.skipif(not memory.CLEAR_REFS.exists(), reason="the system does not tell a process its peak memory")
def test_peak_bytes_sees_what_a_run_holds_for_a_moment():
    size = 64 << 20
    peak = memory.peak_bytes(Call(run=lambda: torch.ones(size // 4), read=dict), "cpu")
    assert size * 0.9 < peak < size * 1.5


BAD_INPUT = [
    (["--cell", "lsmt"], "rnn, lstm, gru"),
    (["--mode", "backward"], "inference, training, step"),
    (["--peer", "cudnn"], "onnxruntime"),
    (["--backend", "cuda"], "auto, triton, numba, reference, torch"),
    (["--device", "tpu"], "cpu, cuda"),
    (["--question", "everything"], "sequence-length"),
    (["--dtype", "int8"], "float32"),
    (["--sizes", "1,2,3"], "T,B,I,H"),
    (["--sizes", "1,2,0,3"], "T,B,I,H"),
    (["--grid", "0"], "at least 1"),
    (["--grid", "3", "--limits", "T=9:1"], "T=1:2000"),
    (["--threads", "100000"], "threads must be 1 to"),
    (["--cell", "rnn", "--question", "stacks"], "--list"),
    (["--compare", "nowhere.json", "nowhere.json"], "nowhere.json"),
]


@pytest.mark.parametrize(
    ("words", "said"), BAD_INPUT, ids=lambda value: " ".join(value) if isinstance(value, list) else ""
)
def test_bad_input_names_the_valid_choices_in_one_line(words, said, capsys):
    assert main(words) == 2
    message = capsys.readouterr().err
    assert said in message
    assert message.count("\n") == 1


def test_an_unknown_option_is_one_line(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["--frobnicate"])
    assert stop.value.code == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_the_list_shows_cases_and_contenders(capsys):
    assert main(["--list", "--question", "sequence-length", "--cell", "gru", "--mode", "training"]) == 0
    shown = capsys.readouterr().out
    assert "gru-training-T8192-B16-I128-H128" in shown
    assert "lstm" not in shown
    assert "by haste (skipped, runs on cuda only)" in shown


def test_sizes_are_read():
    assert parse_sizes("100,32,64,128") == (100, 32, 64, 128)


def stored(ratio: float, noise: float = 0.02, status: str = "ok") -> dict:
    """A results file's content with one case, in which ours is `ratio` times as fast as torch."""
    ours = {"contender": "rnnfast", "status": status}
    ours |= {
        "ms": [10 / ratio] * 3,
        "ratio": [ratio] * 3,
        "rounds": 5,
        "first_ms": 1.0,
        "error": 1e-7,
        "worst": "output",
    }
    theirs = {"contender": "torch", "status": "ok", "ms": [10.0] * 3, "rounds": 5, "first_ms": 1.0, "error": 1e-7}
    if status != "ok":
        ours = {"contender": "rnnfast", "status": status, "reason": "why"}
    cases = [
        Case(cell, T, 16, 128, 128, mode=mode) for cell in CELLS for mode in ("inference", "training") for T in (1, 64)
    ]
    records = [
        {"question": "sequence-length", "case": case.to_json(), "noise": noise, "rows": [theirs | {"worst": "h"}, ours]}
        for case in cases
    ]
    machine = {
        "device": "Test <CPU>",
        "system": "Linux",
        "threads": 2,
        "load": 0.1,
        "cores": 2,
        "cpu_capability": "AVX2",
        "python": "3.11",
        "commit": "0123456789",
        "versions": {"torch": "2.13.0"},
        "gemm_flops": {"float32": 2e11},
        "bandwidth": {"65536": 1e11, "268435456": 1e10},
    }
    return {
        "schema": store.SCHEMA,
        "started": "2026-01-02 03:04:05",
        "finished": "2026-01-02 03:05:05",
        "command": "python -m benchmarks",
        "complete": True,
        "machine": machine,
        "skipped": {"jax": "not installed: jax"},
        "startup": [{"what": "import rnnfast, after torch", "ms": 12.5}],
        "records": records,
    }


@pytest.mark.parametrize(
    ("before", "after", "code", "said"),
    [
        (stored(2.0), stored(2.0), 0, "0 changes"),
        (stored(2.0), stored(1.95), 0, "0 changes"),
        (stored(2.0), stored(3.0), 0, "faster"),
        (stored(2.0), stored(1.5), 1, "slower"),
        (stored(2.0, noise=0.3), stored(1.5, noise=0.3), 0, "0 changes"),
        (stored(2.0), stored(2.0, status="wrong"), 1, "now wrong"),
    ],
)
def test_compare_tells_a_regression_from_noise(before, after, code, said, tmp_path, capsys):
    store.save(tmp_path / "a.json", before)
    store.save(tmp_path / "b.json", after)
    assert main(["--compare", str(tmp_path / "a.json"), str(tmp_path / "b.json")]) == code
    assert said in capsys.readouterr().out


def test_results_survive_the_store(tmp_path):
    store.save(tmp_path / "results.json", stored(2.0))
    assert store.load(tmp_path / "results.json") == stored(2.0)


def test_a_file_that_is_no_results_is_refused(tmp_path):
    (tmp_path / "a.json").write_text("{}")
    with pytest.raises(ValueError, match="no results file"):
        compare.report(str(tmp_path / "a.json"), str(tmp_path / "a.json"))


def test_plots_and_page_need_only_what_is_stored(tmp_path):
    names = plot.draw_all(stored(2.0), tmp_path)
    assert {"sequence-length", "sequence-length-speedup", "startup"} <= set(names)
    for name in names:
        assert (tmp_path / f"{name}.png").stat().st_size > 1000
        assert "<svg" in (tmp_path / f"{name}.svg").read_text()
    page = report.write(stored(2.0), tmp_path, names).read_text()
    assert "Test &lt;CPU&gt;" in page
    assert page.count("<svg") == len(names)
    assert "http" not in page.replace("http://www.w3.org", "")


def test_every_question_can_be_drawn():
    results = stored(2.0)
    rows = results["records"][0]["rows"]
    results["records"] = [
        {"question": question.name, "case": case.to_json(), "noise": 0.1, "rows": rows}
        for question in (*questions.full("cpu"), questions.grid(3, 0, questions.Limits()))
        for case in question.cases
    ]
    names = [name for name, _ in plot.figures(results)]
    assert {question.name for question in questions.full("cpu")} <= set(names)


def test_marks_are_geometric_means_and_extremes():
    records = stored(2.0)["records"][:2]
    records[1] = stored(8.0)["records"][1]
    (mark,) = tables.marks(records)
    assert mark[:4] == ("rnn", "inference", "rnnfast", 2)
    assert mark.mean == pytest.approx(4.0)
    assert (mark.worst, mark.worst_case) == (2.0, "T=1 B=16 I=128 H=128")
    assert (mark.best, mark.best_case) == (8.0, "T=64 B=16 I=128 H=128")


def test_the_table_says_where_a_peer_wins_and_where_noise_decides():
    slower = stored(0.5)["records"][0]
    assert "slower" in tables.case_rows(slower, stored(0.5)["machine"])[1]
    even = stored(1.1, noise=0.2)["records"][0]
    assert "even" in tables.case_rows(even, stored(1.1)["machine"])[1]


def test_who_cannot_run_a_case_is_named_once():
    records = [stored(2.0, status="skipped")["records"][0]] * 3
    assert tables.skips(records) == "left out some cases: rnnfast (why)"
    assert len(tables.case_rows(records[0], stored(1.0)["machine"])) == 1


def test_the_floor_is_operations_or_bytes():
    machine = stored(1.0)["machine"]
    case = Case("lstm", T=100, B=64, I=512, H=512)
    assert store.floor_ms(case, machine) == pytest.approx(1e3 * operations(case) / 2e11)
    small = Case("lstm", T=1, B=1, I=8, H=8)
    assert store.floor_ms(small, machine) == pytest.approx(1e3 * traffic(small) / 1e11)


def test_partial_runs_do_not_replace_full_results():
    full = options.parser().parse_args([])
    assert not options.is_partial(full)
    for words in (["--quick"], ["--cell", "rnn"], ["--sizes", "1,1,1,1"], ["--grid", "2"], ["--peer", "torch"]):
        assert options.is_partial(options.parser().parse_args(words))


def run_suite(*words: str, folder: Path) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-m", "benchmarks", "--out", str(folder), "--seconds", "0.01", "--peer", "torch", *words],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_a_run_measures_stores_and_reports(tmp_path):
    process = run_suite("--cell", "gru", "--sizes", "5,2,3,4", "--backend", "reference", folder=tmp_path)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    assert "rnnfast:reference" in out
    results = store.load(tmp_path / "results.json")
    assert results["complete"]
    assert [store.case_of(record).mode for record in results["records"]] == ["inference", "training"]
    assert {"report.html", "sizes.png", "sizes.svg"} <= {path.name for path in tmp_path.iterdir()}


@pytest.mark.parametrize("stop", [signal.SIGINT, signal.SIGTERM], ids=lambda stop: stop.name)
def test_an_interrupted_run_keeps_what_is_measured(stop, tmp_path):
    process = run_suite("--question", "sequence-length", "--backend", "reference", folder=tmp_path)
    end = time.monotonic() + 100
    while not (tmp_path / "results.json").exists() and time.monotonic() < end:
        time.sleep(0.1)
    process.send_signal(stop)
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "interrupted" in out
    results = store.load(tmp_path / "results.json")
    assert not results["complete"]
    assert results["records"]
    assert (tmp_path / "report.html").exists()


def test_readme_shows_what_the_stored_results_give(capsys):
    assert readme.full_results()
    assert readme.main(["--check"]) == 0, capsys.readouterr().err


def test_readme_check_sees_another_table(monkeypatch, tmp_path, capsys):
    results = tmp_path / "benchmarks" / "results"
    store.save(results / "a-machine" / "results.json", stored(2.0))
    store.save(results / "a-machine" / "quick" / "results.json", stored(9.0))
    monkeypatch.setattr(readme, "ROOT", tmp_path)
    monkeypatch.setattr(store, "RESULTS", results)
    page = tmp_path / "README.md"
    page.write_text(f"before\n{readme.BEGIN}\n{readme.END}\nafter\n")
    assert readme.main(["--check"]) == 1
    assert readme.main(["--write"]) == 0
    assert readme.main(["--check"]) == 0
    assert "| LSTM training, rnnfast | 2.00 | 2.00 |" in page.read_text()
    page.write_text(page.read_text().replace("2.00", "9.00"))
    assert readme.main(["--check"]) == 1
    page.write_text("no markers")
    assert readme.main(["--check"]) == 2
    assert readme.BEGIN in capsys.readouterr().err
