"""Stored records as tables: one row per case and contender, and the summary over many cases, in text and HTML.

Every contender stands in the same ink. `x torch` is how many times faster than torch.nn in the same round; a difference
inside the noise is called even.
"""

import html
import math
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
    """One contender over the cases of one cell and mode: the ratio to torch, its geometric mean, worst and best."""

    cell: str
    mode: str
    contender: str
    cases: int
    mean: float
    worst: float
    worst_case: str
    best: float
    best_case: str


def marks(records: list[dict[str, Any]]) -> list[Mark]:
    """Summarise by cell, mode and contender, in the order in which they first appear."""
    groups: dict[tuple[str, str, str], list[tuple[float, str]]] = {}
    for record in records:
        case = store.case_of(record)
        for name, row in store.ok_rows(record).items():
            if "ratio" in row:
                where = f"{case.sizes} {case.extras}".strip()
                groups.setdefault((case.cell, case.mode, name), []).append((row["ratio"][0], where))
    found = []
    for key, pairs in groups.items():
        mean = math.exp(sum(math.log(ratio) for ratio, _ in pairs) / len(pairs))
        found.append(Mark(*key, len(pairs), mean, *min(pairs), *max(pairs)))
    return found


def marks_rows(found: list[Mark]) -> list[list[str]]:
    return [
        [
            *(mark.cell, mark.mode, mark.contender, str(mark.cases)),
            *(f"{mark.mean:.2f}", f"{mark.worst:.2f}", mark.worst_case, f"{mark.best:.2f}", mark.best_case),
        ]
        for mark in found
    ]


MARKS_COLUMNS = ("cell", "mode", "contender", "cases", "mean x torch", "worst", "at", "best", "at")


def marks_text(records: list[dict[str, Any]]) -> str:
    """The summary as aligned text; empty where nothing was compared."""
    rows = [list(MARKS_COLUMNS), *marks_rows(marks(records))]
    if len(rows) == 1:
        return ""
    widths = [max(len(row[place]) for row in rows) for place in range(len(MARKS_COLUMNS))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    )


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
