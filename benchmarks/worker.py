"""The process that measures. It is a child, so that a contender that takes the process down takes only this one.

Tasks come and answers go through a pipe. Who works at the moment stands in shared memory: writing it wakes nobody, so
the parent's bookkeeping does not disturb the measurement, and after a crash it names the culprit.
"""

import os
import signal
from contextlib import suppress
from ctypes import c_int
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

from benchmarks import machine, run, startup
from benchmarks.cases import Case
from benchmarks.contenders import Contender

NOBODY = -1


def serve(pipe: Connection, turn: c_int, threads: int) -> None:
    """Answer tasks until the pipe closes. A task is a function of this module, by name, and its arguments."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's: it keeps what is measured and ends us
    offer_to_the_oom_killer()
    torch.set_num_threads(threads)
    tasks = {"measure": measure, "facts": facts, "startup": startup.measure}
    with suppress(EOFError):
        while True:
            name, arguments = pipe.recv()
            pipe.send(tasks[name](*arguments, turn=turn))


def measure(case: Case, contenders: list[Contender], settings: run.Settings, turn: c_int) -> dict:
    places = {contender.name: place for place, contender in enumerate(contenders)}

    def enter(name: str) -> None:
        turn.value = places.get(name, NOBODY)

    return run.run_case(case, contenders, settings, enter)


def facts(device: str, dtypes: tuple[str, ...], turn: c_int) -> dict[str, Any]:
    turn.value = NOBODY
    return {
        "folder": machine.slug(device, torch.get_num_threads()),
        **machine.facts(device, torch.get_num_threads(), dtypes),
    }


def offer_to_the_oom_killer() -> None:
    """When memory runs out, lose this process and not the parent, which holds the results."""
    with suppress(OSError):
        Path(f"/proc/{os.getpid()}/oom_score_adj").write_text("1000")
