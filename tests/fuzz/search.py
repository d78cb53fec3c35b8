"""Draws, checks, and makes what fails smaller."""

import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random
from typing import Any, NamedTuple

import rnnfast
from tests.fuzz import actions, cases, declared, layers, streams

ROOT = Path(__file__).parents[2]


class Kind(NamedTuple):
    """What can be drawn: its module, how to draw, check and simplify it, and the expression that makes it."""

    module: str
    draw: Callable[[Random], Any]
    check: Callable[..., str | None]
    simpler: Callable[[Any], Iterator[Any]]


def shorter(drawn: tuple[int, list]) -> Iterator[tuple[int, list]]:
    """Yield sequences with fewer actions, halves first."""
    seed, done = drawn
    for length in (len(done) // 2, len(done) // 4, 1):
        for start in range(0, len(done), max(length, 1)):
            less = done[:start] + done[start + max(length, 1) :]
            if less:
                yield seed, less


KINDS = {
    "layers": Kind("layers", lambda random: (cases.draw(random),), layers.check, lambda drawn: simpler_case(*drawn)),
    "declared": Kind("declared", declared.draw, declared.check, lambda drawn: declared.simpler(*drawn)),
    "actions": Kind("actions", actions.draw, actions.check, shorter),
    "streams": Kind("streams", streams.draw, streams.check, shorter),
}


def simpler_case(case: cases.Case) -> Iterator[tuple[cases.Case]]:
    """Yield simpler cases."""
    return ((each,) for each in cases.simpler(case))


def draw(kind: str, seed: int) -> Any:
    """Draw number `seed` of a kind."""
    return KINDS[kind].draw(Random(f"{kind} {seed}"))


def check(kind: str, drawn: Any, backend: str = "auto") -> str | None:
    """Say what is wrong with what was drawn, or None."""
    with rnnfast.use_backend(backend):
        return KINDS[kind].check(*drawn)


def check_alone(kind: str, drawn: Any, backend: str = "auto") -> str | None:
    """Check in a process of its own, which may crash."""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", script(kind, drawn, backend)], cwd=ROOT, capture_output=True, text=True
    )
    return None if done.returncode == 0 else done.stdout.strip() or f"exit status {done.returncode}\n{done.stderr}"


def smallest(drawn: Any, simpler: Callable[[Any], Iterator[Any]], fails: Callable[[Any], bool], seconds: float) -> Any:
    """Return the simplest that still fails, found by one simplification after another within some seconds."""
    until, found, seen = time.monotonic() + seconds, True, [drawn]
    while found:
        found = False
        for each in simpler(drawn):
            if time.monotonic() > until:
                return drawn
            if each in seen:
                continue
            seen.append(each)
            if fails(each):
                drawn, found = each, True
                break
    return drawn


def script(kind: str, drawn: Any, backend: str = "auto") -> str:
    """Return a script that checks what was drawn."""
    lines = [
        "import rnnfast",
        {"layers": "from tests.fuzz.cases import Case", "declared": "from tests.fuzz.declared import Case"}.get(kind),
        f"from tests.fuzz.{kind} import check",
        f"with rnnfast.use_backend({backend!r}):",
        f"    problem = check({', '.join(map(repr, drawn))})",
        "print(problem or '')",
        "raise SystemExit(problem is not None)",
    ]
    return "\n".join(filter(None, lines))


def search(kinds: list[str], seeds: Iterator[int], until: float, backend: str, mark: Path | None = None) -> int:
    """Check one after another until a time, print the smallest script of each failure, and return their number."""
    failures = count = 0
    for seed in seeds:
        kind = kinds[seed % len(kinds)]
        if time.monotonic() > until:
            break
        if mark is not None:
            mark.write_text(f"{seed}")
        drawn = draw(kind, seed)
        problem = check(kind, drawn, backend)
        count += 1
        if problem is not None:
            failures += 1
            report(kind, drawn, seed, backend, alone=False)
    print(f"{count} checked, {failures} failed", flush=True)
    return failures


def report(kind: str, drawn: Any, seed: int, backend: str, alone: bool) -> None:
    """Print the smallest script that fails as this does."""
    checked = check_alone if alone else check
    first = checked(kind, drawn, backend) or ""

    def alike(each) -> bool:
        problem = checked(kind, each, backend)
        return problem is not None and ("Error" in problem) == ("Error" in first)

    drawn = smallest(drawn, KINDS[kind].simpler, alike, 120)
    problem = check_alone(kind, drawn, backend) or f"only after other checks: {check(kind, drawn, backend)}"
    print(f"\n# seed {seed}: {problem}\n{script(kind, drawn, backend)}\n", flush=True)


def search_apart(kinds: list[str], seed: int, seconds: float, backend: str) -> int:
    """Search in another process, and go on in a new one where it crashes."""
    failures, until = 0, time.monotonic() + seconds
    with tempfile.TemporaryDirectory() as folder:
        mark = Path(folder) / "seed"
        while True:
            left = until - time.monotonic()
            command = [sys.executable, "-W", "ignore", "-m", "tests.fuzz", "--mark", str(mark), "--backend", backend]
            command += ["--seed", str(seed), "--seconds", str(left), "--kinds", *kinds]
            status = subprocess.run(command, cwd=ROOT).returncode
            if status in (0, 1):
                return failures + status
            failures, seed = failures + 1, int(mark.read_text())
            kind = kinds[seed % len(kinds)]
            print(f"\n# exit status {status}", flush=True)
            report(kind, draw(kind, seed), seed, backend, alone=True)
            seed += 1
