"""One HTML page that holds everything: machine facts, tables, plots. It opens without a network and without scripts."""

import html
from pathlib import Path
from string import Template
from typing import Any

from benchmarks import store, tables
from benchmarks.tables import html_table

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
        summary=html_table(tables.MARKS_COLUMNS, tables.marks_rows(tables.marks(results["records"]))),
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
    rows = [row for record in records for row in tables.case_rows(record, results["machine"])]
    drawn = "".join(picture(folder, name) for name in pictures if name.startswith(question))
    noise = sorted(record["noise"] for record in records if record["noise"] is not None)
    said = f"<p>Noise: median {noise[len(noise) // 2]:.1%}, largest {noise[-1]:.1%}.</p>" if noise else ""
    left_out = tables.skips(records)
    said += f"<p>L{html.escape(left_out[1:])}.</p>" if left_out else ""
    table = f'<div class="wide">{html_table(tables.COLUMNS, rows)}</div>'
    folded = f"<details><summary>{len(records)} cases</summary>{table}</details>"
    return f"<h2>{html.escape(question.replace('-', ' ').capitalize())}</h2>{drawn}{said}{folded}"


def picture(folder: Path, name: str) -> str:
    """The SVG itself, without its XML heading."""
    text = (folder / f"{name}.svg").read_text()
    return f"<figure>{text[text.index('<svg') :]}</figure>"
