"""Compile every kernel for several GPUs on a machine that has none, and report what each takes.

    python -m rnnfast_kernels.gpu.aot [--quick] [--target sm_90 ...] [--jobs N]

A row per kernel: registers per thread, bytes of them spilled, the instructions that spill or reload inside a loop,
bytes of shared memory, and of a step the instructions, barriers, fences and loads from shared memory. The exit status
is 1 where a kernel does not compile, spills inside a loop (or at all, if it has none), or wants more shared memory than
its target has. What the time loop spills around itself, once per call, is only shown.
"""

import argparse
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import NamedTuple

import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import MockTensor

from rnnfast_kernels.cells import CELLS, TORCH_CELLS
from rnnfast_kernels.gpu import launch, plan
from rnnfast_kernels.gpu.arguments import BackwardTensors, ForwardTensors
from rnnfast_kernels.gpu.launch import Extent, Launch
from rnnfast_kernels.gpu.streamed import BackwardCarry, ForwardCarry

TARGETS = {
    "sm_80": (GPUTarget("cuda", 80, 32), plan.Device("sm_80", 108, 166912)),
    "sm_90": (GPUTarget("cuda", 90, 32), plan.Device("sm_90", 132, 232448)),
    "sm_100": (GPUTarget("cuda", 100, 32), plan.Device("sm_100", 148, 232448)),
    "sm_120": (GPUTarget("cuda", 120, 32), plan.Device("sm_120", 170, 101376)),
    "gfx942": (GPUTarget("hip", "gfx942", 64), plan.Device("gfx942", 304, 65536, 64)),
}
PRECISIONS = (("bfloat16", "ieee"), ("float16", "ieee"), ("float32", "tf32"), ("float32", "ieee"))
WIDTHS = (24, 64, 100, 128, 256, 512, 650, 768, 1024, 2048)
BATCHES = (1, 16, 64, 128)


class Case(NamedTuple):
    """A kernel to compile: one pass over one layer, by the plan that its problem gets."""

    target: str
    problem: plan.Problem
    ragged: bool

    @property
    def plan(self) -> plan.Plan:
        return plan.choose(self.problem)


class Usage(NamedTuple):
    """registers, spilled: per thread, bytes spilled; looping: instructions that spill or reload in a loop.

    step, barriers, fences, loads: instructions of a thread in the longest loop, and how many of them wait for the whole
    program, for its accesses to memory, and load from shared memory, such as weights that do not stay in registers.
    """

    registers: int
    spilled: int
    looping: int
    step: int
    barriers: int
    fences: int
    loads: int
    shared: int


class Listing(NamedTuple):
    """Machine code: its lines, and the jumps from one line to another."""

    lines: list[str]
    jumps: list[tuple[int, int]]

    @property
    def loops(self) -> list[range]:
        return [range(to, at + 1) for at, to in self.jumps if to < at]

    def in_loops(self, pattern: str) -> int:
        """How many lines of any loop match; of all lines, where there is no loop."""
        found = [at for at, line in enumerate(self.lines) if re.search(pattern, line)]
        return sum(any(at in loop for loop in self.loops) for at in found) if self.loops else len(found)

    def longest_loop(self) -> list[str]:
        longest = max(self.loops, key=len, default=range(0))
        return [self.lines[at] for at in longest]


class Driver:
    """As much of a Triton driver as compilation asks for, for a device that is not there."""

    def __init__(self, target: GPUTarget) -> None:
        self.target = target

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> str:
        return f"{self.target.backend}:{self.target.arch}"

    def get_current_stream(self, device: object = None) -> int:
        return 0


def tensors(problem: plan.Problem, chosen: plan.Plan, ragged: bool) -> NamedTuple:
    """The tensors of a pass, as types without memory; if ragged, with all that a kernel can be given."""
    cell, fused = CELLS[problem.cell], chosen.loop == "cooperative"
    like = MockTensor(problem.dtype)
    index = MockTensor("int64") if ragged else None
    resets = MockTensor("bool") if ragged else None
    per_state = (like,) * len(cell.states)
    extra = like if cell.saved > cell.gates else None
    wide = MockTensor("float64" if problem.dtype == "float64" else "float32")
    common = {
        "gates": like,
        "extra": extra,
        "w_hh": like if cell.recurrent else None,
        "initial": per_state,
        "states": per_state,
        "rows": index,
        "first": index,
        "resets": resets,
        "exchange": (MockTensor("int32") if chosen.gluon else like) if fused else None,
        "counters": MockTensor("int32") if fused else None,
        "parameters": like if cell.parameters else None,
        "signals": (MockTensor(problem.dtype, [2, 2, 2]),) * len(cell.signals) or None,
    }
    if problem.backward:
        du = None if cell.one_gradient or cell.recurrent == 0 else like
        of_given = {
            "dparameters": wide if cell.parameters else None,
            "dsignals": wide if cell.signals else None,
        }
        parts = MockTensor("float32") if chosen.slices > 1 else None
        own = {"dstates": per_state, "dfinals": per_state, "dx": like, "du": du, "dinitial": per_state, "parts": parts}
        return BackwardTensors(**own, **of_given, **common)
    return ForwardTensors(b_hh=like if cell.recurrent else None, finals=per_state, **common)


