"""The measuring process and its parent's view of it, so that a contender that takes a process down takes only this one.

Tasks go and answers come through a pipe. Whose turn it is stands in shared memory: writing it wakes nobody, so that it
does not disturb the measurement, and after a crash it names the culprit.
"""

import multiprocessing
import os
import shutil
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from ctypes import c_int
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

from benchmarks import machine, measure
from benchmarks.cases import Case
from benchmarks.contenders import Contender

PATIENCE_SECONDS = {"cpu": 900, "cuda": 120}
START_SECONDS = 300
POLL_SECONDS = 0.5
NOBODY = -1
BAR = 24


def serve(pipe: Connection, turn: c_int, threads: int) -> None:
    """Be the measuring process: answer tasks, each a function of TASKS by name with its arguments."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's: it keeps what is measured and ends us
    with suppress(OSError):  # when memory runs out, lose this process and not the parent, which holds the results
        Path(f"/proc/{os.getpid()}/oom_score_adj").write_text("1000")
    torch.set_num_threads(threads)
    pipe.send("ready")
    with suppress(EOFError):
        while True:
            name, arguments = pipe.recv()
            turn.value = NOBODY
            pipe.send(TASKS[name](turn, *arguments))


def measure_case(turn: c_int, case: Case, contenders: list[Contender], settings: measure.Settings) -> dict:
    places = {contender.name: place for place, contender in enumerate(contenders)}

    def enter(name: str) -> None:
        turn.value = places.get(name, NOBODY)

    return measure.run_case(case, contenders, settings, enter)


TASKS = {
    "measure": measure_case,
    "facts": lambda turn, *arguments: machine.facts(*arguments),
    "startup": lambda turn, cells: machine.startup(cells),
}


class WorkerLost(Exception):
    """The worker ended or stopped answering; `culprit` is the place of the contender whose turn it was."""

    def __init__(self, reason: str, culprit: int) -> None:
        super().__init__(reason)
        self.culprit = culprit


class Progress:
    """A line with the share done and the time left, on a terminal; elsewhere only what `print` is given."""

    def __init__(self, total: float) -> None:
        self.live = sys.stderr.isatty()
        self.total, self.done, self.start = total, 0.0, time.monotonic()

    def print(self, text: str) -> None:
        self.clear()
        print(text, flush=True)

    def show(self, what: str) -> None:
        if not self.live:
            return
        share = self.done / self.total
        left = (time.monotonic() - self.start) * (1 - share) / share if self.done else 0
        line = f"[{'#' * int(BAR * share):<{BAR}}] {share:4.0%}  {left // 60:02.0f}:{left % 60:02.0f} left  {what}"
        print("\r\x1b[K" + line[: shutil.get_terminal_size().columns - 1], end="", file=sys.stderr, flush=True)

    def clear(self) -> None:
        if self.live:
            print("\r\x1b[K", end="", file=sys.stderr, flush=True)


class Worker:
    """The measuring process, started when first needed and again after a loss."""

    def __init__(self, threads: int, patience: float) -> None:
        self.threads, self.patience = threads, patience
        self.process = None

    def ask(self, task: str, *arguments: Any, progress: Progress | None = None, what: str = "") -> Any:
        """Run one task and return its answer. Raises WorkerLost."""
        try:
            if self.process is None:
                self.start()
                self.answer(START_SECONDS)
            self.pipe.send((task, arguments))
            return self.answer(self.patience, progress, what)
        except (EOFError, BrokenPipeError, ConnectionResetError):
            self.process.join()
            code = self.process.exitcode
            self.lose(f"ended the process by signal {-code}" if code < 0 else f"ended the process with status {code}")

    def answer(self, patience: float, progress: Progress | None = None, what: str = "") -> Any:
        end = time.monotonic() + patience
        while not self.pipe.poll(POLL_SECONDS):
            if time.monotonic() > end:
                self.lose(f"no answer within {patience:.0f} s")
            if progress:
                progress.show(what)
        return self.pipe.recv()

    def start(self) -> None:
        context = multiprocessing.get_context("spawn")
        self.pipe, child = context.Pipe()
        self.turn = context.RawValue(c_int, NOBODY)
        self.process = context.Process(target=serve, args=(child, self.turn, self.threads), daemon=False)
        self.process.start()
        child.close()

    def lose(self, reason: str) -> None:
        culprit = self.turn.value
        self.stop()
        raise WorkerLost(reason, culprit)

    def stop(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.join()
            self.pipe.close()
            self.process = None

    def measure(self, case: Case, contenders: list[Contender], settings: measure.Settings, progress: Progress) -> dict:
        """One case's record. A contender that takes the worker down becomes a row that says so; the rest goes on."""
        try:
            record = self.ask("measure", case, contenders, settings, progress=progress, what=case.id)
            if any("CUDA error" in row.get("reason", "") for row in record["rows"]):
                self.stop()  # nothing runs on a device any more in a process that it has failed
            return record
        except WorkerLost as loss:
            if loss.culprit == NOBODY:
                reason = f"the suite, {loss}"
                return {"noise": None, "rows": [crashed(contender, reason) for contender in contenders]}
            lost = contenders[loss.culprit]
            record = self.measure(case, [each for each in contenders if each is not lost], settings, progress)
            return {**record, "rows": [*record["rows"], crashed(lost, str(loss))]}


def crashed(contender: Contender, reason: str) -> dict:
    return {"contender": contender.name, "status": "crashed", "reason": reason}


@contextmanager
def working(threads: int, patience: float = PATIENCE_SECONDS["cpu"]) -> Iterator[Worker]:
    worker = Worker(threads, patience)
    try:
        yield worker
    finally:
        worker.stop()
