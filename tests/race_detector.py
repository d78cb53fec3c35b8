"""Data races between the programs of a launch: accesses that only the interpreter's order of turns has kept apart.

A processor may reorder what a program does, unless one access happens before the other: because one program did both,
or because an atomic operation with release came behind the first, one with acquire before the second, and the latter
saw what the former had left. Every program has a vector clock, as in DJIT+ (Pozniansky and Schuster, 2003), and every
byte the clocks of the last accesses. So a race is found wherever the two accesses occur, whatever values they give;
but another order may have accesses, or chance arrivals, that this one has not.

A program counts as one thread: the order of its own threads, which the compiler and tl.debug_barrier see to, is taken
for granted. Of atomic operations those of ACCESSES are known; tl.atomic_load and its like count as plain accesses.

The machine that runs PTX (ptx/memory.py) finds races between programs too, and between the threads of one program. It
takes the place of this detector for no target but NVIDIA's, for none of Triton's atomic operations but additions, and
for no version of Triton whose PTX has instructions that it does not know. And it compiles each loop, at some seconds
each, where the interpreter tries every loop and cell in a dozen orders.
"""

from collections import defaultdict

import numpy as np
import triton.language as tl
from triton.runtime import interpreter

ir = interpreter._ir
ACQUIRES = (ir.MEM_SEMANTIC.ACQUIRE, ir.MEM_SEMANTIC.ACQUIRE_RELEASE)
RELEASES = (ir.MEM_SEMANTIC.RELEASE, ir.MEM_SEMANTIC.ACQUIRE_RELEASE)
LOAD, STORE, ATOMIC = range(3)
KINDS = ("a load", "a store", "an atomic operation")
# The kinds of access that one of each kind conflicts with.
CONFLICTS = (slice(STORE, None), slice(LOAD, None), slice(LOAD, ATOMIC))
PAGE = 1 << 16


class DataRace(Exception):
    """Two accesses of different programs to the same byte, one of them a store, and nothing that orders them."""


class RaceDetector:
    """The accesses of one launch's programs: `indices` of the grid, `arguments` by name."""

    def __init__(self, indices, arguments):
        self.indices, self.arguments = indices, arguments
        programs = len(indices)
        # clocks[n, m]: how much of what program m has done happened before what program n does now.
        self.clocks = np.eye(programs, dtype=np.int32)
        # By address of an atomic operation: the clock of who acquires what stands there.
        self.released = {}
        # By address // PAGE: each program's clock at its last access of each kind, [PAGE, kinds, programs].
        self.accessed = defaultdict(lambda: np.zeros((PAGE, len(KINDS), programs), np.int32))

    def create_masked_load(self, n, pointers, mask, *_, **options):
        self.record(n, LOAD, pointers, pointers.data[mask.data])

    def create_masked_store(self, n, pointers, value, mask, *_, **options):
        self.record(n, STORE, pointers, pointers.data[mask.data])

    def create_atomic_cas(self, n, pointers, expected, value, order, scope):
        self.synchronise(n, pointers, pointers.data.ravel(), order, scope)

    def create_atomic_rmw(self, n, operation, pointers, value, mask, order, scope):
        self.synchronise(n, pointers, pointers.data[mask.data], order, scope)

    def synchronise(self, n, pointers, addresses, order, scope):
        """Record an atomic operation, which for programs other than its own is a store if its scope is no larger."""
        if scope == ir.MEM_SYNC_SCOPE.CTA:
            self.record(n, STORE, pointers, addresses)
            return
        clock = self.clocks[n]
        if order in ACQUIRES:
            for address in addresses.tolist():
                np.maximum(clock, self.released.get(address, 0), out=clock)
        self.record(n, ATOMIC, pointers, addresses)
        if order in RELEASES:
            for address in addresses.tolist():
                self.released[address] = np.maximum(clock, self.released.get(address, 0))
            clock[n] += 1

    def record(self, n, kind, pointers, addresses):
        """Note an access of program n, unless it is in a race with an earlier one."""
        size = interpreter._get_np_dtype(pointers.get_element_ty()).itemsize
        pages, places = np.divmod(addresses.astype(np.int64), PAGE)
        for page in np.unique(pages):
            accessed = self.accessed[page]
            places_here = (places[pages == page][:, None] + np.arange(size)).ravel()
            before = accessed[places_here, CONFLICTS[kind]]
            late = before > self.clocks[n]
            if late.any():
                place, other, m = np.argwhere(late)[0]
                address = page * PAGE + places_here[place]
                raise DataRace(self.describe(n, kind, m, range(len(KINDS))[CONFLICTS[kind]][other], address))
            accessed[places_here, kind, n] = self.clocks[n, n]

    def describe(self, n, kind, m, other, address):
        tensors = [found for name, value in self.arguments.items() for found in tensors_in(name, value)]
        start, name = max(found for found in tensors if found[0] <= address)
        return (
            f"data race at byte {address - start} of {name}: {KINDS[kind]} by program {self.indices[n]}"
            f" is not ordered behind {KINDS[other]} by program {self.indices[m]}"
        )


def tensors_in(name, value):
    """Address and name of every tensor in an argument of a kernel."""
    if isinstance(value, tuple):
        for field, part in zip(getattr(value, "_fields", range(len(value))), value, strict=True):
            yield from tensors_in(f"{name}.{field}", part)
    elif isinstance(value, tl.tensor) and value.dtype.is_ptr():
        yield value.handle.data.item(), name
