"""Stored records as tables in text and HTML, and one page that holds everything: facts, tables, plots.

`x torch` is how many times faster than torch.nn in the same round; a difference inside the noise is called even. The
page opens without a network and without scripts.
"""

import html
import math
from pathlib import Path
from statistics import geometric_mean
from string import Template
from typing import Any, NamedTuple

from benchmarks import store
from benchmarks.contenders import BASELINE

COLUMNS = ("case", "contender", "ms", "20%..80%", "us/step", "x torch", "20%..80%", "", "error", "of limit")
WIDTHS = (48, 16, 9, 17, 9, 8, 13, 6, 8, 8)


def case_rows(record: dict[str, Any], machine: dict[str, Any]) -> list[list[str]]:
    """The cells of one record's rows, in COLUMNS. A row without numbers says why in its third cell.

    Who cannot run the case has no row here; `skips` names it once for the whole question.
    """
    case = store.case_of(record)
    floor = store.floor_ms(case, machine)
    name = " ".join(word for word in (case.label, case.cell, case.mode, case.sizes, case.extras) if word)
    lines = []
    for row in record["rows"]:
        if row["status"] == "skipped":
            continue
        head = [name if not lines else "", row["contender"]]
        if row["status"] != "ok":
            lines.append([*head, f"{row['status']}: {row['reason']}"])
            continue
        middle, low, high = row["ms"]
        ratio = ["1", "", ""]
        if "ratio" in row:
            ratio = [f"{row['ratio'][0]:.2f}", span(row["ratio"][1:]), store.verdict(row, record["noise"])]
        elif row["contender"] != BASELINE:
            ratio = ["", "", ""]
        limit = "" if floor is None else f"{floor / middle:.0%}"
        step = number(1e3 * middle / case.T)
        lines.append([*head, number(middle), span((low, high)), step, *ratio, f"{row['error']:.0e}", limit])
    return lines


def skips(records: list[dict[str, Any]]) -> str:
    """Who left out some of these cases, and why, each reason once; empty where nobody did."""
    rows = (row for record in records for row in record["rows"] if row["status"] == "skipped")
    said = dict.fromkeys(f"{row['contender']} ({row['reason']})" for row in rows)
    return f"left out some cases: {'; '.join(said)}" if said else ""


def number(value: float) -> str:
    """Three significant digits without an exponent."""
    digits = max(0, 2 - math.floor(math.log10(value))) if value > 0 else 0
    return f"{value:.{min(digits, 6)}f}"


def span(values) -> str:
    return "..".join(number(value) for value in values)


def text_lines(rows: list[list[str]]) -> list[str]:
    """Rows as lines of text; numbers to the right, words to the left."""
    lines = []
    for row in rows:
        padded = [
            cell.ljust(width) if place in (0, 1, 7) else cell.rjust(width)
            for place, (cell, width) in enumerate(zip(row, WIDTHS, strict=False))
        ]
        lines.append("  ".join(padded).rstrip())
    return lines


class Mark(NamedTuple):
    """One contender over the cases of one cell and mode: geometric mean, worst and best of its ratios to torch."""

    cell: str
    mode: str
    contender: str
    cases: int
    mean: float
    worst: float
    worst_case: str
    best: float
    best_case: str


MARKS_COLUMNS = ("cell", "mode", "contender", "cases", "mean x torch", "worst", "at", "best", "at")


def marks(records: list[dict[str, Any]]) -> list[Mark]:
    """Summarise by cell, mode and contender, in the order in which they first appear."""
    groups: dict[tuple[str, str, str], list[tuple[float, str]]] = {}
    for record in records:
        case = store.case_of(record)
        for name, row in store.ok_rows(record).items():
            if "ratio" in row:
                where = f"{case.sizes} {case.extras}".strip()
                groups.setdefault((case.cell, case.mode, name), []).append((row["ratio"][0], where))
    return [
        Mark(*key, len(pairs), geometric_mean(ratio for ratio, _ in pairs), *min(pairs), *max(pairs))
        for key, pairs in groups.items()
    ]


def marks_rows(records: list[dict[str, Any]]) -> list[list[str]]:
    """The summary's cells, in MARKS_COLUMNS."""
    return [[f"{cell:.2f}" if isinstance(cell, float) else str(cell) for cell in mark] for mark in marks(records)]


