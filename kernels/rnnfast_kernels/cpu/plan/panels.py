"""Weights packed into panels before any call, and back: what the panels hold, byte by byte.

The layout of panels is that of `tile` and `products`: in place of one float32, a number of terms that the format says,
and for scaled formats a float32 scale for each row of the weight (see `int8`).

A weight is [G*units, depth], its bias and scales are [G*units]. All of a layer's panels stand in one buffer, and behind
them the parameters of its cell, [P, H] for each direction, in float32.
"""

import functools
from typing import NamedTuple

import numpy as np

from rnnfast_kernels.cells import CELLS
from rnnfast_kernels.cpu.target import Target, widest_panel

# Bytes that each matrix is aligned to, and those of a parameter.
LINE, PARAMETER_BYTES = 64, 4


class Matrix(NamedTuple):
    """Panels of one weight: its name, direction, sizes, and the offset in the layer's buffer."""

    name: str
    direction: int
    gates: int
    units: int
    depth: int
    offset: int


class Layout(NamedTuple):
    """The panels of a layer, offsets of each direction's parameters, and the bytes of its buffer."""

    matrices: tuple[Matrix, ...]
    parameters: tuple[int, ...]
    size: int


@functools.lru_cache(maxsize=1024)
def layout(
    chosen: Target, cell_name: str, inputs: int, hidden: int, width: int, projected: bool, directions: int
) -> Layout:
    """Place a layer's matrices, and its parameters, one after another."""
    cell = CELLS[cell_name]
    sizes = [("w_ih", cell.gates, hidden, inputs), ("w_hh", cell.recurrent, hidden, width)]
    sizes += [("w_hr", 1, width, hidden)] * projected
    matrices, offset = [], 0
    for direction in range(directions):
        for name, gates, units, depth in sizes:
            if gates:
                matrices.append(Matrix(name, direction, gates, units, depth, offset))
                offset += -(-matrix_bytes(chosen, gates, units, depth) // LINE) * LINE
    size = -(-len(cell.parameters) * hidden * PARAMETER_BYTES // LINE) * LINE
    parameters = tuple(offset + direction * size for direction in range(directions if size else 0))
    return Layout(tuple(matrices), parameters, offset + directions * size)


def matrix_bytes(chosen: Target, gates: int, units: int, depth: int) -> int:
    return gates * -(-units // chosen.lanes) * (chosen.head + chosen.lines(depth)) * chosen.vector


def strips(chosen: Target, gates: int, units: int) -> list[tuple[int, int]]:
    """First vector and number of vectors of each strip, in the order of [blocks, G] vectors."""
    widest, blocks = widest_panel(gates), -(-units // chosen.lanes)
    strip, found, block = chosen.strip(gates * widest), [], 0
    while block < blocks:
        left = blocks - block
        count = next(n for n in (4, 2, 1) if n <= widest and n <= left)
        first, vectors = block * gates, count * gates
        found += [(first + v, min(strip, vectors - v)) for v in range(0, vectors, strip)]
        block += count
    return found


def item_type(chosen: Target) -> str:
    """NumPy's name of the type of a weight's numbers."""
    return chosen.format.array if chosen.format else chosen.dtype


def pack(
    chosen: Target,
    matrix: Matrix,
    buffer: np.ndarray,
    weight: np.ndarray,
    bias: np.ndarray | None,
    scale: np.ndarray | None,
) -> None:
    """Write a weight into the layer's buffer of uint8. weight: of `item_type`; bias, scale: float32."""
    _, _, gates, units, depth, _ = matrix
    blocks, lanes, terms = -(-units // chosen.lanes), chosen.lanes, chosen.terms
    lines = chosen.lines(depth)
    padded = np.zeros((gates, blocks * lanes, lines * terms), item_type(chosen))
    padded[:, :units, :depth] = weight.reshape(gates, units, depth)
    terms_of = padded.reshape(gates, blocks, lanes, lines, terms).transpose(1, 0, 3, 2, 4)
    vectors = np.zeros((blocks * gates, chosen.head + lines, chosen.vector), np.uint8)
    body = np.ascontiguousarray(terms_of).view(np.uint8)
    vectors[:, chosen.head :] = body.reshape(blocks * gates, lines, chosen.vector)
    rows = [None if bias is None else bias.view(np.uint32)]
    if chosen.is_scaled:
        first = -128 * weight.reshape(gates * units, depth).sum(1, dtype=np.int32) if chosen.adds_128 else None
        rows = [None if first is None else first.view(np.uint32), scale.view(np.uint32), *rows]
    for line, row in enumerate(rows):
        if row is not None:
            of_units = np.zeros((gates, blocks * lanes), np.uint32)
            of_units[:, :units] = row.reshape(gates, units)
            placed = np.ascontiguousarray(of_units.reshape(gates, blocks, lanes).transpose(1, 0, 2))
            vectors[:, line] = placed.view(np.uint8).reshape(blocks * gates, chosen.vector)
    offset = matrix.offset
    for first, count in strips(chosen, gates, units):
        strip = vectors[first : first + count].transpose(1, 0, 2)
        buffer[offset : offset + strip.size] = strip.reshape(-1)
        offset += strip.size


def unpack(chosen: Target, matrix: Matrix, buffer: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
    """Return the weight, the bias and the scales that `pack` was given; zeros where there was no bias."""
    _, _, gates, units, depth, offset = matrix
    blocks, lanes, terms, lines = -(-units // chosen.lanes), chosen.lanes, chosen.terms, chosen.lines(matrix.depth)
    vectors = np.empty((blocks * gates, chosen.head + lines, chosen.vector), np.uint8)
    for first, count in strips(chosen, gates, units):
        size = count * (chosen.head + lines) * chosen.vector
        strip = buffer[offset : offset + size].reshape(chosen.head + lines, count, chosen.vector)
        vectors[first : first + count] = strip.transpose(1, 0, 2)
        offset += size

    def row(line: int) -> np.ndarray:
        placed = np.ascontiguousarray(vectors[:, line]).view(np.float32).reshape(blocks, gates, lanes)
        return placed.transpose(1, 0, 2).reshape(gates, -1)[:, :units].reshape(-1).copy()

    body = np.ascontiguousarray(vectors[:, chosen.head :]).view(item_type(chosen))
    terms_of = body.reshape(blocks, gates, lines, lanes, terms).transpose(1, 0, 3, 2, 4)
    weight = terms_of.reshape(gates, blocks * lanes, lines * terms)[:, :units, :depth]
    weight = np.ascontiguousarray(weight).reshape(gates * units, depth)
    return weight, row(chosen.head - 1), row(1) if chosen.is_scaled else None
