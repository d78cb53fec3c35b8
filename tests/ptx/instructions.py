"""Instructions on registers and memory: from an opcode and its operands to what they do to a block's active threads."""

from collections.abc import Callable

import numpy as np

from ptx.block import POISON, Block, names, reader
from ptx.operations import BITS, Unknown, dtype_of, operation, packed_comparison


def calculation(opcode: tuple[str, ...], operands: tuple) -> Callable:
    """An operation on registers."""
    function, kinds, result = operation(opcode)
    target, *sources = operands
    readers = [reader(source, kind) for source, kind in zip(sources, kinds, strict=True)]
    dtype = dtype_of(result)

    def act(block: Block, active: np.ndarray) -> None:
        block.assign(target, np.asarray(function(*(read(block) for read in readers)), dtype), active)

    return act


def compare_halves(opcode: tuple[str, ...], operands: tuple) -> Callable:
    """setp of two values in a register, into two predicates: p|q."""
    targets, sources = operands[0].split("|"), operands[1:]
    comparisons = packed_comparison(opcode)

    def act(block: Block, active: np.ndarray) -> None:
        values = [block.values[name] for name in sources]
        for target, compare in zip(targets, comparisons, strict=True):
            block.assign(target, compare(*values), active)

    return act


def move_parts(operands: tuple) -> Callable:
    """mov between a register and the registers that it is put together from, the lowest bits first."""
    target, source = operands

    def act(block: Block, active: np.ndarray) -> None:
        if isinstance(source, tuple):
            parts = np.stack([block.values[name] for name in source], axis=1)
            block.assign(target, parts.view(BITS[parts.itemsize * len(source)])[:, 0], active)
        else:
            value = block.values[source]
            parts = value[:, None].view(BITS[value.itemsize // len(target)])
            for n, name in enumerate(target):
                block.assign(name, parts[:, n], active)

    return act


def width_of(opcode: tuple[str, ...]) -> tuple[int, int]:
    """Bytes of an element of a load or store, and how many of them."""
    vector = next((int(part[1:]) for part in opcode if part in ("v2", "v4", "v8")), 1)
    return int(opcode[-1][1:]) // 8, vector


def load(opcode: tuple[str, ...], operands: tuple) -> Callable:
    """ld: of parameters, of global or of shared memory, into one register or several."""
    targets, source = names(operands[0]), operands[1]
    element, count = width_of(opcode)

    def parameter(block: Block, active: np.ndarray) -> None:
        value = block.device.parameters[source.base]
        block.assign(targets[0], np.array([value % 2 ** (8 * element)], BITS[element]), active)

    def memory(block: Block, active: np.ndarray) -> None:
        threads, addresses = block.threads[active], block.address(source)[active]
        if opcode[1] == "relaxed":
            content = load_relaxed(block, threads, addresses, opcode, count)
        elif "acquire" in opcode:
            content = acquire(block, opcode, threads, addresses, element)
        elif opcode[1] == "global":
            content = block.device.memory.region(addresses).load(block.view, threads, addresses, element * count)
        else:
            content = block.shared.load(block.inside, threads, addresses, element * count)
        parts = np.zeros((active.size, count), BITS[element])
        parts[active] = np.ascontiguousarray(content).view(BITS[element])
        for n, name in enumerate(targets):
            block.assign(name, parts[:, n], active)

    return parameter if opcode[1] == "param" else memory


def load_relaxed(block: Block, threads: np.ndarray, addresses: np.ndarray, opcode: tuple[str, ...], count: int):
    """Words that other blocks may change meanwhile."""
    check_relaxed(opcode)
    content, latest = block.sight(block.device.memory.region(addresses)).load(threads, addresses, count)
    if not latest or block.polled != block.device.changes:
        block.polled, block.fruitless = block.device.changes, 0
    block.fruitless += 1
    return content


def check_relaxed(opcode: tuple[str, ...]) -> None:
    if opcode[1:4] != ("relaxed", "gpu", "global") or opcode[-1] not in ("b32", "u32"):
        raise Unknown(".".join(opcode))


def fence(opcode: tuple[str, ...], operands: tuple) -> Callable:
    """fence.acq_rel.gpu: of words that are exchanged by relaxed accesses; blocks have other means for all else."""
    if opcode[1:] != ("acq_rel", "gpu"):
        raise Unknown(".".join(opcode))

    def act(block: Block, active: np.ndarray) -> None:
        for sight in block.sights.values():
            sight.fence(block.threads[active])

    return act


def ordered(opcode: tuple[str, ...], order: str) -> bool:
    """Whether an access acquires or releases, for all blocks of a device to see."""
    return (order in opcode or "acq_rel" in opcode) and ("gpu" in opcode or "sys" in opcode)


def acquire(
    block: Block, opcode: tuple[str, ...], threads: np.ndarray, addresses: np.ndarray, width: int
) -> np.ndarray:
    """Read what atomic operations write, and see, behind the next barrier, what was done before they released it."""
    device = block.device
    region = device.memory.region(addresses)
    if ordered(opcode, "acquire"):
        for address in addresses.tolist():
            np.maximum(block.acquired, device.released.get(address, 0), out=block.acquired)
            for (released, name), view in device.views.items():
                if released == address:
                    block.sight(device.exchanged[name].region).heed(threads, view)
    block.polled, block.fruitless = device.changes, 0
    return region.content[region.offsets(addresses, width)[:, None] + np.arange(width)]


def store(opcode: tuple[str, ...], operands: tuple) -> Callable:
    """st: one register or several, to global or to shared memory."""
    target, sources = operands[0], names(operands[1])
    element, _ = width_of(opcode)
    readers = [reader(source, f"b{8 * element}") for source in sources]

    def act(block: Block, active: np.ndarray) -> None:
        threads, addresses = block.threads[active], block.address(target)[active]
        values = np.stack([np.broadcast_to(read(block), active.shape)[active] for read in readers], axis=1)
        values = values.view(np.uint8)
        if opcode[1] == "relaxed":
            check_relaxed(opcode)
            block.sight(block.device.memory.region(addresses)).store(threads, addresses, values.view(np.uint32)[:, 0])
            block.device.changes += 1
        elif opcode[1] == "global":
            block.device.memory.region(addresses).store(block.view, threads, addresses, values)
        else:
            block.shared.store(block.inside, threads, addresses, values)

    return act


def atomic(opcode: tuple[str, ...], operands: tuple) -> Callable:
    """red and atom: an addition of 32 bits for every program of the device to see, with what its order publishes."""
    if "add" not in opcode or opcode[1] != "global" or opcode[-1] not in ("u32", "s32"):
        raise Unknown(".".join(opcode))
    result, target, source = operands if opcode[0] == "atom" else (None, *operands)
    read = reader(names(source)[0], "u32")
    releases = ordered(opcode, "release")

    def act(block: Block, active: np.ndarray) -> None:
        device, addresses = block.device, block.address(target)[active]
        region = device.memory.region(addresses)
        places = region.offsets(addresses, 4)
        added = np.broadcast_to(read(block), active.shape)[active]
        before = np.zeros(active.size, np.uint32)
        if "acquire" in opcode or "acq_rel" in opcode:
            acquire(block, opcode, block.threads[active], addresses, 4)
        for thread, place, address, number in zip(
            np.flatnonzero(active), places, addresses.tolist(), added, strict=True
        ):
            word = region.content[place : place + 4].view(np.uint32)
            before[thread] = word[0]
            word += number
            if releases:
                earlier = device.released.get(address, 0)
                device.released[address] = np.maximum(block.view.clock, earlier)
                for name, sight in block.sights.items():
                    seen = device.views.get((address, name), 0)
                    device.views[address, name] = np.maximum(sight.view[thread], seen)
        if added.any():
            device.changes += 1
        if result is not None:
            block.assign(names(result)[0], before, active)

    return act


def copy(opcode: tuple[str, ...], operands: tuple) -> Callable:
    """cp.async: from global to shared memory, some time before it is waited for."""
    if "commit_group" in opcode:
        return lambda block, active: block.copies.append([])
    if "wait_group" in opcode or "wait_all" in opcode:
        left = int(operands[0], 0) if operands else 0

        def wait(block: Block, active: np.ndarray) -> None:
            # The last group is open: it has not been committed.
            while len(block.copies) > left + 1:
                for arriving in block.copies.pop(0):
                    block.shared.arrive(block.inside, *arriving)

        return wait
    target, source, width = operands[0], operands[1], int(operands[2], 0)
    size = reader(operands[3], "u32") if len(operands) > 3 else lambda block: np.array([width], np.uint32)

    def act(block: Block, active: np.ndarray) -> None:
        threads, addresses = block.threads[active], block.address(source)[active]
        sizes = np.broadcast_to(size(block), active.shape)[active]
        content = np.zeros((threads.size, width), np.uint8)
        wanted = sizes > 0
        if wanted.any():
            if (sizes[wanted] != width).any():
                raise Unknown("cp.async of a part")
            region = block.device.memory.region(addresses[wanted])
            content[wanted] = region.load(block.view, threads[wanted], addresses[wanted], width)
        places = block.shared.offsets(block.address(target)[active], width)
        block.shared.claim(block.inside, threads, places, width, pending=True)
        block.shared.content[places[:, None] + np.arange(width)] = POISON
        block.copies[-1].append((threads, places, content))

    return act
