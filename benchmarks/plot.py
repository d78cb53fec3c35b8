"""One PNG and one SVG per question, from stored results alone. Every contender has one colour and marker everywhere."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator
from PIL import Image

from benchmarks import store
from benchmarks.cases import CELLS, MODES, Case
from benchmarks.contenders import BASELINE, OURS

# Okabe and Ito's colours, which colour-blind readers tell apart.
STYLES = {
    "torch": ("#000000", "o"),
    "rnnfast": ("#d55e00", "s"),
    "onnxruntime": ("#0072b2", "^"),
    "jax": ("#009e73", "v"),
    "torch-compile": ("#cc79a7", "D"),
    "numpy": ("#999999", "x"),
    "flashrnn": ("#56b4e9", "P"),
    "haste": ("#e69f00", "*"),
}
BACKEND_STYLES = (("#d55e00", "<"), ("#a63e00", ">"), ("#ff9d5c", "p"), ("#7a2e00", "h"))
MODE_TITLES = {
    "inference": "forward",
    "training": "forward + backward",
    "penalty": "gradient penalty",
    "step": "one step",
}
SETTINGS = {
    "font.size": 8,
    "axes.titlesize": 9,
    "svg.fonttype": "none",
    "svg.hashsalt": "rnnfast",
    "lines.markersize": 4,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#dddddd",
    "grid.linewidth": 0.5,
}
# What may be drawn of one contender's row in one case, None where the row has it not, and the axis's label.
VALUES: dict[str, tuple[Callable[[Case, dict[str, Any]], float | None], str]] = {
    "time": (lambda case, row: row["ms"][0], "ms"),
    "speedup": (
        lambda case, row: row["ratio"][0] if "ratio" in row else 1.0 if row["contender"] == BASELINE else None,
        "times faster than torch.nn",
    ),
    "per-step": (lambda case, row: 1e3 * row["ms"][0] / case.T, "microseconds per step"),
    "saved": (lambda case, row: row["saved"] / 1e6 if "saved" in row else None, "MB saved for backward"),
    "peak": (lambda case, row: row["peak"] / 1e6 if row.get("peak") else None, "MB at the peak of a training call"),
    "error": (lambda case, row: row["error"] or None, "relative error against float64"),
}
AXES = {
    "sequence-length": ("T", "sequence length T"),
    "hidden-size": ("H", "hidden size H (input I = H)"),
    "batch": ("B", "batch B"),
}


def draw_all(results: dict[str, Any], folder: Path) -> list[str]:
    """Draw what the results hold; return the pictures' names without their endings, in reading order."""
    names = []
    with matplotlib.rc_context(SETTINGS):
        for name, figure in figures(results):
            save(figure, folder / name)
            names.append(name)
    return names


def figures(results: dict[str, Any]):
    """Yield every picture's name and figure."""
    for question in store.questions_of(results):
        records = store.records_of(results, question)
        if question == "live-fraction":
            yield question, live_fraction(records)
        elif question not in AXES:
            yield question, ratio_list(records)
        else:
            for name in VALUES if question == "sequence-length" else ("time",):
                yield question + (f"-{name}" if name != "time" else ""), panels(records, *AXES[question], *VALUES[name])
    if results["startup"]:
        yield "startup", startup(results["startup"])


def style(contender: str) -> dict[str, Any]:
    if contender in STYLES:
        color, marker = STYLES[contender]
    else:
        color, marker = BACKEND_STYLES[sum(map(ord, contender)) % len(BACKEND_STYLES)]
    return {"color": color, "marker": marker, "linewidth": 1.8 if contender.startswith(OURS) else 1.1}