def describe(case: Case) -> Launch:
    """The launch of a case, on types without memory."""
    problem, chosen = case.problem, case.plan
    arguments = tensors(problem, chosen, case.ragged)
    extent = Extent(1000, problem.B, problem.D, 2)
    common = (chosen, problem.cell, problem.H, problem.backward, True, arguments)
    if chosen.loop != "streamed":
        return launch.loop(*common, extent)
    wide = MockTensor("float64" if problem.dtype == "float64" else "float32")
    per_state = (wide,) * len(CELLS[problem.cell].states)
    operand = MockTensor(problem.dtype)
    dparameters = wide if CELLS[problem.cell].parameters else None
    backward = BackwardCarry(wide, per_state, operand, dparameters)
    carry = backward if problem.backward else ForwardCarry(wide, per_state, operand)
    return launch.step(*common, carry, extent)


def compile_launch(target: str, described: Launch) -> Usage:
    """Compile a launch for a target and read what it takes."""
    triton.runtime.driver.set_active(Driver(TARGETS[target][0]))
    compiled = described.kernel.warmup(*described.args, grid=described.grid, **described.options)
    compiled = compiled.result() if hasattr(compiled, "result") else compiled
    read = cuda_usage(compiled.asm["cubin"]) if "cubin" in compiled.asm else amd_usage(compiled.asm["amdgcn"])
    return Usage(*read, compiled.metadata.shared)


