"""A call laid out once and run many times: records whose addresses are filled in when the tensors are known.

While a recipe is written, an address is a `Ref`: a named base and an offset. Running it adds the bases to a template
of all records, in machine code, so that a call with sizes that were seen before costs microseconds.
"""

import math
import time
from array import array
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

from rnnfast_kernels.cpu.job import CALL, PHASE, PROGRAM, Record
from rnnfast_kernels.cpu.runtime import pool
from rnnfast_kernels.cpu.runtime.compiled import Kernel


class Ref(NamedTuple):
    """An address: `offset` bytes after the one that `base` will have."""

    base: str
    offset: int = 0

    def at(self, offset: int) -> "Ref":
        return Ref(self.base, self.offset + offset)


class Phase(NamedTuple):
    """Jobs that may run side by side, after those of the phases before: where their record is, who runs them, when."""

    record: Ref
    shared: bool
    prepares: bool


class Program(NamedTuple):
    """Phases in order, where the record that lists them is, and whether one thread runs all of them (`serial`)."""

    record: Ref
    phases: tuple[Phase, ...]
    serial: bool


NOWHERE, SCRATCH, RECORDS = "nowhere", "scratch", "records"
TEAM = ("GOMP_parallel", "omp_get_num_threads", "sched_yield")
# Bases that a recipe gives addresses to by itself.
FIXED = 3 + len(TEAM)
# If cores are oversubscribed from the start, there is no fast team call to compare with. After TRIAL team calls one
# call runs on one thread; a team should be no slower. Calls longer than LONG seconds are exempt.
TRIAL, NEVER, LONG = 4, -1, 0.1
# Where the addresses of the named bases are in a call's record (see `CALL`), after those.
ADDRESSES = len(CALL.names) + FIXED
# Scratch buffers start at cache lines, and are followed by room for a vector that overruns.
LINE, MARGIN = 64, 64


