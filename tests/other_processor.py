"""Kernels for processors that are not there: compiled, and for Linux on ARM run, in an emulator.

    python -m tests.other_processor --compile windows-x86 rnn_tanh float16
    python -m tests.other_processor --run lstm float32

`--run` wants qemu-aarch64 and aarch64-linux-gnu-gcc (Debian: qemu-user, gcc-aarch64-linux-gnu,
libc6-dev-arm64-cross). It runs a layer's forward pass and says how far its results are from those of this processor's
kernels, and how far both are from torch.nn in float64.
"""

import argparse
import ctypes
import os
import shutil
import subprocess
import sys
import tempfile
from array import array
from pathlib import Path

# Triple, name and features, in LLVM's words.
PROCESSORS = {
    "windows-x86": ("x86_64-pc-windows-msvc", "haswell", "+avx,+avx2,+f16c,+fma,+sse4.2"),
    "apple-arm": ("arm64-apple-macosx11.0.0", "apple-m1", "+neon,+fp-armv8,+fullfp16"),
    "linux-arm": ("aarch64-unknown-linux-gnu", "neoverse-n1", "+neon,+fp-armv8"),
}
STEPS, BATCH, INPUTS, HIDDEN, LAYERS = 12, 5, 7, 21, 2

# Reads a call: its records, the sizes and contents of its buffers. Runs it, and writes the buffers.
HARNESS = r"""
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
void rnnfast_start(int64_t);
static void read_exactly(void *place, int64_t size) {
    if (size && fread(place, 1, size, stdin) != (size_t)size) abort();
}
static void *room(int64_t size) {
    void *place;
    if (posix_memalign(&place, 64, size + 64)) abort();
    memset(place, 0xff, size + 64);
    return place;
}
int main(void) {
    int64_t head[5];
    read_exactly(head, sizeof head);
    int64_t count = head[0], bases = head[4];
    int64_t *values = room(8 * count), *which = room(8 * count);
    read_exactly(values, 8 * count);
    read_exactly(which, 8 * count);
    int64_t *sizes = room(8 * bases), *call = room(8 * (11 + bases));
    read_exactly(sizes, 8 * bases);
    int64_t scratch = (int64_t)room(head[1]), records = scratch + head[2];
    int64_t program = records + head[3];
    int64_t fixed[] = {(int64_t)values, (int64_t)which, count, records, program, 0, scratch, records, 0, 0, 0};
    memcpy(call, fixed, sizeof fixed);
    for (int64_t n = 0; n < bases; n++) {
        call[11 + n] = sizes[n] < 0 ? 0 : (int64_t)room(sizes[n]);
        if (sizes[n] > 0) read_exactly((void *)call[11 + n], sizes[n]);
    }
    rnnfast_start((int64_t)call);
    for (int64_t n = 0; n < bases; n++)
        if (sizes[n] > 0) fwrite((void *)call[11 + n], 1, sizes[n], stdout);
    return 0;
}
"""


def pretend(processor: str) -> None:
    """Have everything compiled for a processor; before the kernels are imported.

    Numba places what it compiles in memory, which works here for Linux's object files alone.
    """
    triple, name, features = PROCESSORS[processor]
    os.environ["NUMBA_CPU_NAME"], os.environ["NUMBA_CPU_FEATURES"] = name, features
    from llvmlite import binding

    binding.initialize_all_targets()
    binding.initialize_all_asmprinters()
    on_linux = f"{'x86_64' if triple.startswith('x86_64') else 'aarch64'}-unknown-linux-gnu"
    binding.get_process_triple = lambda: on_linux
    from rnnfast_kernels.cpu import target

    chosen = target.Processor(triple, name, features)
    target.processor = lambda: chosen


def compile_for(processor: str, cell: str, dtype: str) -> bytes:
    """Return the object file of a layer's kernels, forward and backward."""
    pretend(processor)
    from rnnfast_kernels.cells import CELLS
    from rnnfast_kernels.cpu.runtime.compiled import compile_code
    from rnnfast_kernels.cpu.target import target

    return compile_code(CELLS[cell], target(dtype), 1)


def make(cell: str, dtype: str):
    """Return a layer, its float64 oracle, and the tensors of a call: x, and one per initial state."""
    import torch

    import rnnfast

    torch.manual_seed(0)
    kind, options = ("RNN", {"nonlinearity": cell[4:]}) if cell.startswith("rnn") else (cell.upper(), {})
    options = {"num_layers": LAYERS, "bidirectional": True, **options}
    layer = getattr(rnnfast, kind)(INPUTS, HIDDEN, **options).to(getattr(torch, dtype))
    oracle = getattr(torch.nn, kind)(INPUTS, HIDDEN, **options).double()
    oracle.load_state_dict(layer.state_dict())
    x = torch.randn(STEPS, BATCH, INPUTS).to(layer.weight_ih_l0.dtype)
    states = [torch.randn(2 * LAYERS, BATCH, HIDDEN).to(x.dtype) for _ in range(2 if cell == "lstm" else 1)]
    return layer, oracle, x, states


