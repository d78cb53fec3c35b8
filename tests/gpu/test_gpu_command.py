"""The command for a machine with a GPU: its stages keep to their time, and what they said is read right."""

import json
import os
import shutil
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("triton", minversion="3.5")

import fake_cuda
from rnnfast_kernels.gpu import aot, plan

from benchmarks import options
from benchmarks.contenders import ours
from benchmarks.gpu import __main__ as gpu
from benchmarks.gpu import processes, report
from rnnfast.backends import gpu_launch

LOG = """
tests/test_a.py::test_one PASSED [ 10%]
tests/test_a.py::test_two FAILED [ 20%]
tests/test_a.py::test_three"""
JUNIT = """<testsuites><testsuite tests="3" failures="1" errors="0" skipped="1">
<testcase classname="tests.test_a" name="test_one"/>
<testcase classname="tests.test_a" name="test_two"><failure/></testcase>
<testcase classname="tests.test_a" name="test_three"><skipped/></testcase></testsuite></testsuites>"""


@pytest.fixture
def repository(tmp_path, monkeypatch):
    """A folder with tests of its own in place of the repository."""
    (tmp_path / "tests").mkdir()
    shutil.copy(gpu.ROOT / "tests" / "conftest.py", tmp_path / "tests")
    monkeypatch.setattr(processes, "ROOT", tmp_path)
    return tmp_path


def test_how_processes_ended_is_told(repository, monkeypatch):
    """They run side by side, and those that are not done when the time is over are ended, if need be by force."""
    monkeypatch.setattr(processes, "GRACE_SECONDS", 1)
    scripts = {
        "done": "pass",
        "no_tests": "raise SystemExit(5)",
        "failed": "raise SystemExit(3)",
        "killed": "import os; os.kill(os.getpid(), 9)",
        "slow": "import time; time.sleep(100)",
        "deaf": "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(100)",
    }
    for name, script in scripts.items():
        (repository / f"{name}.py").write_text(script)

    def states(names, seconds):
        return processes.run_all([[name] for name in names], seconds, [repository / f"{n}.log" for n in names], {})

    start, (*quick, slow, deaf) = time.monotonic(), scripts
    assert states(quick, 60.0) == ["done", "done", "status 3", "ended by signal 9"]
    assert states([slow, deaf], 2.0) == ["stopped after 2 s", "stopped after 2 s"]
    assert time.monotonic() - start < 60


def test_tests_are_counted_also_where_they_were_cut_off(tmp_path):
    log, junit = tmp_path / "log", tmp_path / "junit"
    log.write_text(LOG)
    failures = ("tests/test_a.py::test_two FAILED [ 20%]", "tests/test_a.py::test_three did not end")
    cut_off = ({"passed": 1, "failed": 1}, False, failures)
    assert processes.read_tests(junit, log) == cut_off
    junit.write_text(JUNIT)
    assert processes.read_tests(junit, log) == (
        {"passed": 1, "failed": 1, "skipped": 1},
        True,
        ("tests.test_a::test_two",),
    )


TESTS = """
import os, pytest, warnings
@pytest.mark.parametrize("n", range(5))
def test_numbers(n):
    print("process", os.getpid())
    assert n != 3
def test_absent():
    pytest.skip("not today")
def test_deprecated():
    warnings.warn("tomorrow it is gone", DeprecationWarning)
def test_refused():
    warnings.warn("the device refused a cooperative launch (too many blocks)", RuntimeWarning)
"""


def test_processes_share_the_tests_of_a_stage(repository, monkeypatch):
    """A warning is no failure, but a launch that the device refused is one."""
    (repository / "tests" / "gpu").mkdir()
    (repository / "tests" / "gpu" / "test_some.py").write_text(TESTS)
    monkeypatch.setattr(gpu.os, "cpu_count", lambda: 4)
    stage = gpu.Stage("some", 1, 14, ("gpu/some",), "numbers or absent or deprecated or refused")
    outcome = gpu.run_stage(stage, repository, 100.0, {})
    assert outcome.state == "status 1"
    assert outcome.counts == "5 passed, 2 failed, 1 skipped"
    assert {failure.split("::")[-1] for failure in outcome.failures} == {"test_numbers[3]", "test_refused"}
    assert (repository / "tests.txt").read_text().count("test session starts") == 2


def test_a_refused_launch_is_an_error_in_the_benchmark(monkeypatch):
    """By whichever plan, the library's own too, and on a device alone."""
    contexts = []
    monkeypatch.setattr(ours, "build", lambda *_: None)
    monkeypatch.setattr(ours, "call", lambda work, module, forward, chosen: contexts.append(chosen))
    case = SimpleNamespace(form="dense", weights="")
    for device, backend, plan_ in (("cuda", "auto", ""), ("cuda", "triton", ""), ("cuda", "triton", "units=16")):
        ours.prepare(SimpleNamespace(case=case, device=device), backend, plan_)
    for context in contexts:
        with context(), pytest.raises(RuntimeWarning, match="the device refused"):
            gpu_launch.warn_refused.__wrapped__("too many blocks")
    assert len(contexts) == 3


def test_the_work_of_every_stage_exists():
    for _, stages in gpu.CALLS.values():
        for stage in stages:
            assert all(
                list((gpu.ROOT / "tests").glob("{}/test_{}.py".format(*name.split("/")))) for name in stage.tests
            )
            assert (
                stage.tests or f"def {stage.name}(share" in (gpu.ROOT / "benchmarks" / "gpu" / "stages.py").read_text()
            )


