"""What the benchmark suite says of stored results: changes told from noise, plots, and tables, in the pages too."""

import itertools
import re

import pytest

from benchmarks import charts, compare, elements, page, questions, readme, report, store
from benchmarks.__main__ import main
from benchmarks.cases import CELLS, Case, operations, traffic


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
        compare.show(str(tmp_path / "a.json"), str(tmp_path / "a.json"))


def every_question() -> dict:
    """A results file with every case of every question."""
    results = stored(2.0)
    theirs, ours = results["records"][0]["rows"]
    ours |= {"saved": 10**6, "peak": 10**7}
    results["records"] = [
        {"question": question.name, "case": case.to_json(), "noise": 0.1, "rows": [theirs, ours]}
        for question in (*questions.full("cpu"), questions.grid(3, 0, questions.Limits()))
        for case in question.cases
    ]
    return results


def test_the_page_shows_every_part_and_needs_no_network():
    shown = page.page(every_question())
    for part in ("published models", "Hidden size by batch", "sequence length T", "Memory", "Accuracy", "Frozen",
                 "Cells of your own", "First call", "Summary"):  # fmt: skip
        assert re.search(f"<h2>[^<]*{part}", shown), part
    assert "Encodec, one second" in shown
    folded = re.search(r"<summary>Stacks:.*?</details>", shown, re.DOTALL)[0]
    assert folded.count('class="bar"') == folded.count("<tr><td") / 2  # ours, beside torch's row
    assert "Test &lt;CPU&gt;" in shown
    assert shown.count("<svg") == 3 * (2 + 2 + 2)  # cells by: time, memory, error in two panels each
    assert "http" not in shown.replace("http://www.w3.org", "")
    assert len(shown.encode()) < 400_000


def test_the_page_needs_no_question_in_particular(tmp_path):
    path = page.write(stored(2.0), tmp_path)
    shown = path.read_text()
    assert "sequence length T" in shown
    assert "published models" not in shown


def test_stored_pages_are_those_of_the_stored_results():
    """`python -m benchmarks.page` writes them again, and README's pictures."""
    assert page.stored()
    for file in page.stored():
        assert (file.parent / "report.html").read_text() == page.page(store.load(file)), file
        assert (file.parent / "report.html").stat().st_size < 400_000


def test_pictures_of_the_readme_are_those_of_the_stored_results(tmp_path):
    for path in page.draw_pictures(page.pictured(), tmp_path):
        assert path.read_text() == (page.IMAGES / path.name).read_text()
    light, dark = ((tmp_path / f"speed-{name}.svg").read_text() for name in ("light", "dark"))
    assert light.count("<rect") == dark.count("<rect") == 21
    assert light != dark


def test_a_heat_map_says_where_noise_decides():
    shown = elements.heat_map(
        "LSTM", {(16, 1): (2.0, "faster", 0.1), (16, 4): (1.05, "even", 0.2), (32, 4): (0.5, "slower", 0.1)}
    )
    assert shown.count("<td>") == 1  # not measured
    assert '<td class="even"' in shown
    assert ">even" in shown
    assert shown.index("H=16") < shown.index("H=32")


@pytest.mark.parametrize(("low", "high"), [(1, 2), (0.3, 40), (1e-7, 3e-7), (5, 5e6)])
def test_ticks_are_a_few_round_numbers_between_the_bounds(low, high):
    ticks = charts.log_ticks(low, high)
    assert 1 <= len(ticks) <= 8
    assert all(low * 0.99 <= tick <= high * 1.01 for tick in ticks)


def test_labels_keep_their_distance_and_stay_inside():
    moved = charts.spread_out([10.0, 11.0, 99.0], 13, 10, 100)
    assert moved == sorted(moved)
    assert min(b - a for a, b in itertools.pairwise(moved)) >= 13
    assert max(moved) <= 100


def test_marks_are_geometric_means_and_extremes():
    records = stored(2.0)["records"][:2]
    records[1] = stored(8.0)["records"][1]
    (mark,) = report.marks(records)
    assert mark[:4] == ("rnn", "inference", "rnnfast", 2)
    assert mark.mean == pytest.approx(4.0)
    assert (mark.worst, mark.worst_case) == (2.0, "T=1 B=16 I=128 H=128")
    assert (mark.best, mark.best_case) == (8.0, "T=64 B=16 I=128 H=128")


def test_the_table_says_where_a_peer_wins_and_where_noise_decides():
    slower = stored(0.5)["records"][0]
    assert "slower" in report.case_rows(slower, stored(0.5)["machine"])[1]
    even = stored(1.1, noise=0.2)["records"][0]
    assert "even" in report.case_rows(even, stored(1.1)["machine"])[1]


def test_who_cannot_run_a_case_is_named_once():
    records = [stored(2.0, status="skipped")["records"][0]] * 3
    assert report.skips(records) == "left out some cases: rnnfast (why)"
    assert len(report.case_rows(records[0], stored(1.0)["machine"])) == 1


def test_the_floor_is_operations_or_bytes():
    machine = stored(1.0)["machine"]
    case = Case("lstm", T=100, B=64, I=512, H=512)
    assert store.floor_ms(case, machine) == pytest.approx(1e3 * operations(case) / 2e11)
    small = Case("lstm", T=1, B=1, I=8, H=8)
    assert store.floor_ms(small, machine) == pytest.approx(1e3 * traffic(small) / 1e11)


def test_pages_show_what_the_stored_results_give(capsys):
    assert readme.main(["--check"]) == 0, capsys.readouterr().err


def test_check_sees_other_numbers(monkeypatch, tmp_path, capsys):
    results = tmp_path / "benchmarks" / "results"
    real = stored(2.0)
    real["records"] += [record | {"question": "real-layers"} for record in stored(8.0)["records"]]
    store.save(results / "a-machine" / "results.json", real)
    store.save(results / "a-machine" / "quick" / "results.json", stored(9.0))
    store.save(results / "another" / "results.json", stored(3.0))
    monkeypatch.setattr(readme, "ROOT", tmp_path)
    monkeypatch.setattr(store, "RESULTS", results)
    (tmp_path / "docs").mkdir()
    front, tables = tmp_path / "README.md", tmp_path / "docs" / "benchmarks.md"
    for file in (front, tables):
        file.write_text(f"before\n{readme.BEGIN}\n{readme.END}\nafter\n")
    assert readme.main(["--check"]) == 1
    assert "README.md, docs/benchmarks.md" in capsys.readouterr().err
    assert readme.main(["--write"]) == 0
    assert readme.main(["--check"]) == 0
    assert "In 12 cases from published models, rnnfast runs 8.0 to 8.0 times" in front.read_text()
    assert "| LSTM training, rnnfast | 2.00 | 2.00 |" in tables.read_text()
    assert "| LSTM training, rnnfast | 3.00 | 3.00 |" in tables.read_text()
    for file, number, other in ((front, "8.0 times", "9.0 times"), (tables, "2.00", "9.00")):
        file.write_text(file.read_text().replace(number, other))
        assert readme.main(["--check"]) == 1
        assert readme.main(["--write"]) == 0
        assert number in file.read_text()
    tables.write_text("no markers")
    assert readme.main(["--check"]) == 2
    assert f"docs/benchmarks.md lacks the markers\n{readme.BEGIN}" in capsys.readouterr().err
