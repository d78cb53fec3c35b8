"""What the registers of a thread have room for, so that no time loop spills.

No compiler can be asked before it has compiled, so these are limits in bytes per thread that were found by compiling
all of `aot`. An element is one of the tile's that a thread computes; it has gates, states and gradients.
"""

from typing import NamedTuple

from rnnfast_kernels.cells import CELLS
from rnnfast_kernels.gpu.problem import TRITON, Device, Plan, Problem, cdiv

# Values of k in one warp's part of a chunk; longer ones of TF32, shorter ones of float32, and longer ones of float32
# where a thread holds much else, a sum for each gate or a large tile, spill. A tile of fewer elements than threads has
# room for the shorter ones; where they end nearer to the last unit, more of the chunks stay on the chip.
CHUNK_SIZES = {
    "half": (128, 64, 32),
    "tf32": (32, 16),
    "ieee": (64, 32),
    "ieee crowded": (32,),
    "ieee small": (32, 16),
}


# Chunks that stay on the chip: the code of a step repeats for each.
MOST_KEPT = 16


def per_program(device: Device, warps: int) -> int:
    """All registers of a processor for one program. Unasked, ptxas leaves room for a second and spills for its sake."""
    return 0 if device.amd else min(255, 65536 // (32 * warps))


def elements(problem: Problem, block_b: int, reach: int, warps: int) -> int:
    """How many elements of the tile a thread computes; 0 where there are more threads than elements."""
    return block_b * reach // (problem.device.warp * warps)


def parts_of_k(problem: Problem, block_b: int, reach: int, warps: int) -> int:
    """A part of k for each warp, or fewer where their sums would take too many of a thread's registers."""
    sums = (2 if problem.backward else problem.recurrent) * block_b * reach
    room = (64 if problem.itemsize == 2 and not problem.backward else 32) * problem.device.warp * warps
    parts = min(warps, 1 << max(room // sums, 1).bit_length() - 1)
    # Warps that share a part without dividing it would have all of its sums each.
    return parts if parts == warps or divide_parts(problem) or problem.device.amd else 1


def divide_parts(problem: Problem) -> bool:
    """Whether warps with the same part of k divide its product among them, rather than computing all of it each.

    Triton lets them do so on NVIDIA, since 3.9. Without matrix instructions all threads have work of their own.
    """
    return problem.plain or (TRITON >= (3, 9) and not problem.device.amd)


def chunk_sizes(problem: Problem, count: int) -> tuple[int, ...]:
    """Lengths to try of one warp's part of a chunk, where a thread computes `count` elements."""
    kind = "half" if problem.itemsize == 2 else problem.precision
    crowded = kind == "ieee" and (not problem.backward or count > 2)
    if crowded and problem.plain and count == 0 and problem.H > 128:
        return CHUNK_SIZES["ieee small"]
    return CHUNK_SIZES["ieee crowded" if crowded else kind]


def one_part_of_many(problem: Problem, plan: Plan) -> bool:
    """Whether all warps divide one part of k among them only because their sums would be too many (`parts_of_k`).

    The compiler then takes operands of the whole part from shared memory early.
    """
    return plan.split == 1 and not problem.backward and not problem.device.amd and not divide_parts(problem)


def read_at_once(problem: Problem, plan: Plan) -> int:
    """Most bytes of an operand whose chunks are all on their way at once; plans give a thread 512 at most."""
    if problem.plain and not problem.backward:
        return 384 if plan.reach == 8 else 128
    return 64 if one_part_of_many(problem, plan) else 512


def read_by_chunk(problem: Problem, plan: Plan, count: int) -> int:
    """Most bytes of one chunk of one operand, of which the compiler reads as many ahead as it likes."""
    two_gradients = problem.backward and not CELLS[problem.cell].one_gradient
    own, only = elements(problem, plan.block_b, plan.block_n, plan.warps), one_part_of_many(problem, plan)
    many = plan.kept * problem.recurrent >= 24
    if problem.precision == "tf32" and not problem.backward and count == 2 and plan.reach == 8:
        # Weights no wider than a matrix instruction take so few registers that the operand may have more.
        return 128
    limits = {
        "beside the sums of all gates": (not problem.backward, 32),
        "of the only part of k, beside four gates": (only and problem.recurrent > 3, 0),
        "of the only part of k, with rows that are not aligned": (only and problem.row != problem.H, 0),
        "beside the operands of products without matrix instructions": (problem.plain, 32),
        "beside those and the sums of all gates": (problem.plain and not problem.backward, 48 // problem.recurrent),
        "beside all those and many tiles of weights": (many and problem.plain and not problem.backward, 12),
        "beside two elements in float32": (count == 2 and problem.itemsize == 4, 32),
        "beside a large tile": (problem.backward and not problem.plain and count > 2, 16),
        "beside gradients by both parts of the gates": (two_gradients and (count >= 1 or problem.plain), 24),
        "with rows that are not aligned": (problem.row != problem.H, 16),
        "with those and gradients of two elements": (problem.row != problem.H and problem.backward and own == 2, 12),
    }
    return min([64, *(most for applies, most in limits.values() if applies)])


def read_again(problem: Problem, plan: Plan, count: int) -> int:
    """Most bytes of operands and of one chunk of weights, where weights are read again, which takes their addresses."""
    # Where the last program has absent units, whether to read a row of weights takes a register as well.
    absent = problem.H % plan.reach > 0
    if problem.plain:
        return 160 if count == 0 and not problem.backward and not absent else 0
    if one_part_of_many(problem, plan):
        return 0
    if count <= 1 and problem.device.amd:
        return 600
    if count <= 1:
        # Of others than these no limit was met.
        return 400 if absent and problem.itemsize == 4 and not problem.backward else 2**20
    if count == 2 and problem.itemsize == 2:
        return 440
    if count == 2:
        if absent and not problem.backward and problem.recurrent * plan.reach > 96:
            return 0
        return 340 if absent else 380
    return 230 if problem.backward else 300


def most_kept(problem: Problem, count: int) -> int:
    """Most chunks that stay on the chip, each of which is a tile of weights, with its addresses, for every gate."""
    if problem.backward and count > 2:
        return min(MOST_KEPT, 40 // problem.recurrent)
    if problem.precision == "tf32" and not problem.backward and count >= 2:
        return min(MOST_KEPT, 44 // problem.recurrent)
    return MOST_KEPT


def in_grid(problem: Problem, plan: Plan) -> int:
    """Most bytes of sums and operands of a program that multiplies for its whole column."""
    own, shifted = elements(problem, plan.block_b, plan.block_n, plan.warps), problem.row != problem.H
    again = plan.kept < plan.chunks
    limits = {
        "of many rows without matrix instructions": (problem.plain and plan.block_b > 32, 180),
        "beside weights that are read again": (again, 200),
        "with rows that are not aligned, beside more than two elements": (shifted and own > 2, 200),
        "chunk by chunk": (not plan.eager, 180),
        "with rows that are not aligned, chunk by chunk": (shifted and (again or not plan.eager), 120),
    }
    return min([256, *(most for applies, most in limits.values() if applies)])


def copies(plan: Plan) -> int:
    """How many warps hold the same weights: those without a part of k or, of the only part, columns of their own.

    AMD's matrix instructions are 16 columns wide, or 32 where there are as many rows.
    """
    wide = 16 if plan.block_b < 32 else 32
    return plan.warps // (plan.split if plan.split > 1 else min(plan.warps, cdiv(plan.reach, wide)))


def repeats(problem: Problem, plan: Plan) -> int:
    """How many warps compute the same products: those without a part of k, unless they divide a tile that is large."""
    if plan.split == 1 or problem.plain:
        return 1
    if not divide_parts(problem):
        return copies(plan)
    return max(1, copies(plan) // (cdiv(plan.block_b, 16) * cdiv(plan.reach, 8)))


class Readers(NamedTuple):
    """How many warps read the same rows of an operand, and how many the weights of the same units."""

    rows: int
    units: int


def readers(problem: Problem, plan: Plan) -> Readers:
    """Of the warps with the same part of k, as Triton divides a tile among them on NVIDIA."""
    sharing = plan.warps // plan.split
    if problem.plain or problem.device.amd:
        return Readers(1, 1)
    if plan.split > 1 and not divide_parts(problem):
        return Readers(sharing, sharing)
    rows = units = 1
    while rows * units < sharing:
        left = cdiv(plan.block_b, 16 * rows)
        if left > 1 and left >= plan.reach // (16 * units):
            rows *= 2
        else:
            units *= 2
    return Readers(units, rows)


def hold_weights(problem: Problem, plan: Plan) -> bool:
    """Whether the weights that stay on the chip leave room for the rest on AMD, where they stay in registers.

    A processor has 512 KiB of them. A quarter is for operands and the cell; with more than two copies of the weights,
    or in a grid with more than one, it is not enough, because there are as many of the sums.
    """
    kept = plan.kept * problem.recurrent * plan.reach * plan.split * plan.block_k * problem.itemsize
    return copies(plan) <= (2 if plan.slices == 1 else 1) and copies(plan) * kept <= 384 * 1024


def suffice(problem: Problem, plan: Plan) -> bool:
    """Whether a thread has the registers for what a step of a cooperative plan reads."""
    count = elements(problem, plan.block_b, plan.reach, plan.warps)
    chunk = plan.split * plan.block_k * problem.itemsize / (problem.device.warp * plan.warps)
    operand = plan.block_b * chunk
    if plan.kept < plan.chunks:
        entries = problem.recurrent if problem.backward else 1
        again = (plan.kept + 1) * entries * operand + problem.recurrent * plan.reach * chunk
        if again > read_again(problem, plan, count):
            return False
    if plan.kept > most_kept(problem, count):
        return False
    if problem.device.amd and not hold_weights(problem, plan):
        return False
    arriving = max(1, plan.kept if plan.eager else 1) * problem.recurrent * operand
    if plan.slices > 1 and 4 * count + arriving > in_grid(problem, plan):
        return False
    if plan.eager:
        return plan.kept * operand <= read_at_once(problem, plan)
    return operand <= read_by_chunk(problem, plan, count)
