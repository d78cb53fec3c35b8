"""Every example answers --help, and the demonstration tells no ratio where the machine is disturbed."""

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from benchmarks import machine
from benchmarks.cases import Case
from examples import demo

ROOT = Path(__file__).parent.parent.parent
EXAMPLES = sorted(path.stem for path in (ROOT / "examples").glob("[!_]*.py"))


def test_every_example_answers_help():
    """In one process, as importing torch takes longest."""
    program = (
        "import runpy, sys\n"
        "for name in sys.argv[1:]:\n"
        "    sys.argv = [name, '--help']\n"
        "    try:\n"
        "        runpy.run_module(f'examples.{name}', run_name='__main__')\n"
        "    except SystemExit as stop:\n"
        "        assert stop.code == 0, name\n"
        "    else:\n"
        "        raise AssertionError(f'{name} ran')\n"
    )
    command = [sys.executable, "-W", "ignore", "-c", program, *EXAMPLES]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("usage: ") == len(EXAMPLES) >= 8


@pytest.mark.parametrize(
    ("theirs", "told"),
    [
        ([9.0] + 2 * [2.0, 2.1, 1.9, 2.0, 2.0], "2.00 times as fast"),
        ([9.0] + 2 * [2.0, 9.0, 1.0, 6.0, 2.0], "none is told"),
        ([9.0, 2.0, 2.0, 2.0], "too few"),
    ],
)
def test_a_ratio_is_told_where_the_rounds_are_alike(theirs, told):
    said = demo.compared(theirs, [5.0] + (len(theirs) - 1) * [1.0])
    assert told in said
    assert ("times as fast" in said) == ("2.00" in told)


@pytest.mark.parametrize(
    ("noise", "ratio", "told"), [(0.02, 2.0, "2.00x"), (0.2, 1.1, "even"), (0.5, 2.0, "disturbed")]
)
def test_a_case_is_told_even_or_withheld_by_its_noise(noise, ratio, told, monkeypatch):
    rows = [{"contender": "torch", "status": "ok", "error": 0.0}]
    rows += [{"contender": "rnnfast", "status": "ok", "error": 1e-7, "ratio": [ratio] * 3}]
    monkeypatch.setattr(demo.measure, "run_case", lambda *_: {"noise": noise, "rows": rows})
    assert demo.time_case(Case("gru", 1, 1, 1, 1))[1] == told
    rows[1] |= {"status": "wrong", "reason": "output"}
    with pytest.raises(RuntimeError, match="wrong, output"):
        demo.time_case(Case("gru", 1, 1, 1, 1))


@pytest.mark.parametrize("ratio", [2.0, float("nan")], ids=["told", "withheld"])
def test_the_picture_is_drawn_whether_ratios_are_told_or_not(ratio, monkeypatch, tmp_path):
    monkeypatch.setattr(demo, "PICTURE", tmp_path / "demo.png")
    runs = {name: SimpleNamespace(losses=[2.0, 1.0], seconds=[1.0, 1.0]) for name in ("torch", "rnnfast")}
    demo.draw(runs, {"LSTM inference": {16: ratio, 128: float("nan")}, "GRU training": {}})
    assert demo.PICTURE.stat().st_size > 1000


def test_a_system_without_a_load_average_has_no_load(monkeypatch):
    monkeypatch.delattr(os, "getloadavg", raising=False)
    assert machine.load() is None
