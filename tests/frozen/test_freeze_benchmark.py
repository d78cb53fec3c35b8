"""The benchmark of frozen layers: its cases are right, and its results tell who is faster."""

import pytest
import torch

from benchmarks import frozen


@torch.no_grad()
def test_a_case_is_checked_and_measured():
    row = frozen.one_case("gru", 3, 2, 8, torch.get_num_threads(), 2)
    assert {"torch float32", "torch int8", "rnnfast", "rnnfast float32", "rnnfast int8"} <= row["median"].keys()
    assert row["errors"]["rnnfast float32"] < 1e-6
    assert 1e-4 < row["errors"]["rnnfast int8"] < 0.02
    assert min(row["fastest"].values()) > 0


@torch.no_grad()
def test_a_wrong_engine_is_not_measured(monkeypatch):
    def wrong(*args):
        return {"torch float32": lambda: torch.ones(2), "rnnfast": lambda: torch.full((2,), 1.1)}

    monkeypatch.setattr(frozen, "engines", wrong)
    with pytest.raises(RuntimeError, match=r"rnnfast: relative error 0\.1 in gru 3x2x8"):
        frozen.one_case("gru", 3, 2, 8, 1, 2)


def test_a_picture(tmp_path):
    medians = {"torch float32": 2.0, "rnnfast": 1.0, "rnnfast int8": 0.25}
    row = {"cell": "gru", "steps": 3, "batch": 2, "hidden": 8, "threads": 1, "median": medians}
    path = tmp_path / "frozen.svg"
    frozen.plot({"rows": [row, {**row, "cell": "lstm"}]}, str(path))
    assert path.read_text().count("<svg") == 1


def test_summary():
    rows = [
        {"cell": "lstm", "median": {"ort int8": seconds, "rnnfast int8": 1.0, "rnnfast": 4.0}} for seconds in (2.0, 8.0)
    ]
    told = frozen.summary(rows)
    assert told["lstm: ort int8 / rnnfast int8"] == {"geometric mean": 4.0, "least": 2.0, "cases": 2}
    assert told["lstm: rnnfast / rnnfast int8"]["geometric mean"] == 4.0
    assert not [name for name in told if name.startswith("gru")]
