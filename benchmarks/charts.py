"""Pictures as SVG text: panels of lines for the report, bars for README. Colours are CSS variables of the page.

A picture needs no library and no script, and follows the reader's light or dark mode where the page sets the variables.
"""

import html
import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple

# Okabe and Ito's colours, which colour-blind readers tell apart; torch in grey, as the measure of the others.
LIGHT = {
    "paper": "#ffffff", "ink": "#1b1f24", "soft": "#59636e", "grid": "#d8dee4", "torch": "#6e7781",
    "rnnfast": "#d55e00", "onnxruntime": "#0072b2", "jax": "#009e73", "torch-compile": "#b5549a", "numpy": "#8c6d1f",
    "faster": "#2da44e", "slower": "#d1242f", "even": "#8c959f",
}  # fmt: skip
DARK = LIGHT | {
    "paper": "#0d1117", "ink": "#e6edf3", "soft": "#9aa4af", "grid": "#30363d", "torch": "#9aa4af",
    "rnnfast": "#f0883e", "onnxruntime": "#58a6ff", "jax": "#3fb950", "torch-compile": "#db8fc8", "numpy": "#d2a93c",
}  # fmt: skip
OTHERS = ("rnnfast", "onnxruntime", "jax", "torch-compile", "numpy")
FONT = "system-ui, 'Segoe UI', Roboto, Helvetica, Arial, sans-serif"


def css(theme: dict[str, str]) -> str:
    """The theme as declarations of CSS variables."""
    return ";".join(f"--{name}:{colour}" for name, colour in theme.items())


def colour(name: str, place: int = 0) -> str:
    """The CSS variable of a contender; of what is none, one by its place."""
    return f"var(--{name if name in LIGHT else OTHERS[place % len(OTHERS)]})"


class Line(NamedTuple):
    name: str
    points: list[tuple[float, float]]


def short(value: float) -> str:
    """A tick's number: 0.5, 20, 1.5k."""
    if value >= 1e4:
        return f"{value / 1e3:g}k"
    return f"{value:g}" if value >= 1e-3 else f"{value:.0e}".replace("e-0", "e-")


def times(ratio: float) -> str:
    """A ratio with its sign: one decimal, two below 1.1."""
    return f"{ratio:.2f}\N{MULTIPLICATION SIGN}" if ratio < 1.095 else f"{ratio:.1f}\N{MULTIPLICATION SIGN}"


def log_ticks(low: float, high: float) -> list[float]:
    """Two to five round numbers between the bounds."""
    for steps in ((1, 1.5, 2, 3, 4, 5, 7), (1, 2, 5), (1, 3), (1,)):
        powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
        ticks = [step * 10.0**power for power in powers for step in steps]
        inside = [tick for tick in ticks if low * 0.999 <= tick <= high * 1.001]
        if len(inside) <= 5:
            break
    return inside


def spread_out(places: Sequence[float], distance: float, low: float, high: float) -> list[float]:
    """Move labels, given from top to bottom, apart by `distance` at least, within the bounds."""
    moved: list[float] = []
    for place in places:
        moved.append(max(place, moved[-1] + distance) if moved else max(place, low))
    over = max(0.0, moved[-1] - high) if moved else 0.0
    for n in reversed(range(len(moved))):
        limit = high - distance * (len(moved) - 1 - n)
        moved[n] = min(moved[n], limit) if over else moved[n]
    return moved


def panel(title: str, unit: str, lines: Iterable[Line], x_name: str = "T", width: int = 358, height: int = 225) -> str:
    """Lines over logarithmic axes, each named at its end."""
    lines = [line for line in lines if line.points]
    left, right, top, bottom = 44, 106, 40, 30
    xs = sorted({x for line in lines for x, _ in line.points})
    ys = [y for line in lines for _, y in line.points]
    low, high = min(ys), max(ys)
    low, high = (low / 1.5, high * 1.5) if high < 2 * low else (low / 1.12, high * 1.12)

    def place_x(x: float) -> float:
        span = math.log(xs[-1] / xs[0]) or 1.0
        return left + (width - left - right) * math.log(x / xs[0]) / span

    def place_y(y: float) -> float:
        return top + (height - top - bottom) * (1 - math.log(y / low) / math.log(high / low))

    parts = [text(0, 12, title, "t"), text(0, 27, unit, "s")]
    for tick in log_ticks(low, high):
        y = place_y(tick)
        parts.append(f'<path class="g" d="M{left} {y:.1f}H{width - right}"/>')
        parts.append(text(left - 5, y + 4, short(tick), "s", "end"))
    shown = xs if len(xs) < 6 else xs[:: math.ceil(len(xs) / 5)]
    parts += [text(place_x(x), height - bottom + 15, short(x), "s", "middle") for x in shown]
    parts.append(text(width - right + 8, height - bottom + 15, x_name, "s"))
    ends = sorted(lines, key=lambda line: place_y(line.points[-1][1]))
    labels = spread_out([place_y(line.points[-1][1]) for line in ends], 13, top + 6, height - bottom)
    for line, label in zip(ends, labels, strict=True):
        own = colour(line.name, lines.index(line))
        path = "L".join(f"{place_x(x):.1f} {place_y(y):.1f}" for x, y in line.points)
        thick = 2.4 if line.name.startswith("rnnfast") else 1.5
        parts.append(f'<path d="M{path}" fill="none" stroke="{own}" stroke-width="{thick}"/>')
        parts += [f'<circle cx="{place_x(x):.1f}" cy="{place_y(y):.1f}" r="2.2" fill="{own}"/>' for x, y in line.points]
        parts.append(text(width - right + 7, label + 4, line.name, "n", colour=own))
    return svg(width, height, "".join(parts), f"{title}, {unit}, by {x_name}")


