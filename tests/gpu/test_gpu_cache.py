"""Kernels that were compiled on another machine are found; without them, or by another Triton, they are compiled."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", minversion="3.5")

import compiled_kernels
import fake_cuda
import triton
from conftest import INTERPRETED
from rnnfast_kernels.gpu import aot
from triton.runtime import cache

from benchmarks.gpu import __main__ as command
from benchmarks.gpu import cache as gpu_cache

if INTERPRETED:
    pytest.skip("the interpreter compiles nothing", allow_module_level=True)

# Compiles one kernel in a process whose Triton is of another build, and says whether it was found.
COMPILE = """
import sys
from triton import knobs
from triton.runtime import cache
cache.triton_key = lambda: sys.argv[1]
from benchmarks.gpu import cache as gpu_cache
gpu_cache.pin()
from rnnfast_kernels.gpu import aot, plan
found = []
knobs.compilation.listener = lambda **said: found.append(said["cache_hit"])
case = aot.Case("sm_90", plan.Problem("rnn_tanh", 16, 1, 1, "bfloat16", "ieee", False, aot.TARGETS["sm_90"][1]), False)
usage = aot.compile_launch("sm_90", aot.describe(case))
assert usage.registers > 0
print(found)
"""


def compile_by(build: str, folder, release: str) -> str:
    paths = [str(gpu_cache.ROOT), str(gpu_cache.ROOT / "kernels"), os.environ.get("PYTHONPATH", "")]
    environment = {"TRITON_CACHE_DIR": str(folder), gpu_cache.RELEASE: release, "PYTHONPATH": os.pathsep.join(paths)}
    words = [sys.executable, "-c", COMPILE, build]
    done = subprocess.run(words, env={**os.environ, **environment}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.mark.long
def test_a_kernel_that_travelled_is_found_by_another_build_of_the_same_release(tmp_path):
    folder, archive, own = tmp_path / "kernels", tmp_path / "kernels.tar.gz", triton.__version__
    assert compile_by("one build", tmp_path / "here", own) == "[False]"
    assert gpu_cache.pack(own, archive, tmp_path / "here") == 1
    shutil.rmtree(tmp_path / "here")
    assert gpu_cache.unpack(archive, folder) == own
    assert compile_by("another", folder, own) == "[True]"
    assert compile_by("another", folder, "0.0.0") == "[False]"  # of another release, which is not asked for
    assert compile_by("another", tmp_path / "elsewhere", own) == "[False]"  # nothing has travelled there


@pytest.mark.parametrize("content", [None, b"", b"no archive at all", b"\\x1f\\x8b\\x08 cut off"])
def test_without_an_archive_that_can_be_read_there_are_no_kernels(content, tmp_path):
    archive = tmp_path / "kernels.tar.gz"
    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels" / "release").write_text("3.6.0")  # left over
    if content is not None:
        archive.write_bytes(content)
    assert gpu_cache.unpack(archive, tmp_path / "kernels") is None
    assert gpu_cache.environment(None) == {}


def test_only_the_release_that_compiled_the_kernels_looks_for_them(monkeypatch):
    before = cache.triton_key
    monkeypatch.setattr(cache, "triton_key", before)
    monkeypatch.setenv(gpu_cache.RELEASE, "0.0.0")
    assert not gpu_cache.pin()
    assert cache.triton_key is before
    monkeypatch.setenv(gpu_cache.RELEASE, triton.__version__)
    assert gpu_cache.pin()
    assert cache.triton_key() == triton.__version__


def test_an_archive_has_what_runs_and_nothing_of_the_way_there(tmp_path):
    folder, archive = tmp_path / "kernels", tmp_path / "a" / "kernels.tar.gz"
    (folder / "HASH").mkdir(parents=True)
    for name in ("k.cubin", "k.json", "__grp__k.json", "k.ptx", "k.ttir", "k.ttgir", "k.llir", "k.source", "l.so"):
        (folder / "HASH" / name).write_text('{"child_paths": {"k.cubin": "/k.cubin", "k.ptx": "/k.ptx"}}')
    assert gpu_cache.pack("3.6.0", archive, folder) == 1
    shutil.rmtree(folder)
    there = tmp_path / "there"
    assert gpu_cache.unpack(archive, there) == "3.6.0"
    assert {path.name for path in (there / "HASH").iterdir()} == {"k.cubin", "k.json", "__grp__k.json"}
    named = json.loads((there / "HASH" / "__grp__k.json").read_text())
    assert named == {"child_paths": {"k.cubin": str(there / "HASH" / "k.cubin")}}


def test_kernels_compiled_since_stay_until_another_archive_comes(tmp_path):
    folder, archive, there = tmp_path / "kernels", tmp_path / "kernels.tar.gz", tmp_path / "there"
    folder.mkdir()
    gpu_cache.pack("3.6.0", archive, folder)
    for kept in (False, True):
        assert gpu_cache.unpack(archive, there) == "3.6.0"
        assert (there / "since").exists() == kept
        (there / "since").touch()
    (folder / "k.cubin").touch()
    gpu_cache.pack("3.6.0", archive, folder)
    assert gpu_cache.unpack(archive, there) == "3.6.0"
    assert {path.name for path in there.iterdir()} == {"k.cubin", "release", "unpacked"}


def test_a_folder_that_cannot_be_written_leaves_kernels_to_be_compiled(tmp_path):
    (tmp_path / "kernels").mkdir()
    gpu_cache.pack("3.6.0", tmp_path / "kernels.tar.gz", tmp_path / "kernels")
    (tmp_path / "file").touch()  # no folder, whoever asks
    assert gpu_cache.unpack(tmp_path / "kernels.tar.gz", tmp_path / "file" / "kernels") is None
    assert gpu_cache.environment(None) == {}


def test_kernels_are_unpacked_within_the_checkout():
    """Where other users of a machine put nothing, as they may into a folder that all share."""
    assert gpu_cache.FOLDER.is_relative_to(gpu_cache.ROOT)


@pytest.mark.skipif(fake_cuda.compiler() is None, reason="needs a C compiler, as Triton's launcher does")
def test_the_kernels_of_tests_travel_too(monkeypatch):
    """Where kernels are compiled to travel, tests run over a device that is not there; elsewhere as they always do."""
    fake_cuda.library()
    as_ever = compiled_kernels.compiled_for
    monkeypatch.setattr(compiled_kernels, "compiled_for", as_ever)
    for stands_in, driver in (("", aot.Driver), ("fill", type(fake_cuda.triton_driver()))):
        monkeypatch.setenv("STANDS_IN", stands_in)
        gpu_cache.pytest_sessionstart()
        with compiled_kernels.compiled_for("sm_90"):
            assert type(triton.runtime.driver.active) is driver
    (stage,) = (stage for stage in command.FILL if stage.tests)
    words = command.pytest_words(stage, "0/1", Path("junit"), {"STANDS_IN": "fill"})
    assert words[words.index("--compiled-for") + 1] == "sm_90"
