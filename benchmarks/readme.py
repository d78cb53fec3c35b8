"""README's benchmark section, made from the stored results: `python -m benchmarks.readme` prints it.

With --write it goes between the markers of README.md; with --check the exit status is 1 where README says otherwise.
"""

import argparse
import sys
from pathlib import Path
from typing import Any

from benchmarks import store
from benchmarks.cases import CELLS
from benchmarks.contenders import BASELINE, OURS

ROOT = Path(__file__).parent.parent
BEGIN = "<!-- benchmarks: begin; `python -m benchmarks.readme --write` makes what follows -->"
END = "<!-- benchmarks: end -->"
ROWS = ((OURS, "inference", "forward"), (OURS, "training", "training"), ("onnxruntime", "inference", "forward"))


def full_results() -> list[Path]:
    """The results of every machine, those of runs over a part left out."""
    return sorted(store.RESULTS.glob("*/results.json"))


def section() -> str:
    """Everything between the markers, one part per machine."""
    return "\n\n".join(machine_section(path) for path in full_results())


def machine_section(path: Path) -> str:
    results = store.load(path)
    machine = results["machine"]
    records = store.records_of(results, "sequence-length")
    case = store.case_of(records[0])
    folder = path.parent.relative_to(ROOT).as_posix()
    versions = " ".join(
        f"{name} {machine['versions'][name]}" for name in ("torch", "onnxruntime") if name in machine["versions"]
    )
    return f"""![Times faster than torch.nn against sequence length]({folder}/sequence-length-speedup.png)

How many times faster than `torch.nn`, by sequence length T: {case.dtype}, B={case.B}, I={case.I}, H={case.H}, on
{machine["device"]} with {machine["threads"]} threads, {versions};
commit {machine["commit"]}, {results["started"][:10]}.
`~` stands before what the noise does not tell from even. Everything else: [{folder}/report.html]({folder}/report.html).

{table(records)}"""


def table(records: list[dict[str, Any]]) -> str:
    """Ratios to torch.nn as Markdown: a line per cell, contender and mode, a column per T."""
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
                lines.append(f"| {cell.upper()} {word}, {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def ratio_text(row: dict[str, Any], noise: float | None) -> str:
    mark = "~" if store.verdict(row, noise) == "even" else ""
    return f"{mark}{row['ratio'][0]:.1f}" if row["ratio"][0] >= 10 else f"{mark}{row['ratio'][0]:.2f}"


def parts(readme: str) -> tuple[str, str, str]:
    """README before, between and after the markers. Raises ValueError where they are missing."""
    if BEGIN not in readme or END not in readme:
        raise ValueError(f"README.md lacks the markers\n{BEGIN}\n{END}")
    before, rest = readme.split(BEGIN, 1)
    between, after = rest.split(END, 1)
    return before, between, after


def main(words: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.readme", description=__doc__.splitlines()[0])
    choice = parser.add_mutually_exclusive_group()
    choice.add_argument("--write", action="store_true", help="put the section into README.md")
    choice.add_argument("--check", action="store_true", help="exit 1 where README.md says otherwise")
    arguments = parser.parse_args(words)
    if not (arguments.write or arguments.check):
        print(section())
        return 0
    path = ROOT / "README.md"
    try:
        before, between, after = parts(path.read_text())
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    wanted = f"\n{section()}\n"
    if arguments.write:
        path.write_text(before + BEGIN + wanted + END + after)
    elif between != wanted:
        print("README.md differs from the stored results: run python -m benchmarks.readme --write", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
