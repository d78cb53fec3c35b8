"""Send every case to the worker, restart it when a contender takes it down, and keep what is measured."""

import multiprocessing
import time
from collections.abc import Iterator
from contextlib import contextmanager
from ctypes import c_int
from typing import Any

from benchmarks.cases import Case
from benchmarks.contenders import Contender
from benchmarks.progress import Progress
from benchmarks.run import Settings
from benchmarks.worker import NOBODY, serve

PATIENCE_SECONDS = {"cpu": 900, "cuda": 120}
POLL_SECONDS = 0.5


class WorkerLost(Exception):
    """The worker ended or stopped answering; `culprit` is the place of the contender whose turn it was."""

    def __init__(self, reason: str, culprit: int) -> None:
        super().__init__(reason)
        self.culprit = culprit


class Worker:
    """The measuring process, started when first needed and again after a loss."""

    def __init__(self, threads: int, patience: float) -> None:
        self.threads = threads
        self.patience = patience
        self.process = None
        self.turn = multiprocessing.RawValue(c_int, NOBODY)

    def start(self) -> None:
        context = multiprocessing.get_context("spawn")
        self.pipe, child = context.Pipe()
        self.turn = context.RawValue(c_int, NOBODY)
        self.process = context.Process(target=serve, args=(child, self.turn, self.threads), daemon=False)
        self.process.start()
        child.close()

    def ask(self, task: str, *arguments: Any, progress: Progress | None = None, what: str = "") -> Any:
        """Run one task and return its answer. Raises WorkerLost."""
        if self.process is None:
            self.start()
        try:
            self.pipe.send((task, arguments))
            end = time.monotonic() + self.patience
            while not self.pipe.poll(POLL_SECONDS):
                if time.monotonic() > end:
                    self.lose(f"no answer within {self.patience:.0f} s")
                if progress:
                    progress.show(what)
            return self.pipe.recv()
        except (EOFError, BrokenPipeError, ConnectionResetError):
            self.process.join()
            code = self.process.exitcode
            self.lose(f"ended the process by signal {-code}" if code < 0 else f"ended the process with status {code}")

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


@contextmanager
def working(threads: int, patience: float = PATIENCE_SECONDS["cpu"]) -> Iterator[Worker]:
    worker = Worker(threads, patience)
    try:
        yield worker
    finally:
        worker.stop()


def measure(worker: Worker, case: Case, contenders: list[Contender], settings: Settings, progress: Progress) -> dict:
    """One case's record. A contender that takes the worker down becomes a row that says so, and the rest goes on."""
    try:
        record = worker.ask("measure", case, contenders, settings, progress=progress, what=case.id)
        if any("CUDA error" in row.get("reason", "") for row in record["rows"]):
            worker.stop()  # nothing runs on a device any more in a process that it has failed
        return record
    except WorkerLost as loss:
        if loss.culprit == NOBODY:
            return {"noise": None, "rows": [crashed(contender, f"the suite, {loss}") for contender in contenders]}
        lost = contenders[loss.culprit]
        rest = [contender for contender in contenders if contender is not lost]
        record = measure(worker, case, rest, settings, progress)
        return {**record, "rows": [*record["rows"], crashed(lost, str(loss))]}


def crashed(contender: Contender, reason: str) -> dict:
    return {"contender": contender.name, "status": "crashed", "reason": reason}
