"""The report: one HTML page from the stored results of a machine, without network, at any width, light and dark.

python -m benchmarks.page              write again the pages of all stored results, and README's pictures of the first
python -m benchmarks.page FILE.json    write the page beside this file
"""

import html
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from statistics import geometric_mean
from string import Template
from typing import Any

from benchmarks import charts, report, store
from benchmarks.cases import CELLS, Case
from benchmarks.contenders import BASELINE, OURS
from benchmarks.elements import bar, heading, heat_map, speed_bars, table

ROOT = Path(__file__).parent.parent
IMAGES = ROOT / "docs" / "images"
MODE_TITLES = {"inference": "inference", "training": "training", "penalty": "gradient penalty", "step": "one step"}
# The third line beside torch's and ours: the first of these that has run.
THIRD = ("onnxruntime", "torch-compile", "jax", "numpy")
Records = list[dict[str, Any]]
# What a panel of lines may show of one row.
VALUES: dict[str, tuple[Callable[[Case, dict[str, Any]], float | None], str]] = {
    "time": (lambda case, row: 1e3 * row["ms"][0] / case.T, "µs per step"),
    "saved": (lambda case, row: row["saved"] / 1e6 if row.get("saved") else None, "MB kept for backward"),
    "peak": (lambda case, row: row["peak"] / 1e6 if row.get("peak") else None, "MB at the peak"),
    "error": (lambda case, row: row["error"] or None, "relative error"),
}


def write(results: dict[str, Any], folder: Path) -> Path:
    """Write report.html into the folder."""
    path = folder / "report.html"
    path.write_text(page(results), encoding="utf-8")
    return path


def page(results: dict[str, Any]) -> str:
    machine = results["machine"]
    template = Template((Path(__file__).parent / "page.html").read_text(encoding="utf-8"))
    parts = (models, heat_maps, times, memory, accuracy, frozen, cells, first_call, summary, tables)
    return template.substitute(
        device=html.escape(machine["device"]),
        light=charts.css(charts.LIGHT),
        dark=charts.css(charts.DARK),
        conditions=html.escape(conditions(results)),
        sections="\n".join(filter(None, (part(results) for part in parts))),
        facts=table(("", "_"), [list(pair) for pair in report.facts(results)], sortable=False),
    )


def conditions(results: dict[str, Any]) -> str:
    machine = results["machine"]
    versions = (
        f"{name} {machine['versions'][name]}" for name in ("torch", "onnxruntime") if name in machine["versions"]
    )
    said = [f"{machine['threads']} threads", *versions, f"commit {machine['commit']}", results["started"][:10]]
    if not results["complete"]:
        said.append("interrupted: what is shown was measured before")
    return ", ".join(said)


def speeds(records: Records, peer: str, name: Callable[[Case], str], detail: Callable[[Case], str]) -> list[charts.Bar]:
    rows = []
    for record in records:
        case, found = store.case_of(record), store.ok_rows(record)
        if "ratio" in found.get(OURS, {}):
            other = found.get(peer, {}).get("ratio", [None])[0]
            verdict = store.verdict(found[OURS], record["noise"])
            rows.append(charts.Bar(name(case), detail(case), found[OURS]["ratio"][0], verdict, other))
    return sorted(rows, key=lambda row: -row.value)


def model_speeds(results: dict[str, Any]) -> list[charts.Bar]:
    records = store.records_of(results, "real-layers")
    return speeds(
        records, THIRD[0], lambda case: case.label, lambda case: f"{case.cell.upper()}, {MODE_TITLES[case.mode]}"
    )


def models(results: dict[str, Any]) -> str:
    rows = model_speeds(results)
    if not rows:
        return ""
    mean = geometric_mean(row.value for row in rows)
    said = (
        f"Times as fast as <b>torch.nn</b>, the black line, in {len(rows)} cases from published models; geometric mean "
        f"{mean:.2f}. The blue mark is ONNX Runtime, where it can run the case. Grey: within the noise."
    )
    return heading("Layers of published models", said) + speed_bars(rows, THIRD[0])


def heat_maps(results: dict[str, Any]) -> str:
    """Hidden size by batch, for each cell and mode."""
    found: dict[tuple[str, str], dict[tuple[int, int], tuple[float, str, float]]] = {}
    records = store.records_of(results, "hidden-size") + store.records_of(results, "batch")
    for record in records:
        case, row = store.case_of(record), store.ok_rows(record).get(OURS, {})
        if "ratio" in row:
            cell = row["ratio"][0], store.verdict(row, record["noise"]), record["noise"] or 0.0
            found.setdefault((case.cell, case.mode), {})[case.H, case.B] = cell
    if not found:
        return ""
    case = store.case_of(records[0])
    said = (
        f"Times as fast as torch.nn by hidden size H (rows) and batch B (columns), T={case.T}, input as wide as H, "
        f"{case.dtype}. Green: faster. Red: slower. Grey: even, the noise decides. Empty: not measured."
    )
    maps = "".join(heat_map(f"{cell.upper()}, {MODE_TITLES[mode]}", sizes) for (cell, mode), sizes in found.items())
    return heading("Hidden size by batch", said) + f'<div class="maps">{maps}</div>'


