"""Where the library may lie: in an archive, compiled without sources, where nothing can be written."""

import compileall
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from rnnfast_kernels.cpu.runtime import compiled

ROOT = Path(__file__).parents[2]
RUN = """
import sys, warnings
import torch, rnnfast
from rnnfast import operators
from rnnfast.explain import environment
assert rnnfast.__file__.startswith({place!r}), rnnfast.__file__
layer, cell, x = rnnfast.GRU(3, 5), rnnfast.GRUCell(3, 5), torch.randn(4, 2, 3)
before = rnnfast.explain(layer, x)
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    for _ in range(3):
        output = layer(x.requires_grad_())[0]
        (dx,) = torch.autograd.grad(output.sum(), x, create_graph=True)
        dx.sum().backward()
        cell(x[0])
        layer(x, resets=torch.zeros(4, 2, dtype=torch.bool))
with rnnfast.use_backend("torch"):
    torch.testing.assert_close(layer(x)[0], output)
environment()
found = [str(w.message) for w in caught if issubclass(w.category, RuntimeWarning)]
print(len(found), found, before, rnnfast.explain(layer, x), operators.version(), sep="\\n")
"""


def copied(place: Path) -> Path:
    """Copy the library, without what is kept beside its sources."""
    for package in (ROOT / "rnnfast", ROOT / "kernels" / "rnnfast_kernels"):
        shutil.copytree(package, place / package.name, ignore=shutil.ignore_patterns("__pycache__"))
    return place


