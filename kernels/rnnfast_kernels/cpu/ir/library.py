"""The module of all functions that the intrinsics of `tile`, `transpose`, `unpacked` and a format of weights call.

They are a module of their own because Numba optimises what a function contains again for each of its callers.
"""

import itertools

from llvmlite import ir

from rnnfast_kernels.cpu.ir import held, tile, transpose, unpacked
from rnnfast_kernels.cpu.target import Target


def library(target: Target, gates: set[int]) -> ir.Module:
    """Define them, for panels of these numbers of gates."""
    module = ir.Module("rnnfast")
    if target.format:
        held.products_of(target).define(module, target)
    else:
        transpose.transpose_function(module, target)
    shapes = set()
    for vectors, rows, each in itertools.chain.from_iterable(tile.tiles(target, g) for g in gates):
        shapes |= {(rows, each), (rows, (vectors - 1) % each + 1)}
    for rows, vectors in sorted(shapes):
        tile.tile_function(module, target, rows, vectors)
    for rows in range(1, unpacked.most_rows(target) + 1):
        unpacked.unpacked_function(module, target, rows)
    return module
