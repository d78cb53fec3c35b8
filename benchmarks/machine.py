"""The machine's facts: what it is, which versions run, how fast it multiplies and moves memory, what a start costs."""

import importlib.metadata
import importlib.util
import os
import platform
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

GEMM_SIZE = {"cpu": 1024, "cuda": 8192}
# Bytes moved, read and written together: what fits a cache moves faster than what does not. Between two runs on a GPU
# the cache is overwritten, so there the largest copy alone tells.
COPY_BYTES = {"cpu": (1 << 16, 1 << 20, 1 << 24, 1 << 28), "cuda": (1 << 31,)}
PACKAGES = ("torch", "rnnfast", "numba", "triton", "numpy", "onnxruntime", "jax")


def facts(device: str, dtypes: tuple[str, ...]) -> dict[str, Any]:
    """Everything a reader needs to judge the numbers, and the folder that they belong to."""
    threads = torch.get_num_threads()
    return {
        "folder": slug(device, threads),
        "device": device_name(device),
        "kind": device,
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        "versions": versions(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": threads,
        "load": load(),
        "commit": commit(),
        "gemm_flops": {dtype: gemm_rate(device, dtype) for dtype in dtypes},
        "bandwidth": {str(size): bandwidth(device, size) for size in COPY_BYTES[device]},
    }


def load() -> float | None:
    """How many processes wanted a core in the last minute; None where the system does not say."""
    return round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None


def device_name(device: str) -> str:
    """The name of the processor, with the instructions it is held to, or of the GPU."""
    if device == "cuda":
        return torch.cuda.get_device_name()
    held = os.environ.get("RNNFAST_CPU")
    return processor_name() + (f" held to {held.upper()}" if held else "")


def processor_name() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else ():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def slug(device: str, threads: int) -> str:
    """The name of this machine's results folder."""
    name = re.sub(r"[^a-z0-9]+", "-", device_name(device).lower()).strip("-")
    return f"{name}-{threads}-threads" if device == "cpu" else name


def versions() -> dict[str, str]:
    """The versions of what takes part, as far as it is installed."""
    found = {package: version(package) for package in PACKAGES if importlib.util.find_spec(package) is not None}
    return {package: number for package, number in found.items() if number}


def version(package: str) -> str:
    """An installed package's version; for one that only lies on the path, what it says itself, if anything."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return getattr(importlib.import_module(package), "__version__", "")


def commit() -> str:
    """The commit the benchmark ran from, with a `+` where the library's files differ from it."""
    root = Path(__file__).parent
    try:
        name = git(root, "rev-parse", "--short=10", "HEAD").strip()
        changed = git(root, "status", "--porcelain", "--", ":/rnnfast", ":/kernels").strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return name + ("+" if changed else "")


def git(folder: Path, *words: str) -> str:
    return subprocess.run(["git", *words], cwd=folder, capture_output=True, text=True, check=True).stdout


def best_seconds(run: Callable[[], Any], device: str, budget: float = 0.3, fewest: int = 5) -> float:
    """The fastest of the runs that fit the budget; the first ones touch the memory and warm up."""
    best, runs, end = float("inf"), 0, time.perf_counter() + budget
    while runs < fewest or time.perf_counter() < end:
        runs += 1
        start = time.perf_counter()
        run()
        if device == "cuda":
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - start)
    return best


def gemm_rate(device: str, dtype: str) -> float:
    """Operations per second of a large square product, torch's own."""
    size = GEMM_SIZE[device]
    torch_dtype = torch.float32 if dtype == "tf32" else getattr(torch, dtype)
    torch.backends.cuda.matmul.allow_tf32 = dtype == "tf32"
    left = torch.randn(size, size, device=device).to(torch_dtype)
    right = torch.randn(size, size, device=device).to(torch_dtype)
    out = torch.empty_like(left)
    return 2 * size**3 / best_seconds(lambda: torch.mm(left, right, out=out), device)


def bandwidth(device: str, size: int) -> float:
    """Bytes read and written per second by a copy that moves `size` bytes."""
    source = torch.ones(size // 8, dtype=torch.float32, device=device)
    target = torch.empty_like(source)
    return size / best_seconds(lambda: target.copy_(source), device)


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


def startup(cells: tuple[str, ...]) -> list[dict]:
    """Milliseconds to a first result. `cold` starts from empty kernel caches, `cached` is a later process."""

    def row(what: str, *arguments) -> dict:
        return {"what": what, "ms": milliseconds(*arguments)}

    rows = [
        row("import torch", IMPORT.format(more=""), 0),
        row("import rnnfast, after torch", IMPORT.format(more="import rnnfast"), 1),
    ]
    for cell in cells:
        name = cell.upper()
        ours = FIRST_CALL.format(more="import rnnfast", namespace="rnnfast", cell=name)
        rows.append(row(f"{name} first call, torch", FIRST_CALL.format(more="", namespace="torch.nn", cell=name), 0))
        with tempfile.TemporaryDirectory() as folder:
            caches = {"NUMBA_CACHE_DIR": folder, "TRITON_CACHE_DIR": folder}
            rows.append(row(f"{name} first call, rnnfast, cold", ours, 0, 1, caches))
            rows.append(row(f"{name} first call, rnnfast, cached", ours, 0, REPEATS, caches))
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
    return float(f"{statistics.median(times):.4g}")