def run(place: Path, before: str = "", **environment: str) -> tuple[str, ...]:
    """Run layers of the library at `place`: the number of warnings, these, what `explain` says twice, the version."""
    elsewhere = {"PYTHONPATH": str(place), "RNNFAST_BACKEND": "auto", **environment}
    kept = {name: value for name, value in os.environ.items() if name != "NUMBA_CACHE_DIR"}
    code = before + RUN.format(place=str(place))
    done = subprocess.run(
        [sys.executable, "-P", "-c", code] if sys.version_info >= (3, 11) else [sys.executable, "-c", code],
        env=kept | elsewhere,
        cwd=place.parent,
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return tuple(done.stdout.splitlines()[-5:])


def without_sources(place: Path) -> Path:
    compileall.compile_dir(place, quiet=1, legacy=True)
    for path in place.rglob("*.py"):
        path.unlink()
    return place


def archived(place: Path) -> Path:
    archive = place.with_suffix(".zip")
    with zipfile.ZipFile(archive, "w") as file:
        for path in place.rglob("*.py"):
            file.write(path, path.relative_to(place))
    return archive


@pytest.mark.parametrize("form", [archived, without_sources])
def test_without_files_of_sources_torch_runs(form, tmp_path):
    warnings, texts, *explained, version = run(form(copied(tmp_path / "library")))
    reason = "sources of the kernels cannot be read"
    assert (warnings, reason in texts) == ("1", True), texts
    assert all(each.startswith("torch: ") and reason in each for each in explained), explained
    assert version != "e3b0c44298fc1c14", "the hash of nothing"


NAMES = """
from rnnfast_kernels.cells import TORCH_CELLS
from rnnfast_kernels.cpu.runtime.compiled import file_name
print(*(f"{cell} {file_name(cell, 'float32', order)}" for cell in TORCH_CELLS for order in (1, 2)), sep="\\n")
"""


def test_an_edit_of_a_cell_compiles_that_cell_alone(tmp_path):
    shutil.copytree(ROOT / "kernels" / "rnnfast_kernels", tmp_path / "rnnfast_kernels")
    found = []
    for edited in (("", ""), ("c = f * state[1] + i * g", "c = i * g + f * state[1]")):
        cells = tmp_path / "rnnfast_kernels" / "cells.py"
        before = cells.read_text()
        assert edited[0] in before
        cells.write_text(before.replace(*edited) if edited[0] else before)
        python = [sys.executable, "-c", NAMES]
        done = subprocess.run(python, env=os.environ | {"PYTHONPATH": str(tmp_path)}, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        found.append(done.stdout.splitlines())
    changed = {a.split()[0] for a, b in zip(*found, strict=True) if a != b}
    assert changed == {"lstm"}


@pytest.mark.long
def test_no_home_no_name_and_nowhere_to_write(tmp_path):
    """Kernels are compiled for the process, which says so once."""
    place = copied(tmp_path / "library")
    (place / "rnnfast_kernels" / "cpu" / "runtime" / "__pycache__").write_text("a file, so that there can be no folder")
    nobody = (
        "import os, pwd\n"
        "def unknown(*args): raise KeyError('no such user')\n"
        "pwd.getpwuid = pwd.getpwnam = unknown\n"
        "for name in ('HOME', 'XDG_CACHE_HOME', 'USER', 'LOGNAME'): os.environ.pop(name, None)\n"
    )
    warnings, texts, *explained, _ = run(place, nobody, PYTHONDONTWRITEBYTECODE="1")
    assert (warnings, "cannot keep compiled kernels on disk" in texts) == ("1", True), texts
    assert all(each.startswith("numba: ") for each in explained), explained


PLATFORM = """
import ctypes, os, sys
import torch, llvmlite.binding
open_library = ctypes.CDLL
def open_without(name, *args, **options):
    if name is None and {platform!r} == "win32":
        raise TypeError("bad argument type for built-in operation")
    return open_library(name, *args, **options) if name is not None else object()
ctypes.CDLL = open_without
del os.sched_getaffinity
if {platform!r} == "win32":
    del os.register_at_fork, os.fork
sys.platform = {platform!r}

import rnnfast
from rnnfast.explain import environment
torch.set_num_threads(2)
layer, x = rnnfast.GRU(32, 64), torch.randn(20, 64, 32)
explained = rnnfast.explain(layer, x)
assert explained.backend == "numba" and "Python threads" in explained.kernel, explained
for _ in range(3):
    output = layer(x)[0]
    output.sum().backward()
with rnnfast.use_backend("torch"):
    torch.testing.assert_close(layer(x)[0], output)
assert "Python threads" in environment()
"""


@pytest.mark.parametrize("platform", ["win32", "darwin"])
def test_without_what_a_platform_lacks(platform):
    """Windows has no fork, neither has affinity, nor OpenMP's entry point: Python's threads share a layer."""
    compiled.kernel("gru", "float32")
    places = os.pathsep.join((str(ROOT), str(ROOT / "kernels")))
    command = [sys.executable, "-c", PLATFORM.format(platform=platform)]
    environment = os.environ | {"PYTHONPATH": places, "RNNFAST_BACKEND": "auto"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]


def test_kept_code_runs_where_numba_does_not_import():
    """What is not kept runs on torch's operators; `explain` says that kept code runs."""
    for order in (1, 2):
        compiled.kernel("gru", "float32", order)
    refuse = (
        "import builtins; original = builtins.__import__\n"
        "def refuse(name, *args, **kw):\n"
        "    if name == 'numba': raise ImportError('Numba needs NumPy 2.1 or less')\n"
        "    return original(name, *args, **kw)\n"
        "builtins.__import__ = refuse\n"
    )
    places = os.pathsep.join((str(ROOT), str(ROOT / "kernels")))
    kept = {name: value for name, value in os.environ.items() if name == "NUMBA_CACHE_DIR"}
    warnings, texts, *explained, _ = run(ROOT / "rnnfast", refuse, PYTHONPATH=places, **kept)
    assert warnings == "0", texts
    assert all(each.startswith("numba: ") and "kept machine code without numba" in each for each in explained), (
        explained
    )


def test_a_file_that_another_process_reads_is_left_alone(tmp_path, monkeypatch):
    """Windows replaces no open file: what is there was written by a process that wanted the same."""
    monkeypatch.setenv("NUMBA_CACHE_DIR", str(tmp_path))

    def refuse(*paths):
        raise PermissionError(13, "Permission denied")

    compiled.write("kernel.bin", b"code")
    monkeypatch.setattr(compiled.os, "replace", refuse)
    compiled.write("kernel.bin", b"code")
    assert compiled.read("kernel.bin") == b"code"
    assert len(list((tmp_path / "rnnfast").iterdir())) == 1
    with pytest.warns(RuntimeWarning, match="cannot keep compiled kernels"):
        compiled.write("another.bin", b"code")
