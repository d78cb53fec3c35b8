"""Stored records as rows of tables and as text.

`x torch` is how many times faster than torch.nn in the same round; a difference inside the noise is called even.
"""

import math
from statistics import geometric_mean
from typing import Any, NamedTuple

from benchmarks import store
from benchmarks.contenders import BASELINE

COLUMNS = ("case", "contender", "ms", "20%..80%", "us/step", "x torch", "20%..80%", "", "error", "of limit")
WIDTHS = (48, 16, 9, 17, 9, 8, 13, 6, 8, 8)


def case_rows(record: dict[str, Any], machine: dict[str, Any], every: bool = False) -> list[list[str]]:
    """The cells of one record's rows, in COLUMNS. A row without numbers says why in its third cell.

    Who cannot run the case has no row here; `skips` names it once for the whole question. every: whether each row
    names the case, or the first alone.
    """
    case = store.case_of(record)
    floor = store.floor_ms(case, machine)
    name = " ".join(word for word in (case.label, case.cell, case.mode, case.sizes, case.extras) if word)
    lines = []
    for row in record["rows"]:
        if row["status"] == "skipped":
            continue
        head = [name if every or not lines else "", row["contender"]]
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


FACTS = ("device", "system", "threads", "cores", "load", "cpu_capability", "python", "commit")


def facts(results: dict[str, Any]) -> list[tuple[str, str]]:
    """What a reader needs to know of the machine and the run."""
    machine = results["machine"]
    pairs = [(name.replace("_", " "), str(machine[name])) for name in FACTS]
    pairs.append(("versions", ", ".join(f"{name} {version}" for name, version in machine["versions"].items())))
    pairs.append(("measured limits", store.limits_text(machine)))
    return [*pairs, ("measured", f"{results['started']} to {results['finished']}"), ("command", results["command"])]
