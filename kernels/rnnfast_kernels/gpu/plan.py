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
from rnnfast_kernels.gpu import registers
from rnnfast_kernels.gpu.problem import FIRST_WITH_GLUON, TRITON, Device, Plan, Problem, cdiv, next_power


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
# Registers of a thread of a Gluon loop. Beside weights, sums and operands, some are taken, by pass, and some for each
# element of the tile that a thread has; polling takes more in backward, as does reading weights from shared memory, by
# the bytes of an entry. Found by compiling.
ROOM, BASE, ELEMENT, POLLING, READING = 240, {False: 28, True: 60}, {False: 20, True: 40}, 10, 16
# Rows of a Gluon loop's tile, by pass.
MOST_ROWS = {False: 32, True: 16}
# Steps ahead, plus one, that weights are read which do not stay on the chip, on NVIDIA.
STAGES = 3


def streamed(problem: Problem) -> Plan:
    """A library product and a pointwise kernel per step."""
    block_n = min(128, max(16, next_power(problem.H)))
    return Plan("streamed", min(8, next_power(problem.B)), block_n, 4, problem.precision)


def resident(problem: Problem, block_b: int, warps: int) -> Plan:
    """Every program holds all weights, padded to a power of two, and shares with nobody."""
    width = max(16, next_power(problem.H))
    weights = problem.recurrent * width * width * problem.itemsize
    operand = block_b * width * problem.itemsize * (problem.recurrent if problem.backward else 1)
    return Plan(
        loop="resident",
        block_b=block_b,
        block_n=width,
        warps=warps,
        precision=problem.precision,
        block_k=width,
        chunks=1,
        kept=1,
        programs=cdiv(problem.B, block_b) * problem.D,
        row=problem.row,
        k_last=problem.k_last,
        shared=weights + operand,
        registers=registers.per_program(problem.device, warps),
    )


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