def panels(records: list[dict[str, Any]], axis: str, label: str, value: Callable, unit: str) -> Figure:
    """Modes down, cells across; both axes logarithmic; one line per contender."""
    lines: dict[tuple[str, str, str], list[tuple[float, float]]] = {}
    for record in records:
        case = store.case_of(record)
        for name, row in store.ok_rows(record).items():
            y = value(case, row)
            if y is not None:
                lines.setdefault((case.mode, case.cell, name), []).append((getattr(case, axis), y))
    modes = [mode for mode in MODES if any(key[0] == mode for key in lines)] or ["inference"]
    cells = [cell for cell in CELLS if any(key[1] == cell for key in lines)] or ["lstm"]
    figure = Figure(figsize=(2.7 * len(cells) + 0.6, 2.3 * len(modes) + 0.7), layout="constrained")
    axes = figure.subplots(len(modes), len(cells), sharex=True, sharey="row", squeeze=False)
    for row, mode in enumerate(modes):
        for column, cell in enumerate(cells):
            ax = axes[row][column]
            for (line_mode, line_cell, name), points in lines.items():
                if (line_mode, line_cell) == (mode, cell):
                    ax.plot(*zip(*sorted(points), strict=True), label=name, **style(name))
            logarithmic(ax, f"{cell.upper()}, {MODE_TITLES[mode]}")
            if row == len(modes) - 1:
                ax.set_xlabel(label)
        axes[row][0].set_ylabel(unit)
    legend(figure, axes.flat)
    return figure


def logarithmic(ax: Axes, title: str) -> None:
    ax.set_xscale("log", base=2)
    ax.set_yscale("log")
    ax.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    plain_numbers(ax.yaxis)
    ax.set_title(title, loc="left")


def plain_numbers(axis) -> None:
    """Numbers such as 0.5 rather than powers, unless they are very small; minor ticks only where few are major."""
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}" if value >= 1e-3 else f"{value:.0e}"))
    low, high = axis.get_view_interval()
    axis.set_minor_locator(LogLocator(subs=(2, 5)) if high / low < 50 else NullLocator())
    axis.set_minor_formatter(FuncFormatter(lambda value, _: f"{value:g}"))


def legend(figure: Figure, axes) -> None:
    """One legend above all panels, each contender once."""
    handles = {}
    for ax in axes:
        for handle, name in zip(*ax.get_legend_handles_labels(), strict=True):
            handles.setdefault(name, handle)
    inches = 0.5 + 0.07 * max(map(len, handles), default=1)  # of one entry: its mark, then letters
    columns = max(1, int(figure.get_figwidth() / inches))
    figure.legend(handles.values(), handles.keys(), loc="outside upper center", ncols=columns, frameon=False)


def live_fraction(records: list[dict[str, Any]]) -> Figure:
    """Time of ragged input over the time of the same contender's padded run, against the fraction of live rows."""
    padded, lines = {}, {}
    for record in records:
        case = store.case_of(record)
        for name, row in store.ok_rows(record).items():
            key = case.cell, case.mode, name
            if case.form == "dense":
                padded[key] = row["ms"][0]
            else:
                lines.setdefault((*key, case.form), []).append((case.live, row["ms"][0]))
    cells = list(dict.fromkeys(key[0] for key in lines)) or ["lstm"]
    modes = list(dict.fromkeys(key[1] for key in lines)) or ["inference"]
    figure = Figure(figsize=(3.2 * len(cells) + 0.6, 2.3 * len(modes) + 0.7), layout="constrained")
    axes = figure.subplots(len(modes), len(cells), sharex=True, sharey="row", squeeze=False)
    for (cell, mode, name, form), points in lines.items():
        ax = axes[modes.index(mode)][cells.index(cell)]
        shares = [(live, ms / padded[cell, mode, name]) for live, ms in sorted(points) if (cell, mode, name) in padded]
        if shares:
            dash = "-" if form == "packed" else ":"
            ax.plot(*zip(*shares, strict=True), label=f"{name}, {form}", linestyle=dash, **style(name))
    for (row, mode), (column, cell) in ((r, c) for r in enumerate(modes) for c in enumerate(cells)):
        ax = axes[row][column]
        ax.plot((0, 1), (0, 1), color="#bbbbbb", linewidth=0.8, label="in proportion")
        ax.set_title(f"{cell.upper()}, {MODE_TITLES[mode]}", loc="left")
        ax.set_ylim(bottom=0)
        axes[row][0].set_ylabel("time / padded time")
        axes[-1][column].set_xlabel("fraction of live rows")
    legend(figure, axes.flat)
    return figure


