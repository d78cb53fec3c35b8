"""What a call of `benchmarks.gpu` found: a table of twenty lines, and a picture.

python3 -m benchmarks.gpu_report FOLDER    draw FOLDER/rows.jsonl as FOLDER/gpu.png
"""

import itertools
import json
import sys
from collections.abc import Sequence
from pathlib import Path

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


def geometric(values: Sequence[float]) -> float:
    product = 1.0
    for value in values:
        product *= value ** (1 / len(values))
    return product


def table(stages: Sequence[str], failures: Sequence[str], out: Path, drawn: str) -> list[str]:
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
            f"{len(grid)} of grid, times torch: forward {geometric(forward):.2f}, worst {min(forward):.2f}; training "
            f"{geometric(training):.2f}, worst {min(training):.2f}; without cuDNN {without}"
        )
    plans = good(rows, "plans")
    if plans:
        off = [row["us"] / row["predicted"] for row in plans if row["us"] > 0]
        measured.append(
            f"{len(plans)} plans, measured over predicted: {min(off, default=0):.2f} to {max(off, default=0):.2f}"
        )
    for row in good(rows, "probe")[-1:]:
        costs = (f"{name} {row[name]:.2f}" for name in ("counter", "polled", "polled, fence"))
        measured.append(f"exchange of {row['members']} programs, us: {', '.join(costs)}")
    facts = next(iter(rows), {})
    measured.append(
        f"{facts.get('device')}, torch {facts.get('torch')}, Triton {facts.get('triton')}, {len(rows)} rows, "
        f"picture {drawn}, {out}"
    )
    return [line[:WIDTH] for line in [*lines, *measured][-LINES:]]


def draw(out: Path) -> None:
    """How many times as fast as torch.nn: by H for each cell, forward and training, and by T."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows = read(out)
    grid, sweep = good(rows, "grid"), good(rows, "sweep")
    figure, axes = plt.subplots(3, 3, figsize=(14, 12), squeeze=False)

    def curve(place, label: str, points: list[tuple[int, float]]) -> None:
        if points:
            place.plot([x for x, _ in points], [y for _, y in points], "o-", lw=1, label=label)

    for line, cell in zip(axes, ("lstm", "gru", "rnn"), strict=True):
        for place, way in zip(line, ("forward", "training"), strict=False):
            for dtype, B in itertools.product(("bfloat16", "float16", "float32"), (1, 16, 64)):
                own = [row for row in grid if (row["cell"], row["dtype"], row["B"]) == (cell, dtype, B)]
                curve(place, f"{dtype} B={B}", sorted((row["H"], times(row, way)) for row in own))
            place.set(title=f"{cell}, {way}, by H")
        for H in sorted({row["H"] for row in sweep}):
            own = [row for row in sweep if (row["cell"], row["H"]) == (cell, H)]
            curve(line[2], f"bfloat16 H={H}", sorted((row["T"], times(row, "forward")) for row in own))
        line[2].set(title=f"{cell}, forward, by T")
        for place in line:
            if place.lines:
                place.set(xscale="log", yscale="log", ylabel="times as fast as torch.nn")
                place.legend(fontsize=6)
            place.axhline(1, color="black", lw=0.5)
    figure.tight_layout()
    figure.savefig(out / "gpu.png", dpi=100)


if __name__ == "__main__":
    draw(Path(sys.argv[1]))
