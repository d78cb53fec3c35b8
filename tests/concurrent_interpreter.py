"""Triton's interpreter with all programs of a launch at once, in an order that follows from a seed.

On its own the interpreter runs each program to its end before the next begins, so one that waits for another waits
forever. Here every program has a thread, and one of them runs at a time; each access to memory is a turn, behind which
a program drawn at random goes on. So what is explored are interleavings under sequential consistency, in which a load
or a store of a whole tile is one access. What a weaker memory model adds is left to the race detector.
"""

import ctypes
import inspect
import threading
from contextlib import ExitStack, contextmanager
from functools import partial, update_wrapper
from random import Random
from unittest.mock import patch

from race_detector import DataRace, RaceDetector
from triton.runtime import interpreter

ACCESSES = ("create_masked_load", "create_masked_store", "create_atomic_cas", "create_atomic_rmw")
builder = interpreter.interpreter_builder


class Deadlock(Exception):
    """Every program that has not ended polls, and none of them finds what it waits for."""


class Stopped(BaseException):
    """Ends a program because another one has failed. Not an Exception, which the interpreter would wrap."""


class Programs:
    """The programs of one launch: indices of the grid, each with a turn of its own. `races` may be None."""

    def __init__(self, program, indices, random, races):
        self.program, self.indices, self.random, self.races = program, indices, random, races
        self.turns = [threading.Semaphore(0) for _ in indices]
        self.live = list(range(len(indices)))
        self.speeds = [self.speed() for _ in indices]
        # What a program whose last access was a poll has read: address, size in bytes, content; and whether it had read
        # the same just before, so that it goes on polling. A first poll may have found what it was after.
        self.polled = [None for _ in indices]
        self.repeats = [False for _ in indices]
        self.running = self.idle = 0
        self.failure = None

    def speed(self):
        """A program's share of the turns, so different that one often waits for long where others run ahead."""
        return 10 ** self.random.uniform(-3, 0)

    def run(self):
        """Run all programs to their ends, or raise what the first one to fail has raised."""
        threads = [threading.Thread(target=self.thread, args=(n,), daemon=True) for n in self.live]
        with ExitStack() as patches:
            for name in ACCESSES:
                access = partial(self.access, name, getattr(builder, name))
                patches.enter_context(patch.object(builder, name, access))
            for thread in threads:
                thread.start()
            self.pass_on()
            try:
                for thread in threads:
                    thread.join()
            except BaseException as interrupt:
                self.failure = interrupt
        if self.failure is not None:
            raise self.failure

    def thread(self, n):
        """One program from its first turn to its last."""
        try:
            self.await_turn(n)
            self.program()
        except Stopped:
            pass
        except BaseException as error:
            self.failure = error
        self.live.remove(n)
        if self.live:
            self.pass_on()

    def access(self, name, access, *args, **options):
        """One access to memory, behind the turns of others."""
        n = self.running
        self.pass_on()
        self.await_turn(n)
        if self.races is not None:
            try:
                getattr(self.races, name)(n, *args, **options)
            except DataRace as race:
                self.failure = race
                raise Stopped from race
        result = access(*args, **options)
        before, self.polled[n] = self.polled[n], None
        if name == "create_atomic_rmw" and args[2].data.size == 1 and not args[2].data.any():
            address, size = args[1].data.item(), args[2].data.itemsize
            self.polled[n] = address, size, ctypes.string_at(address, size)
        self.repeats[n] = self.polled[n] == before
        return result

    def await_turn(self, n):
        self.turns[n].acquire()
        if self.failure is not None:
            raise Stopped

    def pass_on(self):
        """Give the next turn to a random program, of those whose poll has a chance."""
        ready = [n for n in self.live if not self.polls_in_vain(n)]
        if ready:
            self.idle = 0
            if self.random.random() < 0.02:
                self.speeds[self.random.choice(ready)] = self.speed()
            self.running = self.random.choices(ready, [self.speeds[n] for n in ready])[0]
        else:
            self.idle += 1
            self.running = self.live[self.idle % len(self.live)]
            if self.idle > 2 * len(self.live) and self.failure is None:
                waiting = ", ".join(str(self.indices[n]) for n in self.live)
                self.failure = Deadlock(f"deadlock: of {len(self.indices)} programs, {waiting} wait forever")
        builder.grid_idx = self.indices[self.running]
        self.turns[self.running].release()

    def polls_in_vain(self, n):
        """Whether the program's last two accesses were polls, and what they have read stands there unchanged."""
        if self.polled[n] is None or not self.repeats[n]:
            return False
        address, size, content = self.polled[n]
        return ctypes.string_at(address, size) == content


class Together:
    """Stands for a kernel's function where the interpreter calls it once per program: the last call runs them all."""

    def __init__(self, random, races, function):
        update_wrapper(self, function)
        self.__signature__ = inspect.signature(function)
        self.__globals__ = function.__globals__
        self.random, self.races, self.function = random, races, function
        self.indices = []

    def __call__(self, **arguments):
        self.indices.append(builder.grid_idx)
        x, y, z = builder.grid_dim
        if len(self.indices) == x * y * z:
            races = RaceDetector(self.indices, arguments) if self.races else None
            Programs(partial(self.function, **arguments), self.indices, self.random, races).run()


@contextmanager
def concurrent(seed, races=True):
    """Run the programs of each launch concurrently, in an order that the seed decides; with `races` none may occur."""
    random, executor = Random(seed), interpreter.GridExecutor
    with patch.object(interpreter, "GridExecutor", lambda fn, *rest: executor(Together(random, races, fn), *rest)):
        yield
