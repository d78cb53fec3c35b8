"""What a call of `benchmarks.gpu` found: a table of twenty lines, and pictures."""

import itertools
import json
from collections.abc import Sequence
from pathlib import Path
from statistics import geometric_mean

from benchmarks import charts

LINES = 20
WIDTH = 150


def read(out: Path) -> list[dict]:
    """The rows, without one that was cut off."""
    path = out / "rows.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith("}")]


def good(rows: list[dict], stage: str) -> list[dict]:
    return [row for row in rows if row["stage"] == stage and "trouble" not in row]


def times(row: dict, way: str) -> float:
    """How many times as fast as torch.nn."""
    return row[way]["torch"] / row[way]["ours"]


def table(stages: Sequence[str], failures: Sequence[str], out: Path) -> list[str]:
    """At most twenty lines: the stages, what failed, and what was measured, the largest widths first."""
    rows = read(out)
    lines = ["", *stages]
    lines += [f"  ! {failure}" for failure in dict.fromkeys(failures)][:4]
    grid = good(rows, "grid")
    measured = []
    for cell, dtype in (("lstm", "bfloat16"), ("gru", "bfloat16"), ("lstm", "float16"), ("lstm", "float32")):
        own = [row for row in grid if (row["cell"], row["dtype"]) == (cell, dtype)]
        if not own:
            continue
        batch = max({row["B"] for row in own}, key=lambda B: (sum(row["B"] == B for row in own), B))
        shown = sorted((row for row in own if row["B"] == batch), key=lambda row: row["H"])
        text = ", ".join(f"{row['H']}: {row['us']:.2f} ({times(row, 'forward'):.1f}x)" for row in shown)
        measured.append(f"{cell} {dtype} B={batch}, us a step by H (times torch): {text}")
    if grid:
        forward, training = ([times(row, way) for row in grid] for way in ("forward", "training"))
        without = sum(not row["cudnn"] for row in grid)
        measured.append(
            f"{len(grid)} of grid, times torch: forward {geometric_mean(forward):.2f}, worst {min(forward):.2f}; "
            f"training {geometric_mean(training):.2f}, worst {min(training):.2f}; without cuDNN {without}"
        )
    plans = good(rows, "plans")
    if plans:
        off = [row["us"] / row["predicted"] for row in plans if row["us"] > 0]
        measured.append(
            f"{len(plans)} plans, measured over predicted: {min(off, default=0):.2f} to {max(off, default=0):.2f}"
        )
    for row in good(rows, "probe")[-1:]:
        names = ("counter", "counter, loads", "polled", "polled, fence")
        costs = (f"{name} {row[name]:.2f}" for name in names if name in row)
        measured.append(f"exchange of {row['members']} programs, us: {', '.join(costs)}")
    facts = next(iter(rows), {})
    measured.append(
        f"{facts.get('device')}, torch {facts.get('torch')}, Triton {facts.get('triton')}, {len(rows)} rows, {out}"
    )
    return [line[:WIDTH] for line in [*lines, *measured][-LINES:]]


def draw(out: Path) -> None:
    """Write gpu.html: times as fast as torch.nn by H for each cell, forward and training, and by T."""
    rows = read(out)
    panels = []
    for cell in ("lstm", "gru", "rnn"):
        grid, sweep = ([row for row in good(rows, stage) if row["cell"] == cell] for stage in ("grid", "sweep"))
        for way, dtype in itertools.product(("forward", "training"), ("bfloat16", "float16", "float32")):
            own = [row for row in grid if row["dtype"] == dtype]
            lines = [
                charts.Line(f"B={B}", sorted((row["H"], times(row, way)) for row in own if row["B"] == B))
                for B in sorted({row["B"] for row in own})
            ]
            panels.append((f"{cell}, {way}, {dtype}", "H", lines))
        lines = [
            charts.Line(f"H={H}", sorted((row["T"], times(row, "forward")) for row in sweep if row["H"] == H))
            for H in sorted({row["H"] for row in sweep})
        ]
        panels.append((f"{cell}, forward, bfloat16", "T", lines))
    drawn = [charts.panel(title, "times as fast as torch.nn", lines, x) for title, x, lines in panels if lines]
    (out / "gpu.html").write_text(charts.page_of(drawn))
