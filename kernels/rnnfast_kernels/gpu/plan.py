"""Which loop runs a layer, in which tiles: a pure function of the sizes and the device, testable without a GPU.

The recurrence is bound by latency, so a plan minimises a model of the time of one step: the barrier, the bytes that
each processor reads per step, and its multiply-adds. The model's constants are per architecture, in `RATES`.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from itertools import product

from triton import knobs

from rnnfast_kernels.cells import CELLS
from rnnfast_kernels.gpu import TRITON
from rnnfast_kernels.gpu.problem import FIRST_WITH_GLUON, Device, Plan, Problem, cdiv, next_power


@dataclass(frozen=True)
class Rates:
    """Constants of the model: microseconds, and kilobytes and multiply-adds per microsecond of one processor.

    A step costs `overhead` in any fused loop; in a cooperative one `barrier` more, or `polled` where values are polled,
    and `latency` for each time that it waits for its operands. A streamed step costs `streamed`.
    """

    overhead: float
    barrier: float
    polled: float
    latency: float
    streamed: float
    l2: float
    shared: float
    products: dict[str, float]


RATES = {
    "sm_80": Rates(0.35, 0.9, 0.25, 0.4, 14.0, 45.0, 150.0, {"half": 6e5, "tf32": 3e5, "ieee": 6e4}),
    "sm_90": Rates(0.25, 0.8, 0.15, 0.3, 12.0, 60.0, 200.0, {"half": 1.1e6, "tf32": 5.5e5, "ieee": 1.2e5}),
    "sm_100": Rates(0.25, 0.8, 0.15, 0.3, 12.0, 60.0, 200.0, {"half": 1.1e6, "tf32": 5.5e5, "ieee": 1.2e5}),
    "gfx942": Rates(0.5, 1.5, 1.5, 0.6, 20.0, 45.0, 120.0, {"half": 6e5, "tf32": 1.5e5, "ieee": 1.5e5}),
}


# Whether the programs of a Gluon loop poll values rather than a counter: not before a GPU has run it.
POLLED = False
# Warps of a Gluon loop, and values of k that one of them has at least.
WARPS, UNIT = 8, 16
# Registers per thread of a Gluon loop, found by compiling: the limit; beside weights, sums and operands a base, by
# pass; for each element of the tile that a thread has, by pass; more, per byte of an entry, for polling in backward and
# for weights read from shared memory.
ROOM, BASE, ELEMENT, POLLING, READING = 240, {False: 28, True: 60}, {False: 20, True: 40}, 10, 16
# Rows of a Gluon loop's tile, by pass.
MOST_ROWS = {False: 32, True: 16}
# Triton loops: candidates for block_k by precision, and for the number of slices in backward.
BLOCK_K = {"half": (128, 64, 32), "tf32": (32, 16), "ieee": (32,)}
SLICES = (1, 4, 8, 16)
# Registers of a thread that a step may take there, see `registers_of_step`; of 255, or 256 on AMD.
STEP_ROOM = 128


def streamed(problem: Problem) -> Plan:
    """A library product and a pointwise kernel per step."""
    block_n = min(128, max(16, next_power(problem.H)))
    # In float64 a thread has room for half as many elements. A grid has 65,535 programs at most along the batch.
    block_b = max(min(4 if problem.itemsize == 8 else 8, next_power(problem.B)), next_power(cdiv(problem.B, 65535)))
    return Plan("streamed", block_b, block_n, 4, problem.precision)


def make(problem: Problem, loop: str, block_b: int, block_n: int, warps: int, members: int = 1, **rest) -> Plan:
    """A plan of all steps in one launch, with what follows from the problem alone."""
    # All registers of a processor for one program. Unasked, ptxas leaves room for a second and spills for its sake.
    registers = 0 if problem.device.amd else min(255, 65536 // (32 * warps))
    programs = members * cdiv(problem.B, block_b) * problem.D
    own = {"row": problem.row, "k_last": problem.k_last, "registers": registers, "members": members}
    return Plan(loop, block_b, block_n, warps, problem.precision, programs=programs, **own, **rest)


def resident(problem: Problem, block_b: int, warps: int) -> Plan:
    """Every program holds all weights, padded to a power of two, and shares with nobody."""
    width = max(16, next_power(problem.H))
    weights = problem.recurrent * width * width * problem.itemsize
    operand = block_b * width * problem.itemsize * (problem.recurrent if problem.backward else 1)
    return make(problem, "resident", block_b, width, warps, block_k=width, chunks=1, shared=weights + operand)


def without_product(problem: Problem) -> Plan:
    """Each program runs a tile of rows and units alone, without weights: a row, or a few where there are many."""
    warp = problem.device.warp
    block_n = min(128, max(warp, next_power(problem.H)))
    warps, columns = block_n // warp, cdiv(problem.H, block_n)
    # A unit for each thread, and as many rows as it takes for at most 32 warps to a processor.
    fill = cdiv(problem.B * problem.D * columns * warps, problem.device.processors * 32)
    block_b = min(8, next_power(problem.B), next_power(fill))
    programs = cdiv(problem.B, block_b) * problem.D * columns
    return Plan("resident", block_b, block_n, warps, members=columns, programs=programs, row=problem.row)


def cooperative(problem: Problem, block_b: int, block_n: int, warps: int, slices: int = 1) -> Plan:
    """Groups of programs, block_n units each, share a tile of block_b rows; all else follows from these numbers.

    Each warp has a part of k. Where programs form a grid, of `slices` of k, a slice is short and a program's tile wide:
    then the warps divide the tile.
    """
    reach = block_n * slices
    columns = cdiv(problem.H, reach)
    span, split = min(problem.H, columns * block_n), warps if slices == 1 else 1
    sizes = BLOCK_K["half" if problem.itemsize == 2 else problem.precision]
    block_k = min(sizes, key=lambda size: cdiv(span, split * size) * size)
    chunks = cdiv(span, split * block_k)
    # Bytes of a chunk, and of the sums, four of which are exchanged at once.
    operand = block_b * split * block_k * problem.itemsize * (problem.recurrent if problem.backward else 1)
    weights = problem.recurrent * reach * split * block_k * problem.itemsize
    sums = split * block_b * reach * 4 * (1 if problem.backward or problem.recurrent == 1 else 4)
    if problem.device.amd:
        # Weights are in registers there; on their way, a chunk of one gate's at a time passes through shared memory.
        shared = max(operand, sums, weights // problem.recurrent)
    else:
        shared = max(sums, chunks * operand) + chunks * weights
    cut = {"block_k": block_k, "split": split, "chunks": chunks, "slices": slices}
    return make(problem, "cooperative", block_b, block_n, warps, columns * slices, shared=shared, **cut)


def registers_of_step(problem: Problem, plan: Plan) -> int:
    """What a step of a Triton loop takes of a thread's registers for its operand and its sums, which STEP_ROOM limits.

    A sum counts once for each gate, twice in backward. Without matrix instructions, factors wait in registers: there a
    sum counts twelvefold, or forward with more than 8 units the operand threefold. TF32 takes a few more. On AMD the
    weights may take as many.
    """
    threads = problem.device.warp * plan.warps
    operand = plan.block_b * plan.width * problem.itemsize * (problem.recurrent if problem.backward else 1)
    times, weight = 1, 2 if problem.backward else problem.recurrent
    if problem.plain:
        times, weight = (1, 12) if problem.backward or plan.block_n == 8 else (3, problem.recurrent)
    step = times * operand // (4 * threads) + weight * plan.split * plan.block_b * plan.reach // threads
    if problem.precision == "tf32":
        step += 8 if problem.backward else 24
    if not problem.device.amd:
        return step
    # Warps without columns of their own hold the same weights: an instruction is 16 wide, or 32 for as many rows.
    wide = 16 if plan.block_b < 32 else 32
    copies = plan.warps // (plan.split if plan.split > 1 else min(plan.warps, cdiv(plan.reach, wide)))
    weights = copies * problem.recurrent * plan.reach * plan.width * problem.itemsize
    return max(step, weights // (4 * threads))


def can_gluon(problem: Problem) -> bool:
    """Whether a problem has a Gluon loop: a cell of torch's form, matrix instructions of NVIDIA since sm_80, and a
    Triton that has Gluon."""
    arch = problem.device.arch
    if problem.plain or problem.itemsize == 8 or not arch.startswith("sm_") or int(arch[3:]) < 80:
        return False
    if not CELLS[problem.cell].standard:
        return False
    return TRITON >= FIRST_WITH_GLUON and not knobs.runtime.interpret


def gluon(problem: Problem, block_b: int, block_n: int, polled: bool | None = None) -> Plan:
    """The Gluon loop with tiles of block_b rows and block_n units: two numbers, from which all else follows.

    The weights that a thread's registers do not hold are in shared memory.
    """
    members, units = cdiv(problem.H, block_n), cdiv(problem.H, WARPS * UNIT)
    threads, products = 32 * WARPS, 1 if problem.backward else problem.gates
    weights = problem.gates * block_n * WARPS * UNIT * problem.itemsize  # of a unit
    sums = products * block_b * block_n // 32
    operand = min(64, block_b * units * UNIT * problem.gates // products * problem.itemsize // 128)
    polled = POLLED if polled is None else polled
    rest = BASE[problem.backward] + ELEMENT[problem.backward] * cdiv(block_b * block_n, threads)
    rest += POLLING * problem.itemsize if polled and problem.backward else 0
    free = ROOM - sums - operand - rest
    kept = min(units, free * 4 * threads // weights)
    if kept < units:
        # What comes from shared memory takes registers too.
        kept = max(0, (free - READING * problem.itemsize) * 4 * threads // weights)
    shared = products * WARPS * block_b * block_n * 4 + (units - kept) * weights
    cut = {"block_k": UNIT, "split": WARPS, "chunks": units, "kept": kept, "gluon": True, "polled": polled}
    return make(problem, "cooperative", block_b, block_n, WARPS, members, shared=shared, **cut)


def fits(problem: Problem, plan: Plan) -> bool:
    """Whether the plan can run on the device at all: its shared memory, and its programs all at once if they wait."""
    alone = plan.members == 1
    return plan.shared <= problem.device.shared and (alone or plan.programs <= problem.device.processors)


def rates(device: Device) -> Rates:
    return RATES.get(device.arch) or RATES["gfx942" if device.amd else "sm_90"]


def step_time(problem: Problem, plan: Plan) -> float:
    """The model's time of one step in microseconds."""
    rate, processors = rates(problem.device), problem.device.processors
    speed = rate.products["half" if problem.itemsize == 2 else plan.precision]
    if plan.loop == "streamed":
        work = problem.recurrent * problem.H * problem.H * problem.D
        read = work * problem.itemsize / 1e3 / (rate.l2 * processors)
        return rate.streamed + max(read, work * problem.B / (3 * speed * processors))
    work = problem.recurrent * plan.width * plan.reach
    weights = work * problem.itemsize / 1e3
    row = plan.width * problem.itemsize / 1e3 * (problem.recurrent if problem.backward else 1)  # of the operand
    parts = 0 if plan.split == 1 else plan.split * plan.block_b * plan.reach * 4 / 1e3
    passed = 2 * parts * (1 if problem.backward else problem.recurrent)
    if plan.gluon:
        passed += weights * (1 - plan.kept / plan.chunks)
    else:
        # Operands go into shared memory before they come from there, on NVIDIA for each warp that multiplies them.
        readers = 1 if problem.plain or problem.device.amd else plan.warps // plan.split
        passed += row * plan.block_b * (1 + readers) + weights
    time = rate.overhead + passed / rate.shared + work * plan.block_b / speed
    if plan.members == 1:
        return time * cdiv(plan.programs, processors)
    time += (rate.polled if plan.polled else rate.barrier) + rate.latency
    rows = plan.block_b if plan.gluon else min(problem.B, plan.block_b)
    fetched = row * rows
    if plan.slices > 1:
        # A second exchange: a program's sums for all programs of its column, and theirs for it.
        time += rate.barrier + rate.latency
        fetched += 2 * rows * plan.reach * 4 / 1e3
    return time + fetched / rate.l2