def cuda_usage(cubin: bytes) -> tuple[int, ...]:
    """What a program takes but for shared memory; registers spill to the stack."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        report = cuobjdump("--dump-resource-usage", file.name)
        found = re.search(r"REG:(\d+) STACK:(\d+)", report)
        if found is None:
            raise RuntimeError(f"cuobjdump reports no registers:\n{report}")
        listing = cuda_listing(cuobjdump("--dump-sass", file.name))
    registers, stack = int(found[1]), int(found[2])
    return registers, stack, *loop_usage(listing, r"\b(STL|LDL)\b", r"\bBAR\b", r"\bMEMBAR\b", r"\bLDSM?\b")


def cuobjdump(*words: str) -> str:
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    return subprocess.run([tool, *words], capture_output=True, text=True, check=True).stdout


def cuda_listing(code: str) -> Listing:
    """From a disassembly, in which each instruction follows its address."""
    steps = re.findall(r"/\*([0-9a-f]{4,})\*/\s+(.*?);", code)
    places = {int(address, 16): at for at, (address, _) in enumerate(steps)}
    branches = ((at, re.search(r"\bBRA\b.* 0x([0-9a-f]+)", text)) for at, (_, text) in enumerate(steps))
    return Listing([text for _, text in steps], [(at, places[int(to[1], 16)]) for at, to in branches if to])


def amd_usage(assembly: str) -> tuple[int, ...]:
    """What a program takes but for shared memory; a vector register that spills is four bytes."""
    registers = re.search(r"\.vgpr_count:\s*(\d+)", assembly)
    spilled = re.search(r"\.vgpr_spill_count:\s*(\d+)", assembly)
    if registers is None or spilled is None:
        raise RuntimeError("the assembly has no .vgpr_count or no .vgpr_spill_count")
    patterns = (r"Folded (Spill|Reload)", r"\bs_barrier\b", r"\bbuffer_wbl2\b|\bbuffer_inv\b", r"\bds_read|\bds_load")
    usage = loop_usage(amd_listing(assembly), *patterns)
    return int(registers[1]), 4 * int(spilled[1]), *usage


def amd_listing(assembly: str) -> Listing:
    """From assembly with labels, each on a line of its own."""
    lines = [line for line in assembly.splitlines() if not re.match(r"\s*(;|$)", line)]
    labels = {line.split(":")[0]: at for at, line in enumerate(lines) if line.startswith(".LBB")}
    branches = ((at, re.search(r"\bs_c?branch\S*\s+(\.LBB\w+)", line)) for at, line in enumerate(lines))
    return Listing(lines, [(at, labels[to[1]]) for at, to in branches if to])


def loop_usage(listing: Listing, spill: str, *patterns: str) -> tuple[int, ...]:
    """Of the loops: the lines that spill; of the longest one, its length and how many lines match each pattern."""
    step = listing.longest_loop()
    matches = (sum(bool(re.search(pattern, line)) for line in step) for pattern in patterns)
    return listing.in_loops(spill), len(step), *matches


def problems(target: str, quick: bool) -> Iterator[plan.Problem]:
    """Every cell of torch, precision, width, batch and direction of the pass."""
    device = TARGETS[target][1]
    widths, batches = ((24, 128, 650), (16,)) if quick else (WIDTHS, BATCHES)
    for cell, (dtype, precision), H, B, backward in product(TORCH_CELLS, PRECISIONS, widths, batches, (False, True)):
        if device.arch.startswith("gfx") and precision == "tf32":
            continue
        if quick and (cell == "rnn_relu" or dtype == "float16"):
            continue
        yield plan.Problem(cell, H, B, 1, dtype, precision, backward, device)
    for cell, backward in product(TORCH_CELLS, (False, True)):
        yield plan.Problem(cell, 64, 16, 1, "float64", "ieee", backward, device)


def cases(targets: list[str], quick: bool) -> list[Case]:
    """All cases, without those that would compile to the same kernel."""
    distinct = {}
    for target in targets:
        for problem in problems(target, quick):
            for ragged in (False,) if quick and problem.H != 128 else (False, True):
                case = Case(target, problem, ragged)
                # What a kernel does not depend on.
                key = replace(problem, B=0), replace(case.plan, programs=0, shared=0), ragged
                distinct.setdefault(key, case)
    return list(distinct.values())


def report(case: Case) -> tuple[str, str | None]:
    """Compile one case: its row of the table, and what is wrong with it."""
    problem, chosen = case.problem, case.plan
    tiles = f"{chosen.block_b}x{chosen.block_n} k{chosen.split}x{chosen.block_k}x{chosen.chunks}"
    tiles += f" {chosen.kept} kept" if chosen.gluon else f" {chosen.slices} slices" if chosen.slices > 1 else ""
    what = f"{problem.precision if problem.precision == 'tf32' else problem.dtype:9} H={problem.H:<5}B={problem.B:<4}"
    way = ("backward" if problem.backward else "forward") + (" ragged" if case.ragged else "")
    loop = "gluon" if chosen.gluon else chosen.loop
    row = f"{case.target:7} {problem.cell:9} {what} {way:16} {loop:12} {tiles:20} {chosen.warps} warps "
    try:
        usage = compile_launch(case.target, describe(case))
    except Exception as error:
        return row, f"{row.strip()}: {type(error).__name__}: {error}"
    row += (
        f"{usage.registers:4} registers {usage.spilled:5} spilled, {usage.looping:3} in loops {usage.shared:7} shared"
    )
    row += f" {usage.step:5} a step {usage.barriers:3} barriers {usage.fences:2} fences {usage.loads:4} shared loads"
    if usage.looping:
        return row, f"{row.strip()}: it spills in a loop"
    limit = problem.device.shared
    return row, f"{row.strip()}: {limit} bytes of shared memory at most" if usage.shared > limit else None


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m rnnfast_kernels.gpu.aot", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("--quick", action="store_true", help="a representative set, in a few minutes")
    parser.add_argument("--target", nargs="+", choices=TARGETS, default=list(TARGETS), help="default: all")
    parser.add_argument("--jobs", type=int, default=2, help="processes, default 2")
    arguments = parser.parse_args()
    todo = cases(arguments.target, arguments.quick)
    print(f"Triton {triton.__version__}: {len(todo)} kernels for {', '.join(arguments.target)}", flush=True)
    problems_found = []
    with ProcessPoolExecutor(arguments.jobs) as pool:
        for row, problem in pool.map(report, todo):
            print(row, flush=True)
            if problem:
                problems_found.append(problem)
    print(f"{len(todo) - len(problems_found)} of {len(todo)} kernels compile, spill in no loop and fit")
    for problem in problems_found:
        print(f"FAIL {problem}")
    return 1 if problems_found else 0


if __name__ == "__main__":
    sys.exit(main())
