"""Pieces of the report's page: headings, bars, heat maps and tables, as HTML. The style is in page.html."""

import html
import math

from benchmarks import charts


def heading(title: str, said: str) -> str:
    return f"<h2>{title}</h2><p>{said}</p>"


def bar(name: str, detail: str, share: float, value: str, kind: str = "", mark: tuple[str, float] | None = None) -> str:
    """One bar: share and the mark's place are fractions of the width."""
    peer = f'<u class="{mark[0]}" style="left:{100 * mark[1]:.1f}%"></u>' if mark else ""
    return (
        f'<div class="bar"><div class="who"><b>{html.escape(name)}</b> <span>{html.escape(detail)}</span></div>'
        f'<div class="track"><i class="{kind}" style="width:{100 * share:.1f}%"></i>{peer}</div>'
        f'<div class="value">{value}</div></div>'
    )


def speed_bars(rows: list[charts.Bar], peer: str) -> str:
    """Bars of speeds relative to torch.nn, the fastest first, with a line at 1 and a mark for the peer."""
    most = max(max(row.value, row.peer or 0) for row in rows)
    lines = [
        bar(row.name, row.detail, row.value / most, charts.times(row.value) if row.verdict != "even" else "even",
            row.verdict, (peer, row.peer / most) if row.peer else None)
        for row in rows
    ]  # fmt: skip
    return f'<div class="bars" style="--one:{100 / most:.1f}%">{"".join(lines)}</div>'


def heat_map(title: str, sizes: dict[tuple[int, int], tuple[float, str, float]]) -> str:
    heights, widths = sorted({H for H, _ in sizes}), sorted({B for _, B in sizes})
    lines = []
    for H in heights:
        cells = []
        for B in widths:
            if (H, B) not in sizes:
                cells.append("<td>")
                continue
            ratio, verdict, noise = sizes[H, B]
            share = min(80.0, 22 + 50 * abs(math.log(ratio)))
            said = "even" if verdict == "even" else charts.times(ratio)
            cells.append(
                f'<td class="{verdict}" style="--p:{share:.0f}%" title="{ratio:.2f}, noise {noise:.0%}">{said}'
            )
        lines.append(f"<tr><th>H={H}{''.join(cells)}")
    head = "".join(f"<th>B={B}" for B in widths)
    return f'<table class="map"><caption>{title}</caption><tr><th>{head}{"".join(lines)}</table>'


def table(columns: tuple[str, ...], rows: list[list[str]], sortable: bool = True) -> str:
    """A table. Columns whose names begin with `_` hold words, left-aligned; a short row's last cell spans the rest."""
    words = [name.startswith("_") for name in columns]
    head = "".join(
        f"<th{' class=w' if word else ''}>{html.escape(name.lstrip('_'))}"
        for name, word in zip(columns, words, strict=True)
    )
    lines = []
    for row in rows:
        cells = [f"<td{' class=w' if word else ''}>{html.escape(cell)}" for cell, word in zip(row, words, strict=False)]
        if len(row) < len(columns):
            cells[-1] = f'<td class="w" colspan="{len(columns) - len(row) + 1}">{html.escape(row[-1])}'
        lines.append(f"<tr>{''.join(cells)}")
    kind = "data sort" if sortable else "data"
    return f'<div class="wide"><table class="{kind}"><thead><tr>{head}<tbody>{chr(10).join(lines)}</table></div>'