def row_tiles(problem: Problem) -> tuple[int, ...]:
    """Numbers of batch rows to try in a tile: matrix instructions take 16 at least."""
    sizes = (4, 8, 16, 32, 64, 128) if problem.plain else (16, 32, 64, 128)
    return tuple(size for size in sizes if size <= max(sizes[0], next_power(problem.B)))


def candidates(problem: Problem) -> Iterator[Plan]:
    """Every plan worth considering, those that are simpler at equal time first."""
    for block_b in row_tiles(problem):
        if problem.H <= 256:
            # AMD's matrix instructions are 16 columns wide: 8 warps would hold the weights of 64 units twice.
            # Parameters and signals, too, want registers.
            crowded = problem.itemsize == 4 or (problem.H > 32 and not CELLS[problem.cell].standard)
            wide = problem.H > 64 or (crowded and not problem.device.amd)
            yield resident(problem, block_b, 8 if wide else 4)
        if can_gluon(problem) and block_b <= MOST_ROWS[problem.backward]:
            yield from (gluon(problem, block_b, block_n) for block_n in (8, 16, 32) if block_n < problem.H)
        # Matrix instructions are 8 columns wide on NVIDIA, at least 16 on AMD. Forward gains nothing from a grid: the
        # sums of every gate would cost more than reading all of h.
        units = (16, 32, 64) if problem.device.amd else (8, 16, 32, 64)
        for block_n, slices, warps in product(units, SLICES if problem.backward else (1,), (4, 8)):
            if slices > 1 and 2 * block_n * slices > problem.H:
                continue
            plan = cooperative(problem, block_b, block_n, warps, slices)
            if plan.members > 1 and registers_of_step(problem, plan) <= STEP_ROOM:
                yield plan
    yield streamed(problem)


def choose(problem: Problem) -> Plan:
    """The plan for one pass: the fastest by the model among those that fit."""
    if _override is not None:
        return _override(problem)
    return best(problem)


@lru_cache(maxsize=4096)
def best(problem: Problem, in_gluon: bool | None = None) -> Plan:
    """The fastest by the model; with `in_gluon`, a Gluon loop or none, and if there is no other, a streamed one."""
    if problem.recurrent == 0:
        return without_product(problem)
    if problem.dtype == "float64":
        return streamed(problem)
    fitting = (plan for plan in candidates(problem) if fits(problem, plan) and in_gluon in (None, plan.gluon))
    # A tenth of a microsecond is less than the model can tell.
    return min(fitting, key=lambda plan: round(step_time(problem, plan), 1), default=streamed(problem))


_override: Callable[[Problem], Plan] | None = None


@contextmanager
def override(chooser: Callable[[Problem], Plan]) -> Iterator[None]:
    """Let `chooser` make the plans of the whole process, for tests and for tuning."""
    global _override
    previous, _override = _override, chooser
    try:
        yield
    finally:
        _override = previous
