"""Threads that share the jobs of a phase.

The team is that of torch's OpenMP runtime, started through `GOMP_parallel`. After an operator, OpenMP's threads spin
for milliseconds. Using them avoids waiting for their cores.

Calls from several Python threads at once get teams as long as there are cores for them; the others run on one thread.

Where there is no such runtime, and in a forked child, which has none of its parent's OpenMP threads and would wait for
them for ever, plain Python threads share the jobs; kernels release the interpreter's lock.
"""

import ctypes
import functools
import math
import os
import queue
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from rnnfast_kernels.cpu.job import PHASE

tasks: queue.SimpleQueue = queue.SimpleQueue()
workers: list[threading.Thread] = []
# A signal handler may call a layer wherever it interrupts the thread that runs one.
growing = threading.RLock()
# Cores that calls under way have, by a token of each call.
reserved: dict[object, int] = {}
reserving = threading.RLock()
forked = False
known_cores, read_at = 1, -math.inf


class Team(NamedTuple):
    """Addresses of GOMP_parallel, omp_get_num_threads and sched_yield, all 0 where they are not to be used."""

    start: int
    size: int
    rest: int


NO_TEAM = Team(0, 0, 0)


@functools.cache
def team() -> Team:
    """The OpenMP team to use."""
    if forked:
        return NO_TEAM
    try:
        library = ctypes.CDLL(None)
        functions = library.GOMP_parallel, library.omp_get_num_threads, library.sched_yield
    except (AttributeError, OSError, TypeError):
        return NO_TEAM
    found = Team(*(ctypes.cast(function, ctypes.c_void_p).value or 0 for function in functions))
    # Machine code calls all three.
    return found if all(found) else NO_TEAM


def usable(threads: int) -> int:
    """The number of threads that a call may use: what was asked for, and no more than there are cores.

    Small calls have no time to look for fewer cores than there were; calls by a team look (see `recipe`).
    """
    return threads if threads <= known_cores else min(threads, cores())


def cores() -> int:
    """Cores that this process can have: its affinity, and the quota of its control group. Read again every second."""
    global known_cores, read_at
    now = time.monotonic()
    if now - read_at > 1.0:
        affinity = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        granted = quota(Path("/proc/self/cgroup"), Path("/sys/fs/cgroup"))
        known_cores, read_at = max(1, math.ceil(min(affinity, granted))), now
    return known_cores


def quota(groups: Path, root: Path) -> float:
    """Cores' worth of time that Linux's control groups, version 1 or 2, grant a process; infinite without a limit.

    groups: the file that lists the process's groups. root: the folder that the groups are folders in.
    """
    try:
        lines = groups.read_text(errors="surrogateescape").splitlines()
    except OSError:
        return math.inf
    limits = [math.inf]
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers and "cpu" not in controllers.split(","):
            continue
        top = root if not controllers else root / controllers if (root / controllers).is_dir() else root / "cpu"
        # The limits of all groups above hold too. In a container the path may not exist: its group is then at the top.
        inner = Path(path.lstrip("/"))
        limits += [limit_of(top / each) for each in (inner, *inner.parents)]
    return min(limits)


def limit_of(group: Path) -> float:
    """Cores' worth of time that one control group has."""
    try:
        if (group / "cpu.max").exists():
            amount, period = (group / "cpu.max").read_text().split()
        else:
            amount, period = ((group / f"cpu.cfs_{name}_us").read_text() for name in ("quota", "period"))
        return int(amount) / int(period) if amount != "max" and int(amount) > 0 else math.inf
    except (OSError, ValueError, ZeroDivisionError):
        return math.inf


def reserve(token: object, threads: int) -> bool:
    """Say whether a call may have so many threads: whether cores are left beside those of calls in other threads.

    If so they are reserved until the token is taken from `reserved`, which a caller can do whatever interrupts it.
    """
    with reserving:
        others = sum(reserved.values())
        if others and others + threads > cores():
            return False
        reserved[token] = threads
    return True


