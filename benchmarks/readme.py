"""The benchmark results in README.md and docs/benchmarks.md, made from what is stored: `python -m benchmarks.readme`.

README gets one sentence per machine, docs/benchmarks.md the tables. With --write they go between the markers of both
files; with --check the exit status is 1 where a file says otherwise.
"""

import argparse
import statistics
import sys
import textwrap
from pathlib import Path
from typing import Any

from benchmarks import page, store
from benchmarks.cases import CELLS, Case
from benchmarks.contenders import BASELINE, OURS

ROOT = Path(__file__).parent.parent
BEGIN = "<!-- benchmarks: begin; `python -m benchmarks.readme --write` makes what follows -->"
END = "<!-- benchmarks: end -->"
PEER = "onnxruntime"
ROWS = ((OURS, "inference", "forward"), (OURS, "training", "training"), (PEER, "inference", "forward"))
VERSIONS = {"torch": "torch", PEER: "ONNX Runtime"}


def summary() -> str:
    """README's sentences: one per machine on which the layers of published models were timed."""
    every = [store.load(path) for path in page.stored()]
    first, *others = [results for results in every if store.records_of(results, "real-layers")]
    count, least, most, mean = speeds(first)
    said = [
        f"In {count} cases from published models, rnnfast runs {least:.1f} to {most:.1f} times as fast as `torch.nn`; "
        f"the geometric mean is {mean:.1f} ({conditions(first)})."
    ]
    for results in others:
        _, least, most, mean = speeds(results)
        said.append(f"{conditions(results)}: {least:.1f} to {most:.1f} times as fast, geometric mean {mean:.1f}.")
    text = " ".join([*said, "[Benchmarks](docs/benchmarks.md) has every case."])
    return textwrap.fill(text, 120, break_long_words=False, break_on_hyphens=False)


def speeds(results: dict[str, Any]) -> tuple[int, float, float, float]:
    """How many times as fast as torch.nn layers of published models are: cases, least, most and geometric mean."""
    rows = (store.ok_rows(record).get(OURS, {}) for record in store.records_of(results, "real-layers"))
    ratios = [row["ratio"][0] for row in rows if "ratio" in row]
    return len(ratios), min(ratios), max(ratios), statistics.geometric_mean(ratios)


def conditions(results: dict[str, Any]) -> str:
    """Say where and when results were taken."""
    machine = results["machine"]
    versions = [f"{name} {machine['versions'][key]}" for key, name in VERSIONS.items() if key in machine["versions"]]
    threads = f"{machine['threads']} thread{'s' * (machine['threads'] > 1)}"
    return ", ".join([machine["device"], threads, *versions, results["started"][:10]])


def tables() -> str:
    """The tables of docs/benchmarks.md, one part per run that has some; others have their page alone."""
    return "\n\n".join(filter(None, map(machine_tables, page.stored())))


def machine_tables(path: Path) -> str:
    results = store.load(path)
    report = f"{path.parent.relative_to(ROOT).as_posix()}/report.html"
    told = [
        f"### {results['machine']['device']}",
        f"Conditions: {conditions(results)}, commit {results['machine']['commit']}. All results of this run, with\n"
        f"plots, are in `{report}`.",
    ]
    if real := store.records_of(results, "real-layers"):
        told += ["Speed relative to `torch.nn`, layers of published models:", model_table(real)]
    if by_length := store.records_of(results, "sequence-length"):
        case = store.case_of(by_length[0])
        sizes = f"{case.dtype}, B={case.B}, I={case.I}, H={case.H}"
        told += [f"Speed relative to `torch.nn` by sequence length T, {sizes}:", length_table(by_length)]
    return "\n\n".join(told) if len(told) > 2 else ""


def model_table(records: list[dict[str, Any]]) -> str:
    """A line per layer of a published model: what is run, and the speed of rnnfast and of its peer."""
    lines = [f"| model | rnnfast | {VERSIONS[PEER]} | mode | layer |", "|---|---:|---:|---|---|"]
    for record in records:
        case, rows = store.case_of(record), store.ok_rows(record)
        ratios = [ratio_text(rows[name], record["noise"]) if name in rows else "" for name in (OURS, PEER)]
        lines.append(f"| {case.label} | {' | '.join(ratios)} | {case.mode} | {layer_text(case)} |")
    return "\n".join(lines)


def layer_text(case: Case) -> str:
    """Name a case's cell, its sizes and what else sets it apart; the sizes stay on one line."""
    sizes = case.sizes.replace(" ", "\N{NO-BREAK SPACE}")
    return ", ".join(filter(None, (case.cell.upper(), sizes, case.extras)))


def length_table(records: list[dict[str, Any]]) -> str:
    """A line per cell, contender and mode, a column per T."""
    ratios: dict[tuple[str, str, str, int], str] = {}
    for record in records:
        case = store.case_of(record)
        for name, row in store.ok_rows(record).items():
            if name != BASELINE and "ratio" in row:
                ratios[case.cell, name, case.mode, case.T] = ratio_text(row, record["noise"])
    lengths = sorted({key[3] for key in ratios})
    lines = ["| T | " + " | ".join(map(str, lengths)) + " |", "|---|" + "---:|" * len(lengths)]
    for cell in CELLS:
        for name, mode, word in ROWS:
            cells = [ratios.get((cell, name, mode, length), "") for length in lengths]
            if any(cells):
                lines.append(f"| {cell.upper()} {word}, {VERSIONS.get(name, name)} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def ratio_text(row: dict[str, Any], noise: float | None) -> str:
    mark = "~" if store.verdict(row, noise) == "even" else ""
    return f"{mark}{row['ratio'][0]:.1f}" if row["ratio"][0] >= 10 else f"{mark}{row['ratio'][0]:.2f}"


SECTIONS = {"README.md": summary, "docs/benchmarks.md": tables}


def parts(name: str, text: str) -> tuple[str, str, str]:
    """A page before, between and after the markers. Raises ValueError where they are missing."""
    if BEGIN not in text or END not in text:
        raise ValueError(f"{name} lacks the markers\n{BEGIN}\n{END}")
    before, rest = text.split(BEGIN, 1)
    between, after = rest.split(END, 1)
    return before, between, after


def main(words: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.readme", description=__doc__.splitlines()[0])
    choice = parser.add_mutually_exclusive_group()
    choice.add_argument("--write", action="store_true", help="put the results into both files")
    choice.add_argument("--check", action="store_true", help="exit 1 where a file says otherwise")
    arguments = parser.parse_args(words)
    stale = []
    for name, section in SECTIONS.items():
        if not (arguments.write or arguments.check):
            print(f"{name}\n\n{section()}\n")
            continue
        path, wanted = ROOT / name, f"\n{section()}\n"
        try:
            before, between, after = parts(name, path.read_text())
        except ValueError as error:
            print(error, file=sys.stderr)
            return 2
        if arguments.write:
            path.write_text(before + BEGIN + wanted + END + after)
        elif between != wanted:
            stale.append(name)
    if stale:
        command = "python -m benchmarks.readme --write"
        print(f"{', '.join(stale)}: not what the stored results give; run {command}", file=sys.stderr)
    return 1 if stale else 0


if __name__ == "__main__":
    sys.exit(main())
