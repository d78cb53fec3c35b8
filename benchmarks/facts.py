"""From a measured grid to the sizes at which `auto` leaves a call to torch: the rows of rnnfast/backends/slower.py.

A row is a size at which the CPU kernels run at less than 0.95 of torch.nn's speed, beyond the noise.
"""

import math
from pathlib import Path
from typing import Any

from benchmarks import store
from benchmarks.contenders import OURS

FILE = Path(__file__).parent.parent / "rnnfast" / "backends" / "slower.py"
HEAD = '''"""Where torch was faster than the CPU kernels (see `measured`), as `python -m benchmarks --facts` found.

By instructions: where and when it was measured; cell, pass, ranges of T, B and H, and torch's time over the kernels'.
"""

Range = tuple[int, int]

MEASURED: dict[str, tuple[str, tuple[tuple[str, str, Range, Range, Range, float], ...]]] = {
'''
SLOW = 0.95
# With more than this nothing is known of a size.
MOST_NOISE = 0.1
AXES = {"T": (1, 2, 4, 16), "B": (1, 4, 16, 64), "H": (32, 64, 128, 256, 400, 640, 1024)}
PASSES = {"inference": "forward", "training": "training"}


def is_slow(record: dict[str, Any]) -> bool:
    ours = store.ok_rows(record).get(f"{OURS}:numba")
    if ours is None or "ratio" not in ours or record["noise"] > MOST_NOISE:
        return False
    middle, _, high = ours["ratio"]
    return round(middle, 2) < SLOW and high < 1


def span(size: int, sizes: tuple[int, ...]) -> tuple[int, int]:
    """The sizes for which a size of the grid speaks: to halfway to its neighbours, in the logarithm."""
    place = sizes.index(size)
    below = size / sizes[place - 1] if place else sizes[1] / size
    above = sizes[place + 1] / size if place + 1 < len(sizes) else below
    return max(1, math.floor(size / math.sqrt(below)) + 1), math.floor(size * math.sqrt(above))


def row(record: dict[str, Any]) -> tuple:
    case = store.case_of(record)
    ranges = (span(getattr(case, axis), sizes) for axis, sizes in AXES.items())
    return (case.cell, PASSES[case.mode], *ranges, round(store.ok_rows(record)[f"{OURS}:numba"]["ratio"][0], 2))


def write(results: dict[str, Any], instructions: str, file: Path = FILE) -> int:
    """Replace what the file says of these instructions; return the number of their rows."""
    machine = results["machine"]
    where = f"{machine['device']}, {machine['threads']} threads, torch {machine['versions']['torch']}"
    slow = sorted(row(record) for record in results["records"] if is_slow(record))
    found: dict[str, Any] = {}
    exec(file.read_text(), found)
    measured = found["MEASURED"] | {instructions: (f"{where}, {results['started'][:10]}", tuple(slow))}
    parts = [part(name, *measured[name]) for name in sorted(measured)]
    file.write_text(HEAD + "".join(parts) + "}\n")
    return len(slow)


def part(instructions: str, where: str, rows: tuple[tuple, ...]) -> str:
    """One entry, as the formatter has it."""
    lines = [f"            ({', '.join(map(literal, each))}),\n" for each in rows]
    listed = f"(\n{''.join(lines)}        )" if lines else "()"
    return f'    "{instructions}": (\n        "{where}",\n        {listed},\n    ),\n'


def literal(value: object) -> str:
    return f'"{value}"' if isinstance(value, str) else repr(value)
