"""Instructions that a warp executes together: matrices of 8 x 8 in shared memory, products, exchanges between lanes."""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from ptx.block import Block, names, reader
from ptx.code import Address
from ptx.memory import Fault
from ptx.operations import Unknown, from_bf16

WARP = 32
# A lane's place in the tiles of mma (PTX ISA, "Matrix Fragments for mma.m16n8k16" and the like).
GROUP, MEMBER = np.arange(WARP) // 4, np.arange(WARP) % 4


def by_warp(values: np.ndarray) -> np.ndarray:
    """Entries of threads as [warps, lanes, ...]."""
    return values.reshape(-1, WARP, *values.shape[1:])


def whole_warps(active: np.ndarray) -> np.ndarray:
    """Which warps take part in an instruction that wants all of their threads: [warps]."""
    warps = by_warp(active)
    if (warps.any(1) != warps.all(1)).any():
        raise Fault("an instruction for whole warps runs in a part of one")
    return warps.all(1)


def matrix_rows(block: Block, active: np.ndarray, address: Address, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Threads and addresses of the rows of `count` matrices of 8 x 8: [warps, count * 8]."""
    warps = whole_warps(active)
    addresses, threads = by_warp(block.address(address))[warps], by_warp(block.threads)[warps]
    return threads[:, : 8 * count], addresses[:, : 8 * count]


def load(opcode: tuple[str, ...], operands: tuple) -> Callable:
    """ldmatrix: lane l holds elements 2 (l % 4) and the next of row l // 4 of each matrix, or of column l // 4."""
    targets, source = names(operands[0]), operands[1]
    count = len(targets)

    def act(block: Block, active: np.ndarray) -> None:
        threads, addresses = matrix_rows(block, active, source, count)
        content = block.shared.load(block.inside, threads.ravel(), addresses.ravel(), 16).view(np.uint16)
        matrices = content.reshape(-1, count, 8, 8)
        if "trans" in opcode:
            matrices = matrices.swapaxes(-1, -2)
        fragments = np.ascontiguousarray(matrices).reshape(-1, count, WARP, 2).view(np.uint32)[..., 0]
        for n, name in enumerate(targets):
            value = np.zeros(active.size, np.uint32)
            value[active] = fragments[:, n].ravel()
            block.assign(name, value, active)

    return act


def store(opcode: tuple[str, ...], operands: tuple) -> Callable:
    """stmatrix: the inverse of ldmatrix."""
    target, sources = operands[0], names(operands[1])
    count = len(sources)

    def act(block: Block, active: np.ndarray) -> None:
        threads, addresses = matrix_rows(block, active, target, count)
        fragments = np.stack([by_warp(block.values[name])[whole_warps(active)] for name in sources], axis=1)
        matrices = fragments[..., None].view(np.uint16).reshape(-1, count, 8, 8)
        if "trans" in opcode:
            matrices = matrices.swapaxes(-1, -2)
        rows = np.ascontiguousarray(matrices).reshape(-1, 8).view(np.uint8)
        block.shared.store(block.inside, threads.ravel(), addresses.ravel(), rows)

    return act


def shuffle(opcode: tuple[str, ...], operands: tuple) -> Callable:
    """shfl.sync: another lane's value, by its number or by the bits in which it differs."""
    how, target, source = opcode[2], operands[0], operands[1]
    if how not in ("bfly", "idx"):
        raise Unknown(".".join(opcode))
    read = reader(operands[2], "u32")

    def act(block: Block, active: np.ndarray) -> None:
        whole_warps(active)
        lanes = by_warp(np.broadcast_to(read(block), active.shape).astype(np.int64))
        lanes = lanes ^ np.arange(WARP) if how == "bfly" else lanes
        block.assign(target.split("|")[0], np.take_along_axis(by_warp(block.values[source]), lanes, 1).ravel(), active)

    return act


class Fragments(NamedTuple):
    """Where the elements that a lane holds of a matrix lie: [lanes, elements], in the order of its registers."""

    rows: np.ndarray
    columns: np.ndarray

    def gather(self, values: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
        """The matrices [warps, *shape] from what lanes hold: [warps, lanes, elements]."""
        matrices = np.zeros((values.shape[0], *shape), values.dtype)
        matrices[:, self.rows, self.columns] = values
        return matrices


def fragments(rows: list, columns: list) -> Fragments:
    return Fragments(*(np.stack(np.broadcast_arrays(*places), axis=1) for places in (rows, columns)))


def multiply(opcode: tuple[str, ...], operands: tuple) -> Callable:
    """mma.m16n8k16 of half precision and mma.m16n8k8 of TF32, accumulated in float32."""
    shape, kind = opcode[3], opcode[-2]
    if shape not in ("m16n8k16", "m16n8k8") or kind not in ("bf16", "f16", "tf32") or opcode[-1] != "f32":
        raise Unknown(".".join(opcode))
    depth = int(shape[6:])
    per_register = 1 if kind == "tf32" else 2
    # Registers of A: rows g and g + 8 of the first half of the columns, then of the second; of B: one per half.
    near = [MEMBER * per_register + n for n in range(per_register)]
    far = [column + 4 * per_register for column in near]
    lower, upper = [GROUP] * per_register, [GROUP + 8] * per_register
    places_a = fragments((lower + upper) * 2, near * 2 + far * 2)
    places_b = fragments(near + far, lower * 2)
    places_c = fragments([GROUP, GROUP, GROUP + 8, GROUP + 8], [2 * MEMBER, 2 * MEMBER + 1] * 2)
    targets, *sources = operands

    def values(block: Block, registers: tuple, warps: np.ndarray) -> np.ndarray:
        bits = np.stack([by_warp(reader(name, "b32")(block))[warps] for name in registers], axis=2)
        if kind == "tf32":
            return (bits & np.uint32(0xFFFFE000)).view(np.float32)
        halves = bits.view(np.uint16)
        return from_bf16(halves) if kind == "bf16" else halves.view(np.float16).astype(np.float32)

    def act(block: Block, active: np.ndarray) -> None:
        warps = whole_warps(active)
        a = places_a.gather(values(block, sources[0], warps), (16, depth))
        b = places_b.gather(values(block, sources[1], warps), (depth, 8))
        c = np.stack([by_warp(accumulator(block, name))[warps] for name in sources[2]], axis=2)
        product = (a.astype(np.float64) @ b.astype(np.float64) + places_c.gather(c, (16, 8))).astype(np.float32)
        result = product[:, places_c.rows, places_c.columns]
        for n, name in enumerate(targets):
            value = np.zeros(active.size, np.float32)
            value[active] = result[..., n].ravel()
            block.assign(name, value, active)

    return act


def accumulator(block: Block, name: str) -> np.ndarray:
    return np.broadcast_to(reader(name, "f32")(block), block.threads.shape)