class Oversubscription:
    """Whether other processes want the cores, told from calls that take far longer than they usually do.

    At a barrier, threads wait for whichever the scheduler has stopped, milliseconds at a time; a single thread only
    shares its core. So while cores are oversubscribed, calls run on one thread for a while. Then a team is tried again,
    and if that was slow again, the time on one thread doubles. The usual time of a call is the least that a team or,
    once, one thread has taken (see `recipe`).
    """

    SLOW, SLACK = 2.5, 2e-4  # a slow call takes this many times its usual time, and seconds more
    NEAR = 0.2  # two slow calls within so many seconds count; one may be chance
    SHORTEST, LONGEST = 0.05, 1.6  # seconds on one thread, doubled each time

    def __init__(self) -> None:
        self.serial_until = self.last_slow = -math.inf
        self.pause = self.SHORTEST

    def is_active(self) -> bool:
        """Say whether calls should run on one thread for now."""
        return self.serial_until > 0 and time.perf_counter() < self.serial_until

    def note(self, now: float, begun: float, usual: float) -> float:
        """Take note of a call by a team, from `begun` to `now`, and return what its usual time is from now on."""
        taken = now - begun
        if taken <= self.SLOW * usual + self.SLACK:
            if self.serial_until > 0 and now - self.last_slow > self.NEAR:
                self.serial_until, self.pause = -math.inf, self.SHORTEST
            return taken if taken < usual else usual + (taken - usual) / 256
        again = self.serial_until > 0
        if again or now - self.last_slow < self.NEAR:
            self.pause = min(2 * self.pause, self.LONGEST) if again else self.SHORTEST
            self.serial_until = now + self.pause
        self.last_slow = now
        return usual


oversubscription = Oversubscription()


def c_function(name: str, result: type | None, *arguments: type) -> Callable:
    """A function of Python's own library, called without the interpreter's lock."""
    address = ctypes.cast(getattr(ctypes.pythonapi, name), ctypes.c_void_p).value
    return ctypes.CFUNCTYPE(result, *arguments)(address)


# Waiting for `threading.Lock` runs signal handlers, which may raise; waiting for these locks does not.
allocate_lock = c_function("PyThread_allocate_lock", ctypes.c_void_p)
free_lock = c_function("PyThread_free_lock", None, ctypes.c_void_p)
acquire_lock = c_function("PyThread_acquire_lock", ctypes.c_int, ctypes.c_void_p, ctypes.c_int)
release_lock = c_function("PyThread_release_lock", None, ctypes.c_void_p)


class Countdown:
    """Lets one thread wait until others have finished a number of tasks: `acquire_lock(countdown.done, 1)`."""

    def __init__(self, count: int):
        self.count = count
        self.lock = threading.Lock()
        self.done = allocate_lock()
        acquire_lock(self.done, 1)

    def finish(self) -> None:
        with self.lock:
            self.count -= 1
            if self.count == 0:
                release_lock(self.done)

    def __del__(self) -> None:
        free_lock(self.done)


def work() -> None:
    """Run tasks for ever."""
    while True:
        task, countdown = tasks.get()
        try:
            task()
        finally:
            countdown.finish()
            del task, countdown


def grow(count: int) -> int:
    """Have `count` workers, or as many as may be started, and return how many of them there are."""
    with growing:
        while len(workers) < count:
            worker = threading.Thread(target=work, name=f"rnnfast-{len(workers)}", daemon=True)
            try:
                worker.start()
            except RuntimeError:  # a limit on threads, or the end of the interpreter
                break
            workers.append(worker)
        return min(count, len(workers))


def share(kernel: Callable[[int], None], phase: int, threads: int) -> None:
    """Have Python threads, this one among them, call `kernel(phase)`, and wait for all of them.

    A signal handler may raise between any two calls. Whatever it interrupts, no thread works on the phase any more when
    this returns or raises: tasks are queued in one call of C, and so is the wait for them.
    """
    ctypes.c_int64.from_address(phase + 8 * PHASE.names.index("next")).value = 0
    # Workers do not outlive the interpreter: at its end nobody would take the tasks.
    helpers = 0 if sys.is_finalizing() else grow(threads - 1)
    if helpers < 1:
        kernel(phase)
        return
    countdown = Countdown(helpers)
    each = [(functools.partial(kernel, phase), countdown)] * helpers
    done, queued = countdown.done, []
    queue_all, puts, wait = queued.extend, map(tasks.put, each), acquire_lock
    try:
        queue_all(puts)
        kernel(phase)
    finally:
        if queued:
            wait(done, 1)


def forget() -> None:
    """Start afresh in a forked child."""
    global tasks, growing, reserving, forked, oversubscription
    tasks = queue.SimpleQueue()
    growing, reserving = threading.RLock(), threading.RLock()
    workers.clear()
    reserved.clear()
    oversubscription = Oversubscription()
    forked = True
    team.cache_clear()


if hasattr(os, "register_at_fork"):  # not on Windows, where nothing forks
    os.register_at_fork(after_in_child=forget)
