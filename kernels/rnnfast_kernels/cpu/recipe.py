"""A call laid out once and run many times: records whose addresses are filled in when the tensors are known.

While a recipe is written, an address is a `Ref`: a named base and an offset. Running it adds the bases to a template
of all records in one step, so that a call with sizes that were seen before costs microseconds.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from rnnfast_kernels.cpu import pool
from rnnfast_kernels.cpu.job import Record


class Ref(NamedTuple):
    """An address: `offset` bytes after the one that `base` will have."""

    base: str
    offset: int = 0

    def at(self, offset: int) -> "Ref":
        return Ref(self.base, self.offset + offset)


class Phase(NamedTuple):
    """Jobs that may run side by side, after those of the phases before."""

    task: int
    records: tuple[int, ...]
    threads: int


NOWHERE = Ref("nowhere")
RECORDS, SCRATCH = "records", "scratch"
# Scratch buffers start at cache lines, and are followed by room for a vector that overruns.
LINE, MARGIN = 64, 64


class Recipe:
    """Phases over one template of records."""

    def __init__(self) -> None:
        self.bases = ["nowhere", RECORDS, SCRATCH]
        self.values: list[int] = []
        self.which: list[int] = []
        self.phases: list[Phase] = []
        self.scratch = 0

    def buffer(self, size: int) -> Ref:
        """Reserve scratch memory."""
        offset = self.scratch
        self.scratch += -(-(size + MARGIN) // LINE) * LINE
        return Ref(SCRATCH, offset)

    def record(self, layout: Record, /, **fields: "int | Ref") -> Ref:
        """Add a record, and return where it will be."""
        position = len(self.values)
        for value in layout.order(fields):
            base, offset = value if isinstance(value, Ref) else Ref("nowhere", value)
            if base not in self.bases:
                self.bases.append(base)
            self.values.append(offset)
            self.which.append(self.bases.index(base))
        return Ref(RECORDS, 8 * position)

    def phase(self, task: int, records: Sequence[Ref], threads: int) -> None:
        """Have a task done for every record, on so many threads."""
        if records:
            self.phases.append(Phase(task, tuple(record.offset for record in records), threads))

    def finish(self) -> "Recipe":
        self.template = np.array(self.values, np.int64)
        self.index = np.array(self.which, np.intp)
        return self

    def fill(self, addresses: Mapping[str, int]) -> np.ndarray:
        """Return the records with these addresses filled in. A base that is not given is 0, and so absent."""
        records = np.empty_like(self.template)
        bases = [addresses.get(name, 0) for name in self.bases]
        bases[1] = records.__array_interface__["data"][0]
        return np.add(self.template, np.array(bases, np.int64)[self.index], out=records)

    def run(self, kernel: Callable[[int, int], None], records: np.ndarray) -> None:
        """Run all phases over filled records."""
        start = records.__array_interface__["data"][0]
        for task, offsets, threads in self.phases:
            pool.run(kernel, task, [start + offset for offset in offsets], threads)
