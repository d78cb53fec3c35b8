"""Two stored results side by side: what got faster or slower beyond the noise of both.

A contender is judged by its ratio to torch.nn in the same round, which leaves out what befell the whole machine between
the two runs; by its time where there is no ratio. A regression is a slowdown of ours, or a case that no longer works.
"""

from typing import Any, NamedTuple

from benchmarks import report, store
from benchmarks.contenders import BASELINE, OURS

# No change smaller than this counts, however quiet the two runs were: another layout of the same code can make it.
LEAST_MARGIN = 0.05


class Change(NamedTuple):
    question: str
    case: str
    contender: str
    speed: float  # new speed over old speed; 0 where it no longer works
    text: str

    @property
    def is_regression(self) -> bool:
        return self.speed < 1 and self.contender.startswith(OURS)


def show(before: str, after: str) -> int:
    """Print what changed from one file to the other; 1 on a regression. Raises ValueError where a file is none."""
    old, new = store.load(before), store.load(after)
    found, cases = changes(old, new)
    if not cases:
        raise ValueError(f"{before} and {after} have no case in common")
    for results, path in ((old, before), (new, after)):
        machine = results["machine"]
        print(f"{path}: {machine['device']}, {machine['threads']} threads, commit {machine['commit']}")
    if old["machine"]["device"] != new["machine"]["device"]:
        print("these are different machines: the ratios to torch are compared, but they need not agree")
    for change in sorted(found, key=lambda change: change.speed):
        word = "slower" if change.speed < 1 else "faster"
        print(f"  {word}  {change.contender:<16} {change.text:<28} {change.question}: {change.case}")
    regressions = sum(change.is_regression for change in found)
    print(f"{cases} cases in common, {len(found)} changes beyond the noise, {regressions} regressions of {OURS}")
    return 1 if regressions else 0


def changes(old: dict[str, Any], new: dict[str, Any]) -> tuple[list[Change], int]:
    """Every change beyond the noise, and the number of cases in common."""
    before = {key(record): record for record in old["records"]}
    common = [(before[key(record)], record) for record in new["records"] if key(record) in before]
    found = [change for first, second in common for change in record_changes(first, second)]
    return found, len(common)


def key(record: dict[str, Any]) -> tuple[str, str]:
    return record["question"], store.case_of(record).id


def record_changes(old: dict[str, Any], new: dict[str, Any]) -> list[Change]:
    margin = 1 + max(LEAST_MARGIN, (old["noise"] or 0.0) + (new["noise"] or 0.0))
    now = {row["contender"]: row for row in new["rows"]}
    found = []
    for name, row in store.ok_rows(old).items():
        if name == BASELINE or name not in now:
            continue
        later = now[name]
        if later["status"] != "ok":
            found.append(Change(*key(new), name, 0.0, f"now {later['status']}: {later['reason']}"))
            continue
        speed, text = speed_change(row, later)
        if not 1 / margin <= speed <= margin:
            found.append(Change(*key(new), name, speed, text))
    return found


def speed_change(old: dict[str, Any], new: dict[str, Any]) -> tuple[float, str]:
    if "ratio" in old and "ratio" in new:
        return new["ratio"][0] / old["ratio"][0], f"{old['ratio'][0]:.2f} to {new['ratio'][0]:.2f} x torch"
    return old["ms"][0] / new["ms"][0], f"{report.number(old['ms'][0])} to {report.number(new['ms'][0])} ms"
