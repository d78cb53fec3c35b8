"""The stored results of one run: a JSON file that everything after the measurement reads.

    {"schema", "started", "finished", "command", "complete", "machine": {...}, "skipped": {contender: why},
     "startup": [{"what", "ms"}], "records": [{"question", "case", "noise", "rows": [{"contender", "status", ...}]}]}

A row that is `ok` has ms and ratio as [median, 20th, 80th percentile], error and the tensor it is worst in, rounds,
first_ms, and after training saved and peak in bytes. Other rows have a reason: skipped, wrong, crashed.
"""

import json
import os
from pathlib import Path
from typing import Any

from benchmarks.cases import Case, operations, traffic

SCHEMA = 1
RESULTS = Path(__file__).parent / "results"


def save(path: Path, results: dict[str, Any]) -> None:
    """Write the file in one step, one line per row, so that an interruption leaves the old or the new one whole."""
    head = {key: value for key, value in results.items() if key != "records"}
    text = (
        json.dumps(head, indent=1)[:-2]
        + ',\n "records": ['
        + ",".join(map(record_lines, results["records"]))
        + "\n]}\n"
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_suffix(".part")
    draft.write_text(text)
    os.replace(draft, path)


def record_lines(record: dict[str, Any]) -> str:
    head = json.dumps({key: value for key, value in record.items() if key != "rows"})
    return f'\n{head[:-1]}, "rows": [\n' + ",\n".join("  " + json.dumps(row) for row in record["rows"]) + "]}"


def load(path: str | Path) -> dict[str, Any]:
    """Read a results file. Raises ValueError where it is none."""
    try:
        results = json.loads(Path(path).read_text())
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} is no results file: {error}") from None
    if not isinstance(results, dict) or results.get("schema") != SCHEMA:
        raise ValueError(f"{path} is no results file of schema {SCHEMA}")
    return results


def case_of(record: dict[str, Any]) -> Case:
    return Case(**record["case"])


def ok_rows(record: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The rows that were timed, by contender."""
    return {row["contender"]: row for row in record["rows"] if row["status"] == "ok"}


def records_of(results: dict[str, Any], question: str) -> list[dict[str, Any]]:
    return [record for record in results["records"] if record["question"] == question]


def questions_of(results: dict[str, Any]) -> list[str]:
    return list(dict.fromkeys(record["question"] for record in results["records"]))


def floor_ms(case: Case, machine: dict[str, Any]) -> float | None:
    """The least time this machine needs: operations at its GEMM rate or bytes at its bandwidth, whichever is more.

    The bandwidth is that of a copy of the next larger size measured, since small cases stay in a cache.
    """
    rate = machine["gemm_flops"].get(case.dtype)
    if rate is None:
        return None
    moved = traffic(case)
    copies = {int(size): rate for size, rate in machine["bandwidth"].items()}
    size = min((size for size in copies if size >= moved), default=max(copies))
    return 1e3 * max(operations(case) / rate, moved / copies[size])


def limits_text(machine: dict[str, Any]) -> str:
    """The measured limits in one line."""
    rates = [f"{dtype} {rate / 1e9:.0f} GFLOP/s" for dtype, rate in machine["gemm_flops"].items()]
    copies = [f"{int(size) / 2**20:g} MB at {rate / 1e9:.1f} GB/s" for size, rate in machine["bandwidth"].items()]
    return f"large product {', '.join(rates)}; copy of {', '.join(copies)}"


def verdict(row: dict[str, Any], noise: float | None) -> str:
    """`faster`, `slower` or `even` beside the baseline: no difference inside the noise is one."""
    ratio = row["ratio"][0]
    margin = 1 + (noise or 0.0)
    return "faster" if ratio > margin else "slower" if ratio < 1 / margin else "even"