def text(x: float, y: float, said: str, kind: str, anchor: str = "", colour: str = "") -> str:
    """Text of a class: t title, s small, n name."""
    more = f' text-anchor="{anchor}"' if anchor else ""
    more += f' fill="{colour}"' if colour else ""
    return f'<text class="{kind}" x="{x:.1f}" y="{y:.1f}"{more}>{html.escape(said)}</text>'


def svg(width: int, height: int, inner: str, label: str) -> str:
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" role="img"'
    return f'{head} aria-label="{html.escape(label)}">{inner}</svg>'


STYLE = (
    f"text{{font:12px {FONT};fill:var(--ink)}}.t,.n{{font-weight:600}}.s{{font-size:11px;fill:var(--soft)}}"
    ".g{stroke:var(--grid)}svg{width:22rem}"
)


def page_of(pictures: Iterable[str]) -> str:
    """A plain page of pictures."""
    return f"<!doctype html><style>body{{{css(LIGHT)}}}{STYLE}</style>{''.join(pictures)}\n"


class Bar(NamedTuple):
    """name: who runs the layer. detail: which layer. value: times as fast as torch. verdict: faster, even, slower."""

    name: str
    detail: str
    value: float
    verdict: str
    peer: float | None


def bars(rows: Sequence[Bar], title: str, notes: Sequence[str], theme: dict[str, str]) -> str:
    """A picture of its own: a bar for each row, a mark for the peer, a line at torch's speed."""
    width, row_height, left, top = 680, 27, 350, 66
    most = max(max(row.value, row.peer or 0) for row in rows)
    scale = (width - left - 52) / most
    height = top + row_height * len(rows) + 16 + 17 * len(notes)
    one = left + scale
    rule = (
        f"text{{font:13px {FONT};fill:var(--ink)}}.s{{font-size:12px;fill:var(--soft)}}"
        ".t{font-size:16px;font-weight:600}.v{font-weight:600}"
    )
    parts = [
        f"<style>svg{{{css(theme)}}}{rule}</style>",
        f'<rect width="{width}" height="{height}" fill="var(--paper)"/>',
    ]
    parts += [text(8, 24, title, "t"), text(one, top - 8, "torch.nn = 1", "s", "middle")]
    for n, row in enumerate(rows):
        y = top + n * row_height
        fill = "var(--even)" if row.verdict == "even" else "var(--rnnfast)"
        parts.append(text(8, y + 17, row.name, "n"))
        parts.append(text(left - 8, y + 17, row.detail, "s", "end"))
        parts.append(f'<rect x="{left}" y="{y + 4}" width="{row.value * scale:.1f}" height="17" rx="2" fill="{fill}"/>')
        if row.peer:
            x = left + row.peer * scale
            parts.append(f'<path d="M{x:.1f} {y + 1}v23" stroke="var(--onnxruntime)" stroke-width="4"/>')
        end = left + max(row.value, row.peer or 0) * scale
        parts.append(text(end + 7, y + 17, "even" if row.verdict == "even" else times(row.value), "v"))
    parts.append(
        f'<path d="M{one:.1f} {top}V{top + row_height * len(rows)}" stroke="var(--ink)" stroke-dasharray="3 3"/>'
    )
    for n, note in enumerate(notes):
        parts.append(text(8, top + row_height * len(rows) + 22 + 17 * n, note, "s"))
    return svg(width, height, "".join(parts), title) + "\n"
