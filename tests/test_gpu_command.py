"""The command for a machine with a GPU: its parts keep to their time, and what they said is read right."""

import json
import shutil

import pytest
import torch

pytest.importorskip("triton")

from rnnfast_kernels.gpu import aot, plan

from benchmarks import gpu, options, tuning

LOG = """
tests/test_a.py::test_one PASSED [ 10%]
tests/test_a.py::test_two FAILED [ 20%]
tests/test_a.py::test_three"""
JUNIT = """<testsuites><testsuite tests="3" failures="1" errors="0" skipped="1">
<testcase classname="tests.test_a" name="test_one"/>
<testcase classname="tests.test_a" name="test_two"><failure/></testcase>
<testcase classname="tests.test_a" name="test_three"><skipped/></testcase></testsuite></testsuites>"""


@pytest.mark.parametrize(
    ("words", "state"),
    [
        (["platform"], "done"),
        (["no_such_module"], "status 1"),
        (["http.server", "0"], "stopped after 1 s"),
        (["tests.ends_by_signal"], "ended by signal 9"),
    ],
)
def test_how_a_part_ended_is_told(words, state, tmp_path, monkeypatch):
    (tmp_path / "tests").mkdir()
    (tmp_path / "tests" / "ends_by_signal.py").write_text("import os; os.kill(os.getpid(), 9)")
    monkeypatch.setattr(gpu, "ROOT", tmp_path)
    assert gpu.run(words, 1.0 if "http.server" in words else 60.0, tmp_path / "log", False)[0] == state


def test_tests_are_counted_also_where_they_were_cut_off(tmp_path):
    log, junit = tmp_path / "log", tmp_path / "junit"
    log.write_text(LOG)
    cut_off = ({"passed": 1, "failed": 1}, False, ("tests/test_a.py::test_two FAILED [ 20%]",))
    assert gpu.read_tests(junit, log) == cut_off
    junit.write_text(JUNIT)
    assert gpu.read_tests(junit, log) == (
        {"passed": 1, "failed": 1, "skipped": 1},
        True,
        ("tests.test_a::test_two",),
    )


TESTS = """
import os, pytest
@pytest.mark.parametrize("n", range(5))
def test_numbers(n):
    print("process", os.getpid())
    assert n != 3
def test_absent():
    pytest.skip("not today")
"""


def test_processes_share_the_tests_of_a_part(tmp_path, monkeypatch):
    (tmp_path / "tests").mkdir()
    (tmp_path / "tests" / "test_some.py").write_text(TESTS)
    shutil.copy(gpu.ROOT / "tests" / "conftest.py", tmp_path / "tests")
    monkeypatch.setattr(gpu, "ROOT", tmp_path)
    monkeypatch.setattr(gpu.os, "cpu_count", lambda: 5)
    outcome = gpu.test(gpu.Part("some", 1, ("some",)), tmp_path, 100.0, False)
    assert outcome.state == "status 1"
    assert outcome.counts == "4 passed, 1 failed, 1 skipped"
    (failure,) = outcome.failures
    assert failure.endswith("test_numbers[3]")
    assert (tmp_path / "tests-some.txt").read_text().count("test session starts") == 2


def test_what_went_wrong_in_the_benchmark_is_named(tmp_path):
    rows = [{"contender": "torch", "status": "ok"}, {"contender": "rnnfast", "status": "wrong", "reason": "output"}]
    (tmp_path / "results.json").write_text(json.dumps({"records": [{"case": {"label": "lstm-1024"}, "rows": rows}]}))
    counts, failures = gpu.read_results(tmp_path / "results.json")
    assert counts == "1 cases, 0 measurements, 1 wrong or crashed"
    assert failures == ("lstm-1024 rnnfast: output",)
    assert gpu.read_results(tmp_path / "none.json") == ("no results", ())


def test_the_tests_of_every_part_exist():
    assert all((gpu.ROOT / "tests" / f"test_{name}.py").exists() for part in gpu.PARTS for name in part.tests)


def test_parts_share_the_time_that_is_left(tmp_path, monkeypatch):
    given = {}

    def take(part, out, seconds, *rest):
        given[part.name] = round(seconds) + gpu.GRACE_SECONDS
        return gpu.Outcome(part.name, "done", 0.0)

    monkeypatch.setenv("OUT", str(tmp_path))
    monkeypatch.setattr(gpu, "test", take)
    monkeypatch.setattr(gpu, "measure", take)
    assert gpu.main([]) == 0
    assert given == {"kernels": 116, "device": 147, "layers": 270, "benchmark": 540}
    given.clear()
    assert gpu.main(["--parts", "device,kernels", "--seconds", "300"]) == 0
    assert given == {"kernels": 150, "device": 300}


def test_a_plan_is_read_for_one_pass_or_both():
    assert tuning.parse("rows=32, warps=8;backward:loop=streamed") == {
        "forward": {"rows": "32", "warps": "8"},
        "backward": {"rows": "32", "warps": "8", "loop": "streamed"},
    }
    for wrong in ("rows", "rows=many", "loop=spiral", "sideways:rows=3", ""):
        with pytest.raises(ValueError, match="plan"):
            tuning.parse(wrong)


def test_a_plan_from_the_command_line_rules_its_pass_alone():
    device = aot.TARGETS["sm_90"][1]
    forward, backward = (plan.Problem("lstm", 1024, 16, 1, "bfloat16", "ieee", way, device) for way in (False, True))
    own = plan.choose(backward)
    with tuning.planned("forward:units=16"):
        assert plan.choose(forward).block_n == 16
        assert plan.choose(backward) == own


def test_named_cases_and_plans_take_part(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    words = gpu.measure_words(
        gpu.parser().parse_args(["--case", "lstm-256", "--plan", "units=16", "--plan", "warps=4"])
    )
    arguments = options.parser().parse_args(["--backend", "triton", *words])
    (question,) = options.asked(arguments)
    assert [(case.H, case.mode) for case in question.cases] == [(256, "inference"), (256, "training")]
    names = [contender.name for contender in options.contenders(question, arguments)]
    assert names == ["torch", "rnnfast:triton", "rnnfast:units=16", "rnnfast:warps=4"]