@pytest.mark.parametrize("call", gpu.CALLS)
def test_stages_keep_to_the_time_of_their_call(call, tmp_path, monkeypatch):
    """Each takes all that it may, and a picture and a table come after the last."""
    now, given = [1000.0], {}

    def take(stage, out, seconds, environment):
        given[stage.name] = seconds
        now[0] += seconds + 2 * gpu.GRACE_SECONDS
        return gpu.Outcome(stage.name, "stopped", seconds)

    monkeypatch.setattr(gpu, "run_stage", take)
    monkeypatch.setattr(gpu.time, "monotonic", lambda: now[0])
    seconds, stages = gpu.CALLS[call]
    outcomes = gpu.call(stages, seconds, tmp_path, {}, {})
    assert now[0] <= 1000 + seconds - gpu.LAST_SECONDS
    assert [outcome.stage for outcome in outcomes] == [stage.name for stage in stages]
    assert all(given[stage.name] == stage.seconds for stage in stages[:-2])
    assert {"first": 520, "second": 200}[call] == seconds
    assert json.loads((tmp_path / "stages.json").read_text())[0]["stage"] == "smoke"


def row(stage, **more):
    times = {"error": 1e-3, "ours": 1.0, "torch": 3.0, "again": 1.0}
    own = {"H": 256, "B": 16, "T": 512, "us": 2.0, "cudnn": True, "forward": times, "training": times}
    facts = {"device": "H200", "torch": "2.11", "triton": "3.6.0"}
    return json.dumps({"stage": stage, "cell": "lstm", "dtype": "bfloat16", **own, **facts, **more}) + "\n"


def test_the_table_has_twenty_lines_whatever_there_is_to_say(tmp_path):
    assert len(report.table([], [], tmp_path)) <= 20  # nothing was measured
    rows = [row("grid", H=H, cell=cell, B=B) for H in (64, 1024) for cell in ("lstm", "gru") for B in (1, 16)]
    rows += [row("grid", trouble="RuntimeError"), row("plans", predicted=1.0), row("smoke", ok=True)]
    rows += [row("probe", members=132, counter=1.0, polled=0.5, **{"polled, fence": 0.8}), row("grid")[:40]]
    (tmp_path / "rows.jsonl").write_text("".join(rows))
    stages, failures = [f"stage {n}" for n in range(9)], [f"failure {n}" for n in range(50)]
    table = report.table(stages, failures, tmp_path)
    assert len(table) <= 20
    assert all(len(line) <= 150 for line in table)
    text = "\n".join(table)
    assert "lstm bfloat16 B=16, us a step by H (times torch): 64: 2.00 (3.0x), 1024: 2.00 (3.0x)" in text
    assert "exchange of 132 programs, us: counter 1.00, polled 0.50, polled, fence 0.80" in text
    assert "H200, torch 2.11, Triton 3.6.0" in table[-1]
    report.draw(tmp_path)
    assert (tmp_path / "gpu.html").read_text().count("<svg") == 4


@pytest.mark.long
@pytest.mark.timeout(1800)
@pytest.mark.skipif(fake_cuda.compiler() is None, reason="needs a C compiler, as Triton's launcher does")
@pytest.mark.parametrize("call", gpu.CALLS)
def test_a_call_goes_through_over_a_device_that_is_not_there(call, tmp_path):
    """Every stage, with its kernels compiled for an H200, launched by Triton's driver, and never run."""
    command = [sys.executable, "-m", "benchmarks.gpu", call, "--device", "tiny"]
    done = subprocess.run(
        command, cwd=gpu.ROOT, env={**os.environ, "OUT": str(tmp_path)}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    stages = json.loads((tmp_path / "stages.json").read_text())
    assert [(stage["stage"], stage["state"]) for stage in stages] == [(s.name, "done") for s in gpu.CALLS[call][1]]
    rows = report.read(tmp_path)
    assert {each["stage"] for each in rows} == {s.name for s in gpu.CALLS[call][1] if not s.tests and s.name != "warm"}
    assert not [each for each in rows if "trouble" in each]
    for each in rows:
        assert {"device", "torch", "triton", "cuda", "cudnn_version", "commit"} <= each.keys()
        if each["stage"] in ("grid", "sweep"):
            assert each["plan_forward"]["predicted"] > 0
            assert each["plan_backward"]["predicted"] > 0
            assert each["cudnn"] is False
    assert len(done.stdout.split("\n\n")[-1].splitlines()) <= 20
    assert len(list(tmp_path.iterdir())) <= 8
    assert "<svg" in (tmp_path / "gpu.html").read_text()


def test_a_plan_is_read_for_one_pass_or_both():
    assert ours.parse_plan("rows=32, warps=8;backward:loop=streamed") == {
        "forward": {"rows": "32", "warps": "8"},
        "backward": {"rows": "32", "warps": "8", "loop": "streamed"},
    }
    for wrong in ("rows", "rows=many", "loop=spiral", "sideways:rows=3", ""):
        with pytest.raises(ValueError, match="plan"):
            ours.parse_plan(wrong)


def test_a_plan_from_the_command_line_rules_its_pass_alone():
    device = aot.TARGETS["sm_90"][1]
    forward, backward = (plan.Problem("lstm", 1024, 16, 1, "bfloat16", "ieee", way, device) for way in (False, True))
    own = plan.choose(backward)
    with ours.planned("forward:units=16"):
        assert plan.choose(forward).block_n == 16
        assert plan.choose(backward) == own


def test_named_cases_and_plans_take_part(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    words = ["--device", "cuda", "--question", "marks", "--case", "lstm-256", "--plan", "units=16", "--plan", "warps=4"]
    arguments = options.parser().parse_args(["--backend", "triton", *words])
    (question,) = options.asked(arguments)
    assert [(case.H, case.mode) for case in question.cases] == [(256, "inference"), (256, "training")]
    names = [contender.name for contender in options.contenders(question, arguments)]
    assert names == ["torch", "rnnfast:triton", "rnnfast:units=16", "rnnfast:warps=4"]
