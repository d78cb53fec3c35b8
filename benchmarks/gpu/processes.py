"""Processes that end in time, and what became of the tests that they ran."""

import contextlib
import os
import signal
import subprocess
import sys
import time
import xml.etree.ElementTree as ElementTree
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parent.parent.parent
# What processes may take to end in order once they are told to, and again to be gone once they are killed.
GRACE_SECONDS = 3
# Less is not worth the start of another process.
LEAST_SECONDS = 12


def run_all(
    commands: Sequence[Sequence[str]], seconds: float, logs: Sequence[Path], environment: dict[str, str]
) -> list[str]:
    """Run Python modules side by side, with the repository on their path; say how each ended.

    At the end of their time they are asked to end, then they and all that they have started are killed. One that even
    then does not go, as it waits for a device that does not answer, is left behind.
    """
    paths = [str(ROOT), str(ROOT / "kernels"), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "PYTHONUNBUFFERED": "1", **environment}
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
    end = time.monotonic() + seconds
    running = []
    for words, log in zip(commands, logs, strict=True):
        with log.open("a") as file:
            command = [sys.executable, "-m", *words]
            running.append(
                subprocess.Popen(command, cwd=ROOT, env=environment, stdout=file, stderr=file, start_new_session=True)
            )
    wait_until(running, end)
    states = [ended(process) or f"stopped after {seconds:.0f} s" for process in running]
    tell(running, signal.SIGTERM)
    wait_until(running, time.monotonic() + GRACE_SECONDS)
    # Also where it has ended: what it started may not have.
    for process in running:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    wait_until(running, time.monotonic() + GRACE_SECONDS)
    left = (", does not end" if process.poll() is None else "" for process in running)
    return [state + more for state, more in zip(states, left, strict=True)]


class Progress:
    """How many cases this process and those before it have begun: a file that is there until all are done."""

    def __init__(self) -> None:
        self.path: Path | None = None
        self.count = self.before = 0

    def follow(self, path: Path) -> None:
        self.path, self.before = path, int(path.read_text()) if path.exists() else 0

    def begin(self, case: object) -> bool:
        """Note the next case; False where a process before this one has begun it, and perhaps ended at it."""
        self.count += 1
        if self.count == self.before:
            print("TROUBLE a process ended at", str(case)[:150], flush=True)
        if self.count > self.before and self.path is not None:
            self.path.write_text(str(self.count))
        return self.count > self.before

    def end(self) -> None:
        if self.path is not None:
            self.path.unlink(missing_ok=True)


def run_on(
    commands: Sequence[Sequence[str]],
    seconds: float,
    logs: Sequence[Path],
    environment: dict[str, str],
    progress: Sequence[Path],
) -> list[str]:
    """As `run_all`; while time is left, processes that ended within a case are followed by others.

    A process has its file of `progress` (`Progress`) from its first case to its end.
    """
    end = time.monotonic() + seconds
    states, reached = run_all(commands, seconds, logs, environment), [""] * len(commands)
    while (left := end - time.monotonic()) > LEAST_SECONDS:
        now = [path.read_text() if path.exists() else "" for path in progress]
        again = [n for n in range(len(commands)) if now[n] and now[n] != reached[n]]
        if not again:
            break
        reached = now
        ended_again = run_all([commands[n] for n in again], left, [logs[n] for n in again], environment)
        for n, state in zip(again, ended_again, strict=True):
            states[n] = state
    return states


def wait_until(running: Sequence[subprocess.Popen], end: float) -> None:
    for process in running:
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(max(0.0, end - time.monotonic()))


def tell(running: Sequence[subprocess.Popen], what: signal.Signals) -> None:
    for process in running:
        if process.poll() is None:
            process.send_signal(what)


def ended(process: subprocess.Popen) -> str | None:
    """How a process ended, or None where it runs. pytest's 5 says that none of its tests is in this share."""
    code = process.poll()
    if code is None:
        return None
    return "done" if code in (0, 5) else f"ended by signal {-code}" if code < 0 else f"status {code}"


class Tests(NamedTuple):
    """How many tests ended how, whether these are all, and which failed."""

    counts: Counter
    complete: bool
    failures: tuple[str, ...]


def read_tests(junit: Path, log: Path) -> Tests:
    """What became of the tests; from the log where pytest came to no end."""
    if junit.exists():
        suite = ElementTree.parse(junit).getroot()[0]
        total, failed, skipped = (
            int(suite.get("tests", 0)),
            int(suite.get("failures", 0)) + int(suite.get("errors", 0)),
            int(suite.get("skipped", 0)),
        )
        cases = [case for case in suite if case.find("failure") is not None or case.find("error") is not None]
        names = tuple(f"{case.get('classname')}::{case.get('name')}" for case in cases)
        return Tests(Counter(passed=total - failed - skipped, failed=failed, skipped=skipped), True, names)
    lines = log.read_text(errors="replace").splitlines()
    verdicts = [word for line in lines for word in ("passed", "failed", "skipped") if f" {word.upper()}" in line]
    failures = [line.strip() for line in lines if " FAILED" in line or " ERROR" in line]
    begun = ""
    for line in lines:
        if line.startswith("tests/") and "::" in line:
            begun = line.split()[0]
        if any(word in line for word in ("PASSED", "FAILED", "SKIPPED", "ERROR")):
            begun = ""
    return Tests(Counter(verdicts), False, (*failures, *[f"{begun} did not end"] * bool(begun)))
