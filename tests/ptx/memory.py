"""Memory as compiled kernels see it: bounds, alignment, and data races between threads, checked at every access.

A thread's access is ordered behind another's if its block has passed `bar.sync` in between or, between blocks, by a
release behind such a barrier and an acquire in front of one that saw it. Every block counts its barriers; an access is
remembered with that count, and every block knows up to which count it sees what each other one did. This is what
happens-before means in PTX (ISA, "Memory Consistency Model") for kernels that release behind a barrier and acquire in
front of one; whatever relies on more is reported.
"""

import ctypes
from typing import Any, NamedTuple

import numpy as np

# An asynchronous copy under way has been written by nobody yet, at a time after all others.
NOBODY, NEVER = -2, np.iinfo(np.int32).max


class Fault(Exception):
    """An access outside of all tensors, or one that is not aligned, or a data race."""


class View(NamedTuple):
    """What block number `block` of a launch sees: clock[m] barriers of block m, of itself all."""

    block: int
    clock: np.ndarray


class Region:
    """Bytes that belong together, with the last accesses to each granule of them."""

    def __init__(self, name: str, content: np.ndarray, address: int, granule: int, blocks: int) -> None:
        self.name, self.content, self.address, self.granule = name, content, address, granule
        granules = -(-content.size // granule)
        self.writer = np.full(granules, NOBODY, np.int32)  # a block
        self.written = np.full(granules, -1, np.int32)  # at its barrier
        self.writing = np.full(granules, NOBODY, np.int32)  # by its thread
        # The same by block, of loads; most regions are never written, and need none of it.
        self.blocks = blocks
        self.read = self.reading = np.empty((0, granules), np.int32)
        self.unwritten: list[tuple] | None = []
        # Words that are exchanged by relaxed accesses are accessed by no others.
        self.relaxed = False

    def watch(self, threads: np.ndarray, addresses: np.ndarray, width: int) -> None:
        """For those who count accesses: called before each."""

    def offsets(self, addresses: np.ndarray, width: int, relaxed: bool = False) -> np.ndarray:
        """Where accesses of `width` bytes lie in the region."""
        offsets = addresses.astype(np.int64) - self.address
        if self.relaxed != relaxed:
            raise Fault(f"weak accesses to {self.name} beside relaxed ones")
        if (addresses % width).any():
            raise Fault(f"{width} bytes at byte {offsets[addresses % width != 0][0]} of {self.name} are not aligned")
        outside = (offsets < 0) | (offsets + width > self.content.size)
        if outside.any():
            offset = offsets[outside][0]
            raise Fault(f"{width} bytes at byte {offset} of {self.name}, which has {self.content.size}")
        return offsets

    def granules(self, offsets: np.ndarray, width: int) -> np.ndarray:
        """The granules of each access: [accesses, granules]."""
        return (offsets // self.granule)[:, None] + np.arange(max(width // self.granule, 1))

    def load(self, view: View, threads: np.ndarray, addresses: np.ndarray, width: int) -> np.ndarray:
        """What stands at the addresses, one for each thread: [threads, width] bytes."""
        self.watch(threads, addresses, width)
        offsets = self.offsets(addresses, width)
        granules = self.granules(offsets, width)
        self.check_writes(view, threads, granules, "a load")
        seen = (view.block, view.clock[view.block], threads[:, None], granules)
        if self.unwritten is None:
            self.note_load(*seen)
        else:
            self.unwritten.append(seen)
        return self.content[offsets[:, None] + np.arange(width)]

    def note_load(self, block: int, now: int, threads: np.ndarray, granules: np.ndarray) -> None:
        before = self.reading[block, granules]
        among = (self.read[block, granules] == now) & (before != threads)
        self.read[block, granules] = now
        self.reading[block, granules] = threads
        # Of several threads, in this instruction or since the last barrier, none is the one that has read.
        several = among | (self.reading[block, granules] != threads)
        self.reading[block, granules[several]] = NOBODY

    def store(self, view: View, threads: np.ndarray, addresses: np.ndarray, values: np.ndarray) -> None:
        """Write `values`, [threads, width] bytes."""
        self.watch(threads, addresses, values.shape[1])
        offsets = self.offsets(addresses, values.shape[1])
        self.claim(view, threads, offsets, values.shape[1])
        places = offsets[:, None] + np.arange(values.shape[1])
        self.content[places] = values
        if (self.content[places] != values).any():
            raise Fault(f"threads of one instruction store different values to {self.name}")

    def claim(self, view: View, threads: np.ndarray, offsets: np.ndarray, width: int, pending: bool = False) -> None:
        """Note a store, which is still to come where it is pending."""
        granules = self.granules(offsets, width)
        if self.unwritten is not None:
            self.read = np.full((self.blocks, self.written.size), -1, np.int32)
            self.reading = np.full((self.blocks, self.written.size), NOBODY, np.int32)
            for load in self.unwritten:
                self.note_load(*load)
            self.unwritten = None
        self.check_writes(view, threads, granules, "a store")
        self.check_reads(view, threads, granules)
        self.writer[granules] = view.block
        self.written[granules] = NEVER if pending else view.clock[view.block]
        self.writing[granules] = NOBODY if pending else threads[:, None]

    def arrive(self, view: View, threads: np.ndarray, offsets: np.ndarray, values: np.ndarray) -> None:
        """What has been pending is there."""
        granules = self.granules(offsets, values.shape[1])
        self.content[offsets[:, None] + np.arange(values.shape[1])] = values
        self.written[granules] = view.clock[view.block]
        self.writing[granules] = threads[:, None]

    def check_writes(self, view: View, threads: np.ndarray, granules: np.ndarray, what: str) -> None:
        writer = self.writer[granules]
        seen = np.where(writer == NOBODY, NEVER, view.clock[np.maximum(writer, 0)])
        own = (writer == view.block) & (self.writing[granules] == threads[:, None])
        late = (self.written[granules] >= seen) & ~own
        if late.any():
            access, place = np.argwhere(late)[0]
            granule = granules[access, place]
            by = f"block {self.writer[granule]}, thread {self.writing[granule]}"
            raise Fault(self.race(view, threads[access], granule, what, f"a store by {by}"))

    def check_reads(self, view: View, threads: np.ndarray, granules: np.ndarray) -> None:
        late = self.read[:, granules] >= view.clock[:, None, None]
        late[view.block] &= self.reading[view.block, granules] != threads[:, None]
        if late.any():
            block, access, place = np.argwhere(late)[0]
            granule = granules[access, place]
            by = f"block {block}, thread {self.reading[block, granule]}"
            raise Fault(self.race(view, threads[access], granule, "a store", f"a load by {by}"))

    def race(self, view: View, thread: int, granule: int, what: str, other: str) -> str:
        return (
            f"data race at byte {granule * self.granule} of {self.name}: {what} by block {view.block}, thread {thread}"
            f" is not ordered behind {other}"
        )


class Memory:
    """The tensors of a launch, at their own addresses: everything else is out of bounds."""

    def __init__(self, tensors: dict[str, tuple[int, int, int]], blocks: int) -> None:
        """tensors: address, bytes, and bytes of an element, by name."""
        self.regions = []
        for name, (address, size, element) in sorted(tensors.items(), key=lambda item: item[1]):
            content = np.ctypeslib.as_array((ctypes.c_uint8 * size).from_address(address))
            self.regions.append(Region(name, content, address, element, blocks))
        self.addresses = np.array([region.address for region in self.regions], np.int64)

    def region(self, addresses: np.ndarray) -> Region:
        """The tensor that an instruction accesses."""
        at = np.searchsorted(self.addresses, np.int64(addresses[0]), "right") - 1
        if at < 0:
            raise Fault(f"an access at address {addresses[0]:#x}, in front of all tensors")
        return self.regions[at]


class Device:
    """What the blocks of a launch share: its grid and parameters, global memory, and what was released in it."""

    def __init__(self, grid: tuple[int, ...], parameters: dict[str, int], tensors: dict[str, tuple[int, int, int]]):
        self.grid, self.parameters = (*grid, 1, 1)[:3], parameters
        self.blocks = self.grid[0] * self.grid[1] * self.grid[2]
        self.memory = Memory(tensors, self.blocks)
        # By address: what whoever acquires it sees. And how often anything was changed that somebody may poll.
        self.released: dict[int, np.ndarray] = {}
        self.changes = 0
        # Words exchanged by relaxed accesses, by region, and their views that were released, by address and region.
        self.exchanged: dict[str, Any] = {}
        self.views: dict[tuple[int, str], np.ndarray] = {}
        self.seed = 0
