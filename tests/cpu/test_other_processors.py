"""Kernels compiled for processors that are not there, as `tests/other_processor.py` does it."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
# How object files for Windows, Apple and Linux begin: the format and the processor.
BEGINNINGS = {
    "windows-x86": b"\x64\x86",
    "apple-arm": b"\xcf\xfa\xed\xfe\x0c\x00\x00\x01",
    "linux-arm": b"\x7fELF\x02\x01\x01",
}
# Functions of compilers' own libraries, which a process need not have loaded.
LIBRARY_CALLS = rb"__(?:trunc|extend|gnu_|float|fix|udiv|div|mul|chkstk|aarch64_)\w*"


def run(*arguments: object) -> str:
    command = [sys.executable, "-m", "tests.other_processor", *map(str, arguments)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.mark.long
@pytest.mark.timeout(900)
@pytest.mark.parametrize("dtype", ["float32", "float64", "bfloat16", "float16"])
@pytest.mark.parametrize("processor", BEGINNINGS)
def test_kernels_compile(processor, dtype, tmp_path):
    cell = "gru" if dtype == "float32" else "rnn_tanh"
    run("--compile", processor, cell, dtype, "--output", tmp_path / "kernel.o")
    code = (tmp_path / "kernel.o").read_bytes()
    assert code.startswith(BEGINNINGS[processor])
    assert b"rnnfast_start" in code
    assert not set(re.findall(LIBRARY_CALLS, code))


@pytest.mark.long
@pytest.mark.timeout(900)
@pytest.mark.skipif(shutil.which("qemu-aarch64") is None, reason="needs qemu-user")
@pytest.mark.skipif(shutil.which("aarch64-linux-gnu-gcc") is None, reason="needs a compiler for ARM")
def test_a_layer_runs_on_an_emulated_arm_processor():
    """Every sum runs in order and every activation is our own: the numbers are those of x86, to the last bits."""
    told = run("--run", "rnn_tanh", "float32")
    (distance,) = re.findall(r"ARM and this processor: relative L2 distance (\S+)", told)
    assert float(distance) < 1e-7, told
