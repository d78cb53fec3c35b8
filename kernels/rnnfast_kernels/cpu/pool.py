"""Threads that run kernels side by side.

Kernels release the interpreter's lock, so that plain Python threads run them in parallel. The calling thread takes its
share and waits for the rest. Unlike a parallel layer of Numba's, this can be entered by several threads at once and
survives a fork (a child makes its own threads at first use), and loads no second OpenMP runtime beside torch's.
"""

import os
import queue
import threading
from collections.abc import Callable

tasks: queue.SimpleQueue = queue.SimpleQueue()
workers: list[threading.Thread] = []
growing = threading.Lock()


class Countdown:
    """Lets one thread wait until others have finished a number of tasks."""

    def __init__(self, count: int):
        self.count = count
        self.lock = threading.Lock()
        self.done = threading.Lock()
        self.done.acquire()
        self.error: BaseException | None = None

    def finish(self, error: BaseException | None) -> None:
        with self.lock:
            self.count -= 1
            self.error = self.error or error
            if self.count == 0:
                self.done.release()


def work() -> None:
    """Run tasks for ever."""
    while True:
        task, countdown = tasks.get()
        try:
            task()
        except BaseException as error:  # handed to the thread that waits
            countdown.finish(error)
        else:
            countdown.finish(None)


def grow(count: int) -> None:
    """Have at least `count` workers."""
    with growing:
        while len(workers) < count:
            worker = threading.Thread(target=work, name=f"rnnfast-{len(workers)}", daemon=True)
            worker.start()
            workers.append(worker)


def run(kernel: Callable[[int, int], None], task: int, records: list[int], threads: int) -> None:
    """Call `kernel(task, record)` for every record, on up to `threads` threads, this one among them."""
    helpers = min(threads, len(records)) - 1
    if helpers < 1:
        for record in records:
            kernel(task, record)
        return

    def drain() -> None:
        while True:
            try:
                record = records.pop()
            except IndexError:
                return
            kernel(task, record)

    grow(helpers)
    countdown = Countdown(helpers)
    for _ in range(helpers):
        tasks.put((drain, countdown))
    try:
        drain()
    finally:
        countdown.done.acquire()
    if countdown.error:
        raise countdown.error


def forget() -> None:
    """Start afresh in a forked child, which has none of its parent's threads."""
    global tasks, growing
    tasks = queue.SimpleQueue()
    growing = threading.Lock()
    workers.clear()


os.register_at_fork(after_in_child=forget)
