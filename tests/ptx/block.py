"""A block of threads: its registers, which are arrays with an entry per thread, its shared memory, what it has seen."""

from collections.abc import Callable

import numpy as np

from ptx.code import Address
from ptx.memory import Device, Region, View
from ptx.operations import BITS, dtype_of
from ptx.relaxed import Sight, words_of

# Shared memory that nobody has written, and registers: NaN in every type.
POISON = 0xFF
# Relaxed loads of a loop that polls, at most.
MOST_LOADS = 64


class Registers(dict):
    """Values by name, [threads] each, as bits; what was never written is all ones."""

    def __init__(self, kinds: dict[str, np.dtype], threads: int) -> None:
        self.kinds, self.threads = kinds, threads

    def __missing__(self, name: str) -> np.ndarray:
        return np.full(self.threads, np.array(-1).astype(self.kinds[name]))


class Block:
    """Number `number` of a launch, with registers of some kinds, so many threads, and bytes of shared memory."""

    def __init__(self, device: Device, number: int, kinds: dict[str, np.dtype], threads: int, shared: int) -> None:
        x, y, _ = device.grid
        self.device, self.position = device, (number % x, number // x % y, number // x // y)
        self.threads, self.everyone = np.arange(threads), np.ones(threads, bool)
        self.values = Registers(kinds, threads)
        clock = np.zeros(device.blocks, np.int32)
        clock[number] = 1
        # What it sees of every block's accesses, and what it will see behind its next barrier.
        self.view, self.acquired = View(number, clock), clock.copy()
        # Shared memory knows no other block.
        self.inside = View(0, clock[number : number + 1])
        self.shared = Region("shared memory", np.full(shared, POISON, np.uint8), 0, 2, 1)
        # Asynchronous copies by group, the last of which is open; and what had changed at the last poll.
        self.copies: list[list] = [[]]
        self.polled = -1
        # Relaxed loads since then, which gave the latest values; and what threads see of such words, by region.
        self.fruitless = 0
        self.sights: dict[str, Sight] = {}

    def pass_barrier(self) -> None:
        """All threads see what each of them has done or acquired."""
        np.maximum(self.view.clock, self.acquired, out=self.view.clock)
        self.view.clock[self.view.block] += 1
        for sight in self.sights.values():
            sight.join()

    def waits(self, relaxed: bool) -> bool:
        """Whether to poll again can give nothing new; a loop polls by one acquire, or by many relaxed loads."""
        return self.polled == self.device.changes and (not relaxed or self.fruitless >= MOST_LOADS)

    def sight(self, region: Region) -> Sight:
        """What the threads see of a region's words, which they exchange by relaxed accesses."""
        if region.name not in self.sights:
            self.sights[region.name] = Sight(words_of(self.device, region), self.threads.size)
        return self.sights[region.name]

    def assign(self, name: str, value: np.ndarray, active: np.ndarray) -> None:
        """Write a register of the active threads; `value` has an entry for each thread, or one for all."""
        if name == "_":
            return
        dtype = self.values.kinds[name]
        if value.shape != active.shape:
            value = np.broadcast_to(value, active.shape)
        # A register may be wider than what is loaded into it.
        value = np.ascontiguousarray(value).view(dtype) if value.itemsize == dtype.itemsize else value.astype(dtype)
        if active is not self.everyone:
            value = np.where(active, value, self.values[name])
        self.values[name] = value

    def address(self, address: Address) -> np.ndarray:
        """The bytes that threads address; shared memory begins at 0."""
        if address.base.startswith("%"):
            return self.values[address.base].astype(np.int64) + address.offset
        return np.full(self.threads.size, address.offset)

    def special(self, name: str) -> np.ndarray | int:
        """A register that tells a thread where it is."""
        sort, axis = name[1:].split(".")
        if sort == "tid":
            return self.threads if axis == "x" else 0
        if sort == "ntid":
            return self.threads.size if axis == "x" else 1
        return {"ctaid": self.position, "nctaid": self.device.grid}[sort]["xyz".index(axis)]


def reader(operand: str, kind: str) -> Callable[[Block], np.ndarray]:
    """How to get at an operand's values in a type."""
    dtype = dtype_of(kind)
    if operand.startswith("%") and "." in operand:
        return lambda block: np.broadcast_to(np.asarray(block.special(operand), dtype), block.threads.shape)
    if operand.startswith(("0f", "0F", "0d", "0D")):
        bits = np.uint32 if operand[1] in "fF" else np.uint64
        constant = np.array([int(operand[2:], 16)], bits).view(dtype)
        return lambda block: constant
    if operand[0] in "-0123456789":
        width = dtype.itemsize * 8
        constant = np.array([int(operand.rstrip("U"), 0) % 2**width], BITS[dtype.itemsize]).view(dtype)
        return lambda block: constant
    if operand == "global_smem":
        return lambda block: np.zeros(1, dtype)
    return lambda block: block.values[operand].view(dtype)


def names(operand: str | tuple) -> tuple:
    return operand if isinstance(operand, tuple) else (operand,)