def lines_of(records: Records, cell: str, mode: str, value: str, names: Iterable[str]) -> list[charts.Line]:
    """A line for each contender by T."""
    take = VALUES[value][0]
    lines = []
    for name in names:
        points = []
        for record in records:
            case, row = store.case_of(record), store.ok_rows(record).get(name)
            if (case.cell, case.mode) == (cell, mode) and row and (y := take(case, row)):
                points.append((case.T, y))
        lines.append(charts.Line(name, sorted(points)))
    return [line for line in lines if len(line.points) > 1]


def panels(results: dict[str, Any], value: str, modes: Iterable[str], three: bool) -> str:
    """A panel for each cell and mode, from the question `sequence-length`."""
    records = store.records_of(results, "sequence-length")
    drawn = []
    for mode in modes:
        for cell in CELLS:
            lines = lines_of(records, cell, mode, value, (BASELINE, OURS))
            if three:
                lines += [line for name in THIRD for line in lines_of(records, cell, mode, value, (name,))][:1]
            if lines:
                drawn.append(charts.panel(f"{cell.upper()}, {MODE_TITLES[mode]}", VALUES[value][1], lines))
    return f'<div class="panels">{"".join(drawn)}</div>' if drawn else ""


def sizes_said(results: dict[str, Any]) -> str:
    case = store.case_of(store.records_of(results, "sequence-length")[0])
    return f"B={case.B}, I={case.I}, H={case.H}, {case.dtype}"


def times(results: dict[str, Any]) -> str:
    drawn = panels(results, "time", ("inference", "training"), three=True)
    return (
        drawn
        and heading("Time against sequence length T", f"Both axes are logarithmic. {sizes_said(results)}.") + drawn
    )


def memory(results: dict[str, Any]) -> str:
    drawn = panels(results, "saved", ("training",), three=False) + panels(results, "peak", ("training",), three=False)
    said = "What autograd keeps for backward, and the most that one training call holds above what was there before."
    return drawn and heading("Memory of a training call", said) + drawn


def accuracy(results: dict[str, Any]) -> str:
    drawn = panels(results, "error", ("inference", "training"), three=False)
    said = "Error against torch.nn in float64: the relative L2 norm of the worst tensor. Training: gradients too."
    last = []
    for record in store.records_of(results, "sequence-length"):
        case, rows = store.case_of(record), store.ok_rows(record)
        if case.mode == "training" and rows.keys() >= {OURS, BASELINE} and rows[OURS]["error"]:
            last.append((case.T, rows[BASELINE]["error"] / rows[OURS]["error"], case))
    if last:
        _, times_, case = max(last, key=lambda each: (each[0], each[1]))
        if times_ > 1:
            said += f" At T={case.T} the {case.cell.upper()}'s is {times_:.1f} times smaller than torch.nn's."
    return drawn and heading("Accuracy", said) + drawn


def frozen(results: dict[str, Any]) -> str:
    """Geometric means of the speeds of frozen layers, by cell, contender and format of the weights."""
    groups: dict[tuple[str, str, str], list[tuple[float, float]]] = {}
    for record in store.records_of(results, "frozen"):
        case = store.case_of(record)
        for name, row in store.ok_rows(record).items():
            if "ratio" in row:
                groups.setdefault((case.cell, case.weights, name), []).append((row["ratio"][0], row["error"]))
    if not groups:
        return ""
    found = {key: (geometric_mean(ratio for ratio, _ in each), max(e for _, e in each)) for key, each in groups.items()}
    most = max(mean for mean, _ in found.values())
    lines = [
        bar(f"{cell.upper()}, {weights}", f"{name}, error {error:.0e}", mean / most, charts.times(mean),
            name.split(":")[0].replace("torch-int8", "torch"))
        for (cell, weights, name), (mean, error) in found.items()
    ]  # fmt: skip
    cases = max(map(len, groups.values()))
    said = (
        f"Inference with weights packed once, relative to torch.nn in float32: geometric means of up to {cases} sizes. "
        "Orange: rnnfast.freeze. Blue: ONNX Runtime. Grey: torch's quantize_dynamic."
    )
    return (
        heading("Frozen inference", said) + f'<div class="bars" style="--one:{100 / most:.1f}%">{"".join(lines)}</div>'
    )