def marks_text(records: list[dict[str, Any]]) -> str:
    """The summary as aligned text; empty where nothing was compared."""
    rows = [list(MARKS_COLUMNS), *marks_rows(records)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    return "\n".join(lines) if len(rows) > 1 else ""


def html_table(columns: tuple[str, ...], rows: list[list[str]]) -> str:
    """An HTML table, without the end tags that HTML leaves out; a short row's last cell spans the rest."""
    head = "".join(f"<th>{html.escape(column)}" for column in columns)
    lines = []
    for row in rows:
        cells = [f"<td>{html.escape(cell)}" for cell in row]
        if len(row) < len(columns):
            cells[-1] = f'<td class="words" colspan="{len(columns) - len(row) + 1}">{html.escape(row[-1])}'
        lines.append(f"<tr>{''.join(cells)}")
    return f"<table><thead><tr>{head}<tbody>\n" + "\n".join(lines) + "\n</table>"


PAGE = Template("""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>rnnfast on $device</title>
<style>
body { font: 15px/1.5 system-ui, sans-serif; max-width: 72rem; margin: 2rem auto; padding: 0 1rem;
       color: #111; background: #fff }
h1 { font-size: 1.5rem } h2 { font-size: 1.2rem; margin-top: 2.5rem; border-bottom: 1px solid #ccc }
table { border-collapse: collapse; font-size: 13px; font-variant-numeric: tabular-nums; margin: .5rem 0 }
th, td { padding: .1rem .6rem; text-align: right; white-space: nowrap }
th { border-bottom: 1px solid #999; font-weight: 600 }
td:first-child, td:nth-child(2), th:first-child, th:nth-child(2), td.words { text-align: left }
td.words { white-space: normal }
tr:hover { background: #f4f4f4 }
svg { max-width: 100%; height: auto } details > summary { cursor: pointer; margin: .5rem 0 }
.wide { overflow-x: auto }
</style></head><body>
<h1>rnnfast beside its peers on $device</h1>
$facts
<h2>How to read this</h2>
<p>Every contender gets the same weights and inputs and is held against torch.nn in float64 before it is timed; one that
is wrong is reported as wrong and not timed. Contenders alternate round by round in one process with the same number of
threads. Times are medians with the 20th and 80th percentile; <em>x torch</em> is the median over the rounds of
torch.nn's time over the contender's. torch.nn runs twice in every round: how far it strays from itself is the noise,
and a ratio inside it is called even. <em>error</em> is the worst relative L2 norm over output, final states and
gradients. <em>of limit</em> is the machine's floor over the time: operations at the rate of a large product or bytes at
the rate of a copy of their size, whichever takes longer.</p>
<h2>Summary</h2>
<div class="wide">$summary</div>
$skipped
$sections
</body></html>
""")

FACTS = ("device", "system", "threads", "cores", "load", "cpu_capability", "python", "commit")


def write(results: dict[str, Any], folder: Path, pictures: list[str]) -> Path:
    """Write report.html beside the pictures, which `plot` left in the folder under these names."""
    path = folder / "report.html"
    path.write_text(page(results, folder, pictures))
    return path


def page(results: dict[str, Any], folder: Path, pictures: list[str]) -> str:
    machine = results["machine"]
    sections = [section(results, question, folder, pictures) for question in store.questions_of(results)]
    if results["startup"]:
        rows = [[row["what"], "", f"{row['ms']:g}"] for row in results["startup"]]
        sections.append(
            f"<h2>Import and first call</h2>{picture(folder, 'startup')}{html_table(('what', '', 'ms'), rows)}"
        )
    skipped = "; ".join(f"{name}, {why}" for name, why in results["skipped"].items())
    return PAGE.substitute(
        device=html.escape(machine["device"]),
        facts=facts(results),
        summary=html_table(MARKS_COLUMNS, marks_rows(results["records"])),
        skipped=f"<p>Did not take part: {html.escape(skipped)}.</p>" if skipped else "",
        sections="\n".join(sections),
    )


def facts(results: dict[str, Any]) -> str:
    machine = results["machine"]
    pairs = [(name.replace("_", " "), str(machine[name])) for name in FACTS]
    pairs.append(("versions", ", ".join(f"{name} {version}" for name, version in machine["versions"].items())))
    pairs.append(("measured limits", store.limits_text(machine)))
    pairs += [("measured", f"{results['started']} to {results['finished']}"), ("command", results["command"])]
    if not results["complete"]:
        pairs.append(("interrupted", "what is shown was measured before"))
    return html_table(("", ""), [list(pair) for pair in pairs])


def section(results: dict[str, Any], question: str, folder: Path, pictures: list[str]) -> str:
    """A question's pictures, then its table, folded away."""
    records = store.records_of(results, question)
    rows = [row for record in records for row in case_rows(record, results["machine"])]
    drawn = "".join(picture(folder, name) for name in pictures if name.startswith(question))
    noise = sorted(record["noise"] for record in records if record["noise"] is not None)
    said = f"<p>Noise: median {noise[len(noise) // 2]:.1%}, largest {noise[-1]:.1%}.</p>" if noise else ""
    left_out = skips(records)
    said += f"<p>L{html.escape(left_out[1:])}.</p>" if left_out else ""
    table = f'<div class="wide">{html_table(COLUMNS, rows)}</div>'
    folded = f"<details><summary>{len(records)} cases</summary>{table}</details>"
    return f"<h2>{html.escape(question.replace('-', ' ').capitalize())}</h2>{drawn}{said}{folded}"


def picture(folder: Path, name: str) -> str:
    """The SVG itself, without its XML heading."""
    text = (folder / f"{name}.svg").read_text()
    return f"<figure>{text[text.index('<svg') :]}</figure>"
