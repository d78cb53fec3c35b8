"""A launch: the ways of a block's threads through the code, and the order of the blocks, which all run at once.

The threads of a block advance together; those that part at a branch take turns, the rearmost first, until they meet
again. Blocks take turns that a seed decides: each access to global memory is one.
"""

from collections.abc import Callable, Iterator
from random import Random
from typing import NamedTuple

import numpy as np

from ptx import instructions, matrices
from ptx.block import Block
from ptx.code import Code, Instruction
from ptx.memory import Device, Fault
from ptx.operations import register_dtype

ACCESSES = {
    "ld": instructions.load, "st": instructions.store, "red": instructions.atomic, "atom": instructions.atomic,
    "cp": instructions.copy, "ldmatrix": matrices.load, "stmatrix": matrices.store, "shfl": matrices.shuffle,
    "mma": matrices.multiply, "fence": instructions.fence,
}  # fmt: skip


class Deadlock(Exception):
    """Every block that has not ended polls, and none of them finds what it waits for."""


class Step(NamedTuple):
    """An instruction made ready. act: what it does to the active threads of a block; target: where a branch leads.

    control: "branch", "return", "barrier", or "" for all that goes on to the next step. turn: others may come first;
    polls: it waits for what others do, if relaxed by many loads.
    """

    act: Callable | None
    guard: tuple[str, bool] | None
    place: str
    control: str = ""
    target: int = 0
    turn: bool = False
    polls: bool = False
    relaxed: bool = False


def decode(instruction: Instruction, code: Code) -> Step:
    """Make an instruction ready to run."""
    opcode, operands, guard, place = instruction.opcode, instruction.operands, instruction.guard, instruction.place
    name, space = opcode[0], opcode[1] if len(opcode) > 1 else ""
    if name == "bra":
        return Step(None, guard, place, "branch", code.labels[operands[0]])
    if name == "ret":
        return Step(None, guard, place, "return")
    if opcode[:2] == ("bar", "sync") and operands == ("0",) and guard is None:
        return Step(None, guard, place, "barrier")
    if name in ACCESSES:
        turn = space in ("global", "relaxed") or name in ("cp", "fence")
        relaxed = name == "ld" and space == "relaxed"
        polls = relaxed or "acquire" in opcode
        return Step(ACCESSES[name](opcode, operands), guard, place, turn=turn, polls=polls, relaxed=relaxed)
    if name == "mov" and any(isinstance(part, tuple) for part in operands):
        return Step(instructions.move_parts(operands), guard, place)
    if name == "setp" and opcode[-1].endswith("x2"):
        return Step(instructions.compare_halves(opcode, operands), guard, place)
    return Step(instructions.calculation(opcode, operands), guard, place)


def run_block(block: Block, steps: list[Step]) -> Iterator[bool]:
    """Run a block to its end; yields before each access to global memory whether that could give anything new."""
    # Threads by the step that they are at, and those that wait at a barrier by the step behind it.
    ready, waiting = {0: block.everyone}, {}
    while ready or waiting:
        if not ready:
            block.pass_barrier()
            ready, waiting = waiting, {}
        at = min(ready)
        active = ready.pop(at)
        front = min(ready, default=len(steps))
        while active is not None and at < front:
            step = steps[at]
            which = active if step.guard is None else guarded(block, active, *step.guard)
            if step.control == "":
                while step.polls and block.waits(step.relaxed):
                    yield False
                if step.turn:
                    yield True
                if which.any():
                    act(block, step, which)
                at += 1
            elif step.control == "barrier":
                join(block, waiting, at + 1, active)
                active = None
            elif which is active or (which == active).all():
                at, active = (step.target, active) if step.control == "branch" else (at, None)
            elif not which.any():
                at += 1
            else:
                if step.control == "branch":
                    join(block, ready, step.target, which)
                join(block, ready, at + 1, active & ~which)
                active = None
        if active is not None and at < len(steps):
            join(block, ready, at, active)


def guarded(block: Block, active: np.ndarray, name: str, wanted: bool) -> np.ndarray:
    """Those threads whose predicate has the wanted value."""
    which = active & (block.values[name] == wanted)
    return block.everyone if which.all() else which


def join(block: Block, groups: dict[int, np.ndarray], at: int, active: np.ndarray) -> None:
    """Add threads to those that are at a step."""
    active = groups[at] | active if at in groups else active
    groups[at] = block.everyone if active.all() else active


def act(block: Block, step: Step, active: np.ndarray) -> None:
    try:
        step.act(block, active)
    except Fault as fault:
        raise Fault(f"{step.place}: {fault}") from None


class Machine:
    """A launch: the code, its grid, threads and bytes of shared memory for each block, and the parameters' values.

    tensors: address, bytes, and bytes of an element of all that the launch may access, by name.
    """

    def __init__(
        self, code: Code, grid: tuple[int, ...], threads: int, shared: int, parameters: list[int], tensors: dict
    ) -> None:
        self.steps = [decode(instruction, code) for instruction in code.instructions]
        self.device = Device(grid, dict(zip(code.parameters, parameters, strict=True)), tensors)
        kinds = {name: register_dtype(declared) for name, declared in code.registers.items()}
        self.blocks = [Block(self.device, n, kinds, threads, shared) for n in range(self.device.blocks)]

    def run(self, random: Random) -> None:
        """Run all blocks to their ends, in an order that `random` decides."""
        self.device.seed = random.getrandbits(32)
        running = [run_block(block, self.steps) for block in self.blocks]
        idle = set()
        with np.errstate(all="ignore"):
            while running:
                block = random.choice(running)
                # Turns of very different lengths, so that some blocks run far ahead of others.
                for _ in range(int(10 ** random.uniform(0, 3))):
                    useful = next(block, None)
                    if not useful:
                        break
                    idle.clear()
                if useful is None:
                    running.remove(block)
                    idle.clear()
                elif not useful:
                    idle.add(block)
                if running and len(idle) == len(running):
                    raise Deadlock(f"of {len(self.blocks)} blocks, {len(running)} wait forever")