def cells(results: dict[str, Any]) -> str:
    peer = "torch-compile"
    records = store.records_of(results, "cells")
    rows = speeds(records, peer, lambda case: case.cell, lambda case: MODE_TITLES[case.mode])
    said = (
        "Cells that torch.nn lacks, each declared in a few lines: times as fast as a loop over the steps in eager "
        "torch, T=100 B=32 I=H=128. The mark is that loop under torch.compile."
    )
    return heading("Cells of your own", said) + speed_bars(rows, peer) if rows else ""


def first_call(results: dict[str, Any]) -> str:
    rows = results["startup"]
    if not rows:
        return ""
    most = max(row["ms"] for row in rows)

    def value(ms: float) -> str:
        return f"{ms / 1e3:.1f} s" if ms >= 1e3 else f"{ms:.0f} ms"

    lines = [
        bar(row["what"], "", row["ms"] / most, value(row["ms"]), "" if OURS in row["what"] else "torch") for row in rows
    ]
    said = (
        "Import, and the first training call of a layer in a process of its own. Cold: kernels are compiled, once for "
        "a machine. Cached: a later process reads them from disk."
    )
    return heading("First call", said) + f'<div class="bars" style="--one:0%">{"".join(lines)}</div>'


def summary(results: dict[str, Any]) -> str:
    skipped = "; ".join(f"{name}, {why}" for name, why in results["skipped"].items())
    said = "Geometric mean, worst and best over all cases of a cell and mode." + (
        f" Did not take part: {html.escape(skipped)}." if skipped else ""
    )
    kinds = ("_cell", "_mode", "_contender", "cases", "mean x torch", "worst", "_at", "best", "_at")
    return heading("Summary", said) + table(kinds, report.marks_rows(results["records"]))


# Questions with a picture above; the others get bars with their table.
SHOWN = ("real-layers", "sequence-length", "hidden-size", "batch", "frozen", "cells", "facts")


def layer_said(case: Case) -> str:
    return ", ".join(word for word in (MODE_TITLES[case.mode], case.sizes, case.extras) if word)


def tables(results: dict[str, Any]) -> str:
    """Every case, folded, by question."""
    parts = [
        heading(
            "All cases", "Bars: times as fast as torch.nn; blue: ONNX Runtime. A click on a column's head sorts by it."
        )
    ]
    columns = ("_case", "_contender", "ms", "20%..80%", "us/step", "x torch", "20%..80%", "_", "error", "of limit")
    for question in store.questions_of(results):
        records = store.records_of(results, question)
        rows = [row for record in records for row in report.case_rows(record, results["machine"], every=True)]
        noise = sorted(record["noise"] for record in records if record["noise"] is not None)
        said = [f"Noise: median {noise[len(noise) // 2]:.1%}, largest {noise[-1]:.1%}."] if noise else []
        said += [f"{html.escape(left_out.capitalize())}."] if (left_out := report.skips(records)) else []
        title = f"{question.replace('-', ' ').capitalize()}: {len(records)} cases"
        drawn = [] if question in SHOWN else speeds(records, THIRD[0], lambda case: case.label or case.cell, layer_said)
        inside = (
            f'<p class="soft">{" ".join(said)}</p>{speed_bars(drawn, THIRD[0]) if drawn else ""}{table(columns, rows)}'
        )
        parts.append(f"<details><summary>{title}</summary>{inside}</details>")
    return "\n".join(parts)


def stored() -> list[Path]:
    """List the results of every machine, those of runs over a part left out."""
    return sorted(store.RESULTS.glob("*/results.json"))


def pictured() -> dict[str, Any]:
    """Return what README's pictures show: the first stored results with layers of published models."""
    return next(filter(model_speeds, map(store.load, stored())))


def draw_pictures(results: dict[str, Any], folder: Path = IMAGES) -> list[Path]:
    """Draw README's pictures, light and dark: speed by real model."""
    rows = model_speeds(results)
    notes = [
        f"{results['machine']['device']}, {conditions(results)}.",
        "Blue: ONNX Runtime, where it can run the case. Grey: within the noise.",
    ]
    paths = []
    folder.mkdir(parents=True, exist_ok=True)
    for name, theme in (("light", charts.LIGHT), ("dark", charts.DARK)):
        paths.append(folder / f"speed-{name}.svg")
        picture = charts.bars(rows, "Speed of layers of published models, times torch.nn", notes, theme)
        paths[-1].write_text(picture, encoding="utf-8")
    return paths


def main(words: list[str]) -> None:
    for file in [Path(word) for word in words] or stored():
        print(write(store.load(file), file.parent))
    if not words:
        print(*draw_pictures(pictured()), sep="\n")


if __name__ == "__main__":
    main(sys.argv[1:])
