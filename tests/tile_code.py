"""The inner loops of the products' tiles, as machine code for processors that need not be here.

As a program it prints, for every processor and each of its tallest tiles, the loop's instructions and, where llvm-mca
is installed, the share of the processor's multiply-adds that llvm-mca expects of it: `python tests/tile_code.py`.
"""

import re
import shutil
import subprocess
from collections import Counter
from dataclasses import dataclass

from llvmlite import binding, ir
from rnnfast_kernels.cpu.ir import tile
from rnnfast_kernels.cpu.target import ITEM_BYTES, X86, Target, vector_bytes_and_registers, widest_panel

LINUX, ARM, APPLE = "x86_64-unknown-linux-gnu", "aarch64-unknown-linux-gnu", "arm64-apple-darwin"
# Triple, name, features, and vector multiply-adds that start in a cycle.
PROCESSORS = {
    "avx512": (LINUX, "sapphirerapids", "+avx512f,+avx2,+avx,+fma", 2),
    "avx2": (LINUX, *X86["avx2"], 2),
    "sse": (LINUX, *X86["sse"], 2),
    "neoverse-n1": (ARM, "neoverse-n1", "+neon", 2),
    "neoverse-v1": (ARM, "neoverse-v1", "+neon", 4),
    "apple-m1": (APPLE, "apple-m1", "+neon", 4),
}
SCHEDULING = {"avx512": ("skylake-avx512",), "avx2": ("haswell", "skylake", "znver2")}
MULTIPLY_ADD = r"v?fmadd\w*|v?fmla"


@dataclass
class Loop:
    """The instructions of a loop, operands included."""

    lines: list[str]

    def count(self, pattern: str) -> int:
        return sum(re.match(rf"\s+(?:{pattern})\b", line) is not None for line in self.lines)

    def on_stack(self) -> int:
        """How many instructions use the stack."""
        return sum("rsp" in line or "[sp" in line for line in self.lines)


def target_of(processor: str, dtype: str = "float32") -> Target:
    triple, _, features, _ = PROCESSORS[processor]
    size, registers = vector_bytes_and_registers(triple, set(features.split(",")))
    return Target(dtype, dtype, size // ITEM_BYTES[dtype], registers)


def assembly(processor: str, chosen: Target, gates: int) -> str:
    """All tiles for panels of so many gates."""
    tiles = ir.Module()
    for rows, vectors in sorted({(rows, each) for _, rows, each in tile.tiles(chosen, gates)}):
        tile.tile_function(tiles, chosen, rows, vectors)
    binding.initialize_all_targets()
    binding.initialize_all_asmprinters()
    triple, name, features, _ = PROCESSORS[processor]
    machine = binding.Target.from_triple(triple).create_target_machine(
        cpu=name, features=features, opt=3, reloc="default", codemodel="jitdefault", jit=True
    )
    module = binding.parse_assembly(str(tiles))
    module.triple = triple
    return machine.emit_assembly(module)


def loops(processor: str, chosen: Target, gates: int) -> dict[tuple[int, int], list[Loop]]:
    """The loops of every tile, by its rows and vectors."""
    found: dict[tuple[int, int], list[Loop]] = {}
    name = re.compile(rf"_?{tile.tile_name(chosen, 0, 0)[:-3]}(\d+)x(\d+):")
    shape, labels, lines = None, {}, []
    for line in assembly(processor, chosen, gates).splitlines():
        begin = name.match(line)
        if begin:
            shape, labels, lines = (int(begin[1]), int(begin[2])), {}, []
            found[shape] = []
        label = re.match(r"\.?(LBB\w+):", line)
        if label:
            labels[label[1]] = len(lines)
        lines.append(line)
        jump = re.match(r"\s+(?:j\w+|b\.\w+|cbn?z|tbn?z)\s+(?:.*\s)?\.?(LBB\w+)", line)
        if shape and jump and jump[1] in labels:
            body = lines[labels[jump[1]] + 1 :]
            if not any(other.endswith(":") for other in body):
                found[shape].append(Loop(body))
        if re.match(r"\.?Lfunc_end", line):
            shape = None
    return found


def cycles(tool: str, triple: str, processor: str, loop: Loop) -> float:
    """Cycles of one round of a loop by llvm-mca's model."""
    code = "\n".join(line.replace("\tLBB", "\t.LBB") for line in loop.lines)
    words = [tool, f"-mtriple={triple}", f"-mcpu={processor}", "-iterations=1000"]
    done = subprocess.run(words, input=code, capture_output=True, text=True, check=True)
    return int(re.search(r"Total Cycles:\s+(\d+)", done.stdout)[1]) / 1000


def main() -> None:
    tool = next((path for n in ("-20", "-19", "-18", "") if (path := shutil.which(f"llvm-mca{n}"))), None)
    print("processor       tile  multiply-adds  instructions  of the stack  share of the peak, by llvm-mca")
    for processor, (triple, _, _, peak) in PROCESSORS.items():
        chosen = target_of(processor)
        for gates in (1, 3, 4):
            shape = chosen.rows(gates), chosen.strip(gates * widest_panel(gates))
            loop = loops(processor, chosen, gates)[shape][0]
            sums = loop.count(MULTIPLY_ADD) or loop.count("addps")
            kinds = Counter(line.split()[0] for line in loop.lines)
            shares = [
                f"{name} {sums / peak / cycles(tool, ARM if triple == APPLE else triple, name, loop):.2f}"
                for name in (SCHEDULING.get(processor, (processor,)) if tool and processor != "sse" else ())
            ]
            counts = f"{sums:>9} {sum(kinds.values()):>14} {loop.on_stack():>12}"
            print(f"{processor:<15} {shape[0]}x{shape[1]:<5} {counts}   ", ", ".join(shares))


if __name__ == "__main__":
    main()