def cooperative(
    problem: Problem,
    block_b: int,
    block_n: int,
    block_k: int,
    split: int,
    warps: int,
    shared: int | None = None,
    eager: bool = True,
    ahead: int = STAGES,
    slices: int = 1,
) -> Plan:
    """Groups of programs, block_n units each, share a tile of batch rows; `shared` bytes hold the weights they keep.

    eager: read the operand at once where there is room for it. ahead: stages for weights that are not kept. slices: of
    k, each for as many programs.
    """
    device = problem.device
    room = device.shared if shared is None else shared
    reach = block_n * slices
    columns = cdiv(problem.H, reach)
    members = columns * slices
    chunks = cdiv(min(problem.H, columns * block_n), split * block_k)
    operand = block_b * split * block_k * problem.itemsize * (problem.recurrent if problem.backward else 1)  # one chunk
    weights = problem.recurrent * reach * split * block_k * problem.itemsize  # one chunk
    reduced = split * block_b * reach * 4 * (1 if problem.backward or problem.recurrent == 1 else 4)
    # Half of a thread's registers, and most of the shared memory, may hold what is on its way.
    in_flight = min(512 * device.warp * warps, int(0.6 * room))
    stages = 1
    if device.amd:
        # The compiler keeps the weights in registers there: a quarter of them, or half with 8 warps, to leave room for
        # the rest. On their way there, a whole chunk of one gate's at a time passes through shared memory.
        kept = min(chunks, 512 * device.warp * warps // weights)
        used = max(operand, reduced, weights // problem.recurrent)
    else:
        used = max(reduced, operand * (chunks if eager and operand * chunks <= in_flight else 1))
        kept = min(chunks, max(0, room - used) // weights)
        if kept < chunks:
            # What is read again passes through shared memory too; what is read before it takes the same room.
            stages = ahead
            in_flight = (stages - 1) * (weights + operand)
            used = max(reduced, in_flight)
            kept = min(chunks - 1, max(0, room - used) // weights)
        used += kept * weights
    eager = eager and operand * kept <= in_flight
    # Telling absent rows from others takes registers too.
    few = (512 if problem.itemsize == 2 else 256) * device.warp * warps
    sparse = eager and kept == chunks and block_b >= 2 * problem.B and operand * chunks <= few
    return Plan(
        loop="cooperative",
        block_b=block_b,
        block_n=block_n,
        warps=warps,
        precision=problem.precision,
        block_k=block_k,
        split=split,
        chunks=chunks,
        kept=kept,
        stages=stages,
        eager=eager,
        sparse=sparse,
        members=members,
        slices=slices,
        programs=members * cdiv(problem.B, block_b) * problem.D,
        row=problem.row,
        k_last=problem.k_last,
        shared=used,
        registers=registers.per_program(problem.device, warps),
    )


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
    return Plan(
        loop="cooperative",
        block_b=block_b,
        block_n=block_n,
        warps=WARPS,
        precision=problem.precision,
        block_k=UNIT,
        split=WARPS,
        chunks=units,
        kept=kept,
        members=members,
        programs=members * cdiv(problem.B, block_b) * problem.D,
        row=problem.row,
        shared=products * WARPS * block_b * block_n * 4 + (units - kept) * weights,
        registers=registers.per_program(problem.device, WARPS),
        gluon=True,
        polled=polled,
    )


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
    entries = problem.recurrent if problem.backward else 1
    if plan.loop == "streamed":
        work = problem.recurrent * problem.H * problem.H * problem.D
        read = work * problem.itemsize / 1e3 / (rate.l2 * processors)
        return rate.streamed + max(read, work * problem.B / (3 * speed * processors))
    work = problem.recurrent * plan.width * plan.reach
    weights = work * problem.itemsize / 1e3
    kept = weights * plan.kept / plan.chunks
    row = entries * plan.width * problem.itemsize / 1e3  # of the operand
    operands = row * plan.block_b
    repeated = registers.repeats(problem, plan) * work * plan.block_b
    # Operands go into shared memory before they come from there; so do the parts of sums, of every gate.
    readers = registers.readers(problem, plan)
    parts = 0 if plan.split == 1 else plan.split * plan.block_b * plan.reach * 4 / 1e3
    passed = operands + 2 * parts * (1 if problem.backward else problem.recurrent)
    passed += operands * readers.rows + kept * readers.units
    if plan.gluon:
        passed = 2 * parts * (1 if problem.backward else problem.gates) + weights - kept
    time = rate.overhead + passed / rate.shared + repeated / speed
    if plan.members == 1:
        return time * cdiv(plan.programs, processors)
    time += rate.polled if plan.polled else rate.barrier
    waits = 1 if plan.eager else plan.kept
    if not plan.gluon:
        waits += (plan.chunks - plan.kept) / plan.stages
    rows = problem.B if plan.sparse else plan.block_b
    fetched = row * rows + (0 if plan.gluon else weights - kept)
    if plan.slices > 1:
        # A second exchange: a program's sums for all programs of its column, and theirs for it.
        time += rate.barrier
        waits += 1
        fetched += 2 * rows * plan.reach * 4 / 1e3
    return time + waits * rate.latency + fetched / rate.l2


def row_tiles(problem: Problem) -> tuple[int, ...]:
    """Numbers of batch rows to try in a tile: matrix instructions take 16 at least."""
    sizes = (4, 8, 16, 32, 64, 128) if problem.plain else (16, 32, 64, 128)
    return tuple(size for size in sizes if size <= max(sizes[0], next_power(problem.B)))


def grids(problem: Problem, block_b: int) -> Iterator[tuple[int, int]]:
    """Units of a program and slices of k to try: those of groups that are on the device all at once.

    One slice in forward, where the sums of every gate would cost more than reading all of h.
    """
    groups = cdiv(problem.B, block_b) * problem.D
    # Matrix instructions are 8 columns wide on NVIDIA, at least 16 on AMD.
    for block_n in (16, 32, 64) if problem.device.amd else (8, 16, 32, 64):
        for slices in (1, 2, 4, 8, 16) if problem.backward else (1,):
            columns = cdiv(problem.H, block_n * slices)
            if slices > 1 and 2 * block_n * slices > problem.H:
                continue
            if columns * slices == 1 or groups * columns * slices <= problem.device.processors:
                yield block_n, slices


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
            for block_n in (8, 16, 32):
                plan = gluon(problem, block_b, block_n)
                if plan.members > 1:
                    yield plan
        for block_n, slices in grids(problem, block_b):
            reach = block_n * slices
            # Forward, an element for each thread at least, or the layout that spreads a tile does not prevail.
            few = block_b * block_n < 8 * problem.device.warp
            warps = 4 if few and not problem.backward else 8
            parts = registers.parts_of_k(problem, block_b, reach, warps)
            sizes = registers.chunk_sizes(problem, registers.elements(problem, block_b, reach, warps))
            splits = (parts,) if problem.plain else (parts, max(parts // 2, 1))
            for split, block_k in product(splits, sizes):
                plan = cooperative(problem, block_b, block_n, block_k, split, warps, slices=slices)
                enough = registers.suffice(problem, plan)
                if enough:
                    yield plan
                if plan.kept < plan.chunks or not (enough or problem.plain):
                    # Where the operand takes less room there is more for the weights, or enough for the rest.
                    lazy = cooperative(problem, block_b, block_n, block_k, split, warps, eager=False, slices=slices)
                    if lazy.kept == lazy.chunks and registers.suffice(problem, lazy):
                        yield lazy
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
