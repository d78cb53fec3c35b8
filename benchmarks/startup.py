"""First-call and import time: what a program pays before its first result, each measured in processes of its own."""

import os
import subprocess
import sys
import tempfile
from ctypes import c_int

from benchmarks.measure import quantile

REPEATS = 3

IMPORT = """
import time
start = time.perf_counter()
import torch
middle = time.perf_counter()
{more}
print(middle - start, time.perf_counter() - middle)
"""

FIRST_CALL = """
import time, torch
{more}
module = {namespace}.{cell}(64, 64)
x = torch.randn(32, 8, 64, requires_grad=True)
start = time.perf_counter()
module(x)[0].sum().backward()
first = time.perf_counter() - start
start = time.perf_counter()
module(x)[0].sum().backward()
print(first, time.perf_counter() - start)
"""


def measure(cells: tuple[str, ...], turn: c_int) -> list[dict]:
    """Rows of milliseconds. `cold` starts from empty kernel caches, `cached` is a later process."""
    turn.value = -1
    rows = [{"what": "import torch", "ms": milliseconds(IMPORT.format(more=""), 0)}]
    rows.append({"what": "import rnnfast, after torch", "ms": milliseconds(IMPORT.format(more="import rnnfast"), 1)})
    for cell in cells:
        name = cell.upper()
        torch_call = FIRST_CALL.format(more="", namespace="torch.nn", cell=name)
        our_call = FIRST_CALL.format(more="import rnnfast", namespace="rnnfast", cell=name)
        rows.append({"what": f"{name} first call, torch", "ms": milliseconds(torch_call, 0)})
        with tempfile.TemporaryDirectory() as folder:
            caches = {"NUMBA_CACHE_DIR": folder, "TRITON_CACHE_DIR": folder}
            rows.append({"what": f"{name} first call, rnnfast, cold", "ms": milliseconds(our_call, 0, 1, caches)})
            rows.append(
                {"what": f"{name} first call, rnnfast, cached", "ms": milliseconds(our_call, 0, REPEATS, caches)}
            )
    return rows


def milliseconds(program: str, column: int, repeats: int = REPEATS, environment: dict[str, str] | None = None) -> float:
    """Median over fresh processes of one of the numbers that the program prints, in seconds, as milliseconds."""
    times = []
    for _ in range(repeats):
        done = subprocess.run(
            [sys.executable, "-c", program],
            env={**os.environ, **(environment or {})},
            capture_output=True,
            text=True,
            check=True,
        )
        times.append(1e3 * float(done.stdout.split()[column]))
    return float(f"{quantile(times, 0.5):.4g}")
