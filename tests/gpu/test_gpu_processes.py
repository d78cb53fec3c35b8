"""The command for a machine with a GPU: what a process that fails leaves to the next, and how runs are timed."""

import pytest
import torch

pytest.importorskip("triton", minversion="3.4")

from benchmarks.gpu import __main__ as command
from benchmarks.gpu import layers, processes

# Two of its cases end the process, one by a signal.
CASES = """
import os, sys
from pathlib import Path
from benchmarks.gpu.processes import Progress
progress = Progress()
progress.follow(Path(sys.argv[1]))
for case in "abcdef":
    if progress.begin(case):
        print("at", case, flush=True)
        if case == "b":
            os.kill(os.getpid(), 9)
        if case == "d":
            sys.exit("the device has failed")
progress.end()
sys.exit(3)
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Where the modules are that processes run."""
    monkeypatch.setenv("PYTHONPATH", str(processes.ROOT))
    monkeypatch.setattr(processes, "ROOT", tmp_path)
    return tmp_path


def test_another_process_goes_on_behind_the_case_at_which_one_ended(folder):
    """Each case is begun once, and those are named that ended a process; one that begins none is not followed."""
    (folder / "cases.py").write_text(CASES)
    (folder / "broken.py").write_text("raise SystemExit(4)")
    logs, progress = [folder / "log", folder / "other"], [folder / "begun", folder / "never"]
    states = processes.run_on([["cases", str(progress[0])], ["broken"]], 300.0, logs, {}, progress)
    assert states == ["status 3", "status 4"]
    said = ["at a", "at b", "TROUBLE a process ended at b", "at c", "at d", "the device has failed"]
    assert logs[0].read_text().splitlines() == [*said, "TROUBLE a process ended at d", "at e", "at f"]
    assert not progress[0].exists()


def test_a_process_that_comes_no_further_is_not_followed(folder):
    (folder / "stuck.py").write_text("import sys, pathlib; pathlib.Path(sys.argv[1]).write_text('1'); print('here')")
    log, progress = folder / "log", folder / "begun"
    assert processes.run_on([["stuck", str(progress)]], 300.0, [log], {}, [progress]) == ["done"]
    assert log.read_text().count("here") == 2


def test_a_device_that_does_not_answer_ends_the_process(monkeypatch):
    """It has a limit of its own while it is waited for, then that of a case."""
    seen = []
    monkeypatch.setattr(layers, "DEVICE", "cuda")
    monkeypatch.setattr(layers.faulthandler, "dump_traceback_later", lambda seconds, exit: seen.append((seconds, exit)))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: seen.append("wait"))
    layers.synchronize()
    assert seen == [(layers.DEVICE_SECONDS, True), "wait", (layers.CASE_SECONDS, True)]


def test_an_error_of_the_device_that_stays_ends_the_process(monkeypatch):
    failed = []

    def synchronize():
        if failed:
            raise RuntimeError("CUDA error: misaligned address")

    def run():
        raise ValueError("a case of its own")

    monkeypatch.setattr(layers, "synchronize", synchronize)
    layers.attempt(("lstm",), run)
    failed.append(True)
    with pytest.raises(SystemExit, match=r"TROUBLE .* misaligned address"):
        layers.attempt(("lstm",), run)


class Event:
    """Of a device whose clock runs by what each run takes."""

    now = 0.0

    def __init__(self, enable_timing: bool) -> None:
        assert enable_timing

    def record(self) -> None:
        self.at = Event.now

    def elapsed_time(self, later: "Event") -> float:
        return later.at - self.at


def test_runs_are_timed_one_behind_another(monkeypatch):
    """The host waits at the end alone, and the first run, for which the device had to wait, does not count."""
    waits, times = [], iter([9.0, 50.0, 3.0, 4.0, 3.0])

    def run():
        Event.now += next(times)

    monkeypatch.setattr(layers, "DEVICE", "cuda")
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(layers, "synchronize", lambda: waits.append(Event.now))
    assert layers.milliseconds(run, seconds=0.0) == 3.0
    assert waits == [9.0, 69.0]


def test_torch_runs_as_for_inference_and_as_for_training():
    module, x = torch.nn.LSTM(8, 8), torch.randn(2, 1, 8)
    layers.forward_of(module, x)
    assert not module.training
    layers.training_of(module, x, x)
    assert module.training


def test_the_second_call_measures_what_the_first_did_not(tmp_path, monkeypatch):
    """By the rows that the first left; a rehearsal neither leaves nor takes any."""
    left, asked = tmp_path / "build" / "rows.jsonl", []

    def call(stages, seconds, out, environment, tests):
        asked.append(environment.get("DONE"))
        (out / "rows.jsonl").write_text("")
        return []

    monkeypatch.setenv("OUT", str(tmp_path / "out"))
    monkeypatch.setattr(command, "MEASURED", left)
    monkeypatch.setattr(command, "call", call)
    monkeypatch.setattr(command.cache, "unpack", lambda: None)
    monkeypatch.setattr(command.report, "table", lambda *_: [])
    for words in (["first", "--device", "tiny"], ["second"], ["first"], ["second"], ["second", "--device", "tiny"]):
        assert command.main(words) == 0
    assert asked == [None, None, None, str(left), None]