def call_of(layer, x, states) -> tuple[bytes, list[tuple[int, int]]]:
    """Lay a call out for the processor that is pretended; returns it for the harness, with its results' places."""
    from rnnfast_kernels.cpu.runtime.compiled import Kernel

    from rnnfast import fast_path
    from rnnfast.backends.cpu import addresses_of, executable

    calls: list[list[int]] = []

    def note(address: int) -> None:
        calls.append(list((ctypes.c_int64 * (11 + len(recipe.named))).from_address(address)))

    executable.kernel = lambda *args: Kernel(note, note, note)
    options, flat = layer.options(), layer.weights()
    weights = fast_path.stacked_weights(options, flat)
    stack = executable.stack(fast_path.signatures_of(options, x, flat, zero=False, threads=1))
    recipe = stack.recipe
    results = stack.run(x, addresses_of((x, *states, *weights)))
    tensors = {t.data_ptr(): t for t in (x, *states, *weights, *results)}
    ((values, which, count, records, program, _, scratch, *_), bases) = calls[0][:11], calls[0][11:]
    lengths = [tensors[base].nbytes if base else -1 for base in bases]
    head = array("q", (count, recipe.scratch, records - scratch, program - records, len(bases)))
    contents = [ctypes.string_at(base, size) for base, size in zip(bases, lengths, strict=True) if size > 0]
    parts = (head.tobytes(), ctypes.string_at(values, 8 * count), ctypes.string_at(which, 8 * count))
    given = b"".join((*parts, array("q", lengths).tobytes(), *contents))
    ends, at = {}, 0
    for base, size in zip(bases, lengths, strict=True):
        ends[base] = (at, max(0, size))
        at += max(0, size)
    return given, [ends[result.data_ptr()] for result in results]


def emulate(code: bytes, given: bytes, folder: Path) -> bytes:
    """Link an object file with the harness and run it in the emulator."""
    (folder / "kernel.o").write_bytes(code)
    listing = subprocess.run(["aarch64-linux-gnu-nm", "-u", "kernel.o"], cwd=folder, check=True, capture_output=True)
    names = [line.split()[-1].decode() for line in listing.stdout.splitlines()]
    # What Numba's code would call to raise an exception; nothing does.
    stubs = "".join(
        f"void {name}(void) {{ abort(); }}\n" for name in names if name.startswith(("Py", "numba_", "NRT_"))
    )
    (folder / "harness.c").write_text(HARNESS)
    (folder / "stubs.c").write_text(f"void abort(void);\n{stubs}")
    build = ["aarch64-linux-gnu-gcc", "-O1", "-w", "-static", "-o", "run", "harness.c", "stubs.c", "kernel.o"]
    subprocess.run(build, cwd=folder, check=True)
    return subprocess.run(["qemu-aarch64", "./run"], cwd=folder, input=given, check=True, capture_output=True).stdout


def run(cell: str, dtype: str) -> None:
    """Compare a layer's results on the emulated processor and on this one."""
    import torch

    missing = [name for name in ("qemu-aarch64", "aarch64-linux-gnu-gcc") if shutil.which(name) is None]
    if missing:
        sys.exit(f"not found: {', '.join(missing)}")
    here = subprocess.run([sys.executable, "-m", __spec__.name, "--here", cell, dtype], check=True, capture_output=True)
    code = compile_for("linux-arm", cell, dtype)
    layer, oracle, x, states = make(cell, dtype)
    given, places = call_of(layer, x, states)
    with tempfile.TemporaryDirectory() as folder:
        written = emulate(code, given, Path(folder))
    wide = [state.double() for state in states]
    output, finals = oracle(x.double(), tuple(wide) if len(wide) > 1 else wide[0])
    expected = torch.cat([each.detach().flatten() for each in (output, *(finals if len(wide) > 1 else (finals,)))])
    emulated = torch.frombuffer(bytearray(b"".join(written[at : at + size] for at, size in places)), dtype=x.dtype)
    native = torch.frombuffer(bytearray(here.stdout), dtype=x.dtype)
    print(f"{cell} in {dtype}: {LAYERS} layers of 2 directions, T={STEPS} B={BATCH} I={INPUTS} H={HIDDEN}")
    print(f"numbers that differ in any bit: {int((emulated != native).sum())} of {len(native)}")
    for name, a, b in (
        ("ARM and this processor", emulated, native),
        ("ARM and torch.nn in float64", emulated, expected),
        ("this processor and torch.nn in float64", native, expected),
    ):
        print(f"{name}: relative L2 distance {float((a.double() - b.double()).norm() / b.double().norm()):.2e}")


def run_here(cell: str, dtype: str) -> None:
    """Write this processor's results to standard output."""
    import torch

    layer, _, x, states = make(cell, dtype)
    with torch.no_grad():
        output, finals = layer(x, tuple(states) if len(states) > 1 else states[0])
    for each in (output, *(finals if len(states) > 1 else (finals,))):
        each = each.contiguous()
        sys.stdout.buffer.write(ctypes.string_at(each.data_ptr(), each.nbytes))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--compile", nargs=3, metavar=("PROCESSOR", "CELL", "DTYPE"))
    parser.add_argument("--output", type=Path, help="with --compile, where to write the object file")
    parser.add_argument("--run", nargs=2, metavar=("CELL", "DTYPE"))
    parser.add_argument("--here", nargs=2, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.compile:
        code = compile_for(*given.compile)
        print(f"{' '.join(given.compile)}: {len(code)} bytes")
        if given.output:
            given.output.write_bytes(code)
    if given.run:
        run(*given.run)
    if given.here:
        run_here(*given.here)


if __name__ == "__main__":
    main()