class Recipe:
    """Phases over one template of records, and the program that runs them."""

    def __init__(self, threads: int, names: Sequence[str] = ()) -> None:
        """names: bases that come first, in this order."""
        self.threads = threads
        fixed = (NOWHERE, SCRATCH, RECORDS, *TEAM)
        self.bases = {name: n for n, name in enumerate((*fixed, *names))}
        self.values: list[int] = []
        self.which: list[int] = []
        self.phases: list[Phase] = []
        self.scratch = 0
        self.names: Mapping[str, Ref] = {}

    @contextmanager
    def renamed(self, names: "Mapping[str, Ref]") -> Iterator[None]:
        """Within the block, write other addresses for some bases."""
        self.names = names
        yield
        self.names = {}

    def buffer(self, size: int) -> Ref:
        """Reserve scratch memory."""
        offset = self.scratch
        self.scratch += -(-(size + MARGIN) // LINE) * LINE
        return Ref(SCRATCH, offset)

    def record(self, layout: Record, /, *following: Ref, **fields: "int | Ref") -> Ref:
        """Add a record, and whatever is to follow it; return where it will be."""
        position = len(self.values)
        for value in (*layout.order(fields), *following):
            base, offset = value if isinstance(value, Ref) else Ref(NOWHERE, value)
            if base in self.names:
                base, offset = self.names[base].at(offset)
            self.values.append(offset)
            self.which.append(self.bases.setdefault(base, len(self.bases)))
        return Ref(RECORDS, 8 * position)

    def next_record(self) -> Ref:
        """Where the next record will be; those added after it follow."""
        return Ref(RECORDS, 8 * len(self.values))

    def counter(self) -> Ref:
        """Add an integer that starts at 0, on a cache line of its own."""
        apart = LINE // 8
        self.values += [0] * (2 * apart)
        self.which += [0] * (2 * apart)
        return Ref(RECORDS, 8 * (len(self.values) - apart))

    def phase(
        self, task: int, jobs: Sequence[Ref], *, shared: bool, prepares: bool = False, serial: Sequence[Ref] = ()
    ) -> None:
        """Have a task done for every job, by a team if `shared`.

        prepares: its results hold while the weights do. serial: jobs that do the same work one after another; where
        they are given, the others wait for one another, and so run only where each has a thread.
        """
        if jobs:
            shared = shared and len(jobs) > 1 and self.threads > 1
            fields = {"task": task, "shared": int(shared), "count": len(jobs), "serial": len(serial)}
            fields |= {"team_size": Ref("omp_get_num_threads")} if serial else {}
            record = self.record(PHASE, *jobs, *serial, **fields)
            self.phases.append(Phase(record, shared, prepares))

    def finish(self) -> "Recipe":
        """Write the programs: of all phases, of those that prepare, and of the others."""
        self.whole = self.program(self.phases)
        self.preparation = self.program([phase for phase in self.phases if phase.prepares])
        self.repeated = self.program([phase for phase in self.phases if not phase.prepares])
        self.records = self.buffer(8 * len(self.values)).offset
        self.kept = values, which = array("q", self.values), array("q", self.which)
        self.named = tuple(self.bases)[FIXED:]
        # Seconds that a call usually takes where all rows have all steps; calls by a team until one runs on one thread.
        self.usual, self.until_trial = math.inf, TRIAL
        self.sizes = self.named.index("sizes") if "sizes" in self.named else None
        self.template = (values.buffer_info()[0], which.buffer_info()[0], len(values))
        return self

    def program(self, phases: Sequence[Phase]) -> Program:
        """Write a program."""
        records = [phase.record for phase in phases]
        record = self.record(PROGRAM, *records, team=Ref("GOMP_parallel"), threads=self.threads, count=len(records))
        return Program(record, tuple(phases), not any(phase.shared for phase in phases))

    def addresses(self, tensors: Mapping[str, Any]) -> list[int]:
        """Addresses of the named bases, in their order.

        tensors: what bases name; each has a `data_ptr()`. One that is None or not given is absent: its address is 0.
        """
        return [0 if (each := tensors.get(name)) is None else each.data_ptr() for name in self.named]

    def start(
        self, kernel: Kernel, scratch: int, addresses: Sequence[int], team: pool.Team, program: Program | None = None
    ) -> int:
        """Write the records into the scratch memory, run a program if one is given, and return the records' address.

        scratch: address of `self.scratch` bytes. addresses: of the named bases, in their order.
        """
        call = self.filled(scratch, addresses, team, program)
        kernel.start(call.buffer_info()[0])
        return scratch + self.records

    def filled(
        self, scratch: int, addresses: Sequence[int], team: pool.Team, program: Program | None = None
    ) -> "array[int]":
        """Return the record of a call, which `start` of a kernel takes. Its addresses begin at `ADDRESSES`."""
        records = scratch + self.records
        first = 0 if program is None else records + program.record.offset
        return array("q", (*self.template, records, first, 0, scratch, records, *team, *addresses))

    def call(self, kernel: Kernel, scratch: int, addresses: Sequence[int]) -> None:
        """Fill in the records and run all phases, with a team if there is work for one and cores are left for it."""
        program = self.whole
        if program.serial:
            self.start(kernel, scratch, addresses, pool.NO_TEAM, program)
            return
        whole = self.sizes is None or addresses[self.sizes] == 0
        if pool.oversubscription.is_active() or (self.until_trial == 0 and whole):
            begun = time.perf_counter()
            self.start(kernel, scratch, addresses, pool.NO_TEAM, program)
            if whole:
                self.usual, self.until_trial = min(self.usual, time.perf_counter() - begun), NEVER
            return
        token = object()
        try:
            if not pool.reserve(token, self.threads):
                self.start(kernel, scratch, addresses, pool.NO_TEAM, program)
                return
            pool.cores()
            begun = time.perf_counter()
            team = pool.team()
            if team.start:
                self.start(kernel, scratch, addresses, team, program)
            else:
                records = self.start(kernel, scratch, addresses, team)
                for phase in program.phases:
                    pool.share(kernel.share, records + phase.record.offset, self.threads if phase.shared else 1)
            if whole:
                self.usual = pool.oversubscription.note(time.perf_counter(), begun, self.usual)
                self.until_trial -= self.usual < LONG
        finally:
            pool.reserved.pop(token, None)
