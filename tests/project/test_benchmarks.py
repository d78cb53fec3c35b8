"""The benchmark suite judges rightly: wrong contenders are not timed, crashes are rows, what is measured is kept."""

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

from benchmarks import measure, oracle, store, worker
from benchmarks.cases import CELLS, Case
from benchmarks.contenders import PEERS, Call, Contender, by_backend, torch_nn
from benchmarks.measure import Settings, run_case
from benchmarks.workload import draw

ROOT = Path(__file__).parents[2]
TINY = Case("lstm", T=3, B=2, I=4, H=5)
QUICKLY = Settings(seconds=0.001, fewest=3, most=3)


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
    with worker.working(threads=1, patience=4) as measuring:
        contenders = [PEERS["torch"], misbehaving(fault), misbehaving("")]
        record = measuring.measure(TINY, contenders, QUICKLY, worker.Progress(1.0))
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


@pytest.mark.parametrize("mode", ["inference", "training"])
def test_a_declared_cell_agrees_with_its_loop(mode):
    case = Case("coupled_lstm", T=9, B=5, I=3, H=7, mode=mode)
    rows = rows_of(run_case(case, [PEERS["torch"], by_backend("reference")], QUICKLY, lambda name: None))
    assert {name: row["status"] for name, row in rows.items()} == {"torch": "ok", "rnnfast:reference": "ok"}


def test_frozen_layers_of_everyone_are_close():
    case = Case("lstm", T=3, B=2, I=8, H=8, weights="int8")
    peers = [PEERS[name] for name in ("torch", "onnxruntime", "torch-int8") if not PEERS[name].missing("cpu")]
    rows = rows_of(run_case(case, [*peers, by_backend("auto")], QUICKLY, lambda name: None))
    assert {row["status"] for row in rows.values()} == {"ok"}
    assert rows["torch"]["error"] < 1e-6
    assert all(1e-4 < row["error"] < 0.05 for name, row in rows.items() if name != "torch")


def test_an_error_is_judged_by_the_format_of_the_weights():
    assert oracle.verdict({"output": 0.02}, TINY)
    assert not oracle.verdict({"output": 0.02}, replace(TINY, weights="int8"))


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
    assert oracle.verdict(oracle.errors(oracle.expected(work), oracle.results(module.prepare(work))), case) == ""


def test_quantiles_are_those_of_numpy():
    values = list(np.random.default_rng(0).normal(size=17))
    for at in (0.2, 0.5, 0.8):
        assert measure.quantile(values, at) == pytest.approx(np.quantile(values, at))


def test_contenders_alternate_and_turn_around():
    seen = []

    def named(name):
        return Call(run=lambda: seen.append(name), read=dict)

    samples = measure.alternate(
        {"a": named("a"), "b": named("b")}, lambda call, runs: call.run() or 0.01, QUICKLY, lambda name: None
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
    assert measure.saved_bytes(call) == x.nbytes


@pytest.mark.skipif(not measure.CLEAR_REFS.exists(), reason="the system does not tell a process its peak memory")
def test_peak_bytes_sees_what_a_run_holds_for_a_moment():
    size = 64 << 20
    peak = measure.peak_bytes(Call(run=lambda: torch.ones(size // 4), read=dict), "cpu")
    assert size * 0.9 < peak < size * 1.5


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
    assert results["command"].startswith("python -m benchmarks --seconds")
    assert "--out" not in results["command"]
    assert [store.case_of(record).mode for record in results["records"]] == ["inference", "training"]
    assert (tmp_path / "report.html").exists()


@pytest.mark.long
@pytest.mark.skipif(not torch.cpu._is_avx2_supported(), reason="the processor lacks AVX2")
def test_everyone_is_held_to_a_processor(tmp_path):
    words = ("--processor", "avx2", "--cell", "rnn", "--sizes", "5,2,3,4", "--mode", "inference")
    process = run_suite(*words, "--peer", "torch,onnxruntime", folder=tmp_path)
    _, err = process.communicate(timeout=240)
    assert process.returncode == 0, err
    results = store.load(tmp_path / "results.json")
    assert results["machine"]["device"].endswith(" held to AVX2")
    assert results["machine"]["cpu_capability"] == "AVX2"
    assert results["skipped"]["onnxruntime"] == "cannot be held to a processor's instructions"
    assert {row["status"] for row in results["records"][0]["rows"]} == {"ok"}


@pytest.fixture
def interruptible():
    """What a shell starts in the background ignores SIGINT, and so would all that the tests start."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize("stop", [signal.SIGINT, pytest.param(signal.SIGTERM, marks=pytest.mark.long)])
def test_an_interrupted_run_keeps_what_is_measured(stop, tmp_path, interruptible):
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