def ratio_list(records: list[dict[str, Any]]) -> Figure:
    """A list of cases, one per line, and how many times faster than torch.nn each contender ran it."""
    cases = [store.case_of(record) for record in records]
    figure = Figure(figsize=(8.5, 0.21 * len(cases) + 1.1), layout="constrained")
    ax = figure.subplots()
    ax.axvline(1, label=BASELINE, color=STYLES[BASELINE][0], linewidth=1)
    for place, record in enumerate(records):
        for name, row in store.ok_rows(record).items():
            if "ratio" in row:
                middle, low, high = row["ratio"]
                ax.plot((low, high), (place, place), color=style(name)["color"], linewidth=1)
                ax.plot(middle, place, label=name, linestyle="none", **style(name))
    ax.set_xscale("log")
    plain_numbers(ax.xaxis)
    ax.set_yticks(range(len(cases)), [short_name(case) for case in cases])
    ax.set_ylim(len(cases) - 0.5, -0.5)
    ax.set_xlabel("times faster than torch.nn\n(line: 20th to 80th percentile)")
    ax.grid(False, axis="y")
    legend(figure, [ax])
    return figure


def short_name(case: Case) -> str:
    return ", ".join(
        word for word in (case.label, f"{case.cell.upper()} {MODE_TITLES[case.mode]}", case.sizes, case.extras) if word
    )


def startup(rows: list[dict[str, Any]]) -> Figure:
    figure = Figure(figsize=(7, 0.24 * len(rows) + 0.8), layout="constrained")
    ax = figure.subplots()
    seconds = [1e-3 * row["ms"] for row in rows]
    bars = ax.barh(
        range(len(rows)), seconds, color=[STYLES[OURS if OURS in row["what"] else BASELINE][0] for row in rows]
    )
    ax.bar_label(bars, [f" {value:.2f}" for value in seconds])
    ax.set_yticks(range(len(rows)), [row["what"] for row in rows])
    ax.invert_yaxis()
    ax.set_xlabel("seconds")
    ax.grid(False)
    return figure


def save(figure: Figure, path: Path) -> None:
    """Write the SVG, with text as text and no date, and the PNG with a small palette."""
    path.parent.mkdir(parents=True, exist_ok=True)
    svg, png = path.with_suffix(".svg"), path.with_suffix(".png")
    figure.savefig(svg, metadata={"Date": None})
    svg.write_text(compact(svg.read_text()))
    figure.savefig(png, dpi=100)
    Image.open(png).convert("RGB").quantize(48, Image.Quantize.MAXCOVERAGE).save(png, optimize=True)


def compact(svg: str) -> str:
    """The same picture in a quarter of the bytes: the font named once, one decimal, no groups without a meaning."""
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r" font-family: [^;\"]*;?", "", svg)
    svg = svg.replace("*{", "*{font-family: 'DejaVu Sans', sans-serif;", 1)
    svg = re.sub(r' id="(line2d|text|patch|xtick|ytick)_\d+"', "", svg)
    # A tick's mark has its style where it is defined; a line's marker gets its colour where it is used.
    svg = re.sub(r'(<use [^>]*) style="stroke: [^"]*"', r"\1", svg)
    svg = re.sub(r"(\d+\.\d)\d+", r"\1", svg)
    svg = re.sub(r"\s*\n\s*", " ", svg).replace("> <", "><").strip() + "\n"
    groups = re.compile(r"<g>((?:(?!</?g\b).)*)</g>")
    while groups.search(svg):
        svg = groups.sub(r"\1", svg)
    return svg
