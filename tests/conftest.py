"""What all tests share: the backends under test, the device of each, and a compiler cache of their own."""

import atexit
import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
from functools import cache
from unittest.mock import patch

import pytest

if "PYTEST_XDIST_WORKER" in os.environ:
    # Processes that share the cores sleep while they wait for their threads. OpenMP reads this when torch loads it.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import torch

# Graphs that Inductor kept from an earlier run would spare it the compilation that is under test.
os.environ["TORCHINDUCTOR_CACHE_DIR"] = tempfile.mkdtemp(prefix="rnnfast-inductor-")
atexit.register(shutil.rmtree, os.environ["TORCHINDUCTOR_CACHE_DIR"], ignore_errors=True)

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


# Kernels in about the order in which tests want them, every so manyth; those of second derivatives are marked by a 2.
COMPILE = """
import sys
from itertools import product
from rnnfast_kernels.cells import TORCH_CELLS
from rnnfast_kernels.cpu.runtime.compiled import kernel
kinds = ("float32", 1), ("bfloat16", 1), ("float64", 1), ("float64", 2), ("float16", 1), ("float32", 2)
frozen = [("float32", 0, "int8"), ("float32", 0, "bfloat16")]
wanted = [(cell, *kind) for kind, cell in product(kinds, TORCH_CELLS)]
wanted += [("lstm", *frozen[0]), ("gru", *frozen[0]), ("gru", *frozen[1])]
first, step = map(int, sys.argv[1:])
for each in wanted[first::step]:
    kernel(*each)
"""


def start_compiling(first: int = 0, step: int = 1) -> subprocess.Popen:
    words = [sys.executable, "-c", COMPILE, str(first), str(step)]
    places = os.pathsep.join(
        [os.path.join(os.path.dirname(__file__), "..", "kernels"), os.environ.get("PYTHONPATH", "")]
    )
    return subprocess.Popen(
        words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=os.environ | {"PYTHONPATH": places}
    )


@pytest.fixture(scope="session", autouse=True)
def kernels_are_compiled_beside_the_first_tests():
    """Without machine code from an earlier run, compiling takes minutes: let another core do that meanwhile."""
    if backends_under_test() != ["numba"] or "PYTEST_XDIST_WORKER" in os.environ:
        yield
        return
    compiler = start_compiling()
    yield
    compiler.kill()
    compiler.wait()


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_setupnodes(config, specs):
    """Processes that share the tests would each compile what all of them want: let them begin when that is done."""
    if backends_under_test() == ["numba"]:
        for compiler in [start_compiling(n, len(specs)) for n in range(len(specs))]:
            if compiler.wait():
                raise pytest.UsageError(f"kernels cannot be compiled: run python -c {COMPILE!r} 0 1")


@pytest.fixture(scope="session", autouse=True)
def the_interpreter_patches_once():
    """Patch the language once per function and launch, where Triton's interpreter does so in every call of a function.

    Patching again changes nothing: what has been patched stays so until the launch ends, which undoes it.
    """
    if not INTERPRETED:
        yield
        return
    from triton.runtime import interpreter

    launch, patch_language = interpreter.GridExecutor.__call__, interpreter._patch_lang

    def launch_patching_once(*args, **options):
        with patch.object(interpreter, "_patch_lang", cache(patch_language)):
            return launch(*args, **options)

    with patch.object(interpreter.GridExecutor, "__call__", launch_patching_once):
        yield


def backends_under_test() -> list[str]:
    """Return the backends that this process can run: Triton on a GPU or interpreted, else Numba."""
    return ["triton"] if INTERPRETED or torch.cuda.is_available() else ["numba"]


@pytest.fixture(params=backends_under_test())
def backend(request):
    """A backend's name, selected for the length of the test."""
    import rnnfast

    with rnnfast.use_backend(request.param):
        yield request.param


@pytest.fixture
def device() -> torch.device:
    """The device that the backend under test works on."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture(autouse=True)
def on_the_device(request):
    """Tests of a backend make their layers and tensors on its device, and compare float32 without TF32."""
    if "backend" not in request.fixturenames or not torch.cuda.is_available():
        yield
        return
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    with torch.device("cuda"):
        yield
    torch.backends.cudnn.allow_tf32 = before


def pytest_addoption(parser):
    parser.addoption(
        "--compiled-for", metavar="TARGET", help="run Triton's kernels as compiled for a GPU that is not there"
    )
    parser.addoption("--all", action="store_true", help="run the tests marked as long, too")
    parser.addoption("--share", metavar="N/ALL", help="run every ALL-th test only, from the N-th on")
    # Without pytest-timeout, which a machine with a GPU may lack, its setting means nothing.
    if importlib.util.find_spec("pytest_timeout") is None:
        parser.addini("timeout", "seconds that a test may take")


# The target of --compiled-for.
compiled_for: str | None = None


def pytest_configure(config):
    global compiled_for
    compiled_for = config.getoption("--compiled-for")
    config.addinivalue_line("markers", "timeout(seconds): what a test may take, with pytest-timeout")
    config.addinivalue_line("markers", "long: run with --all only, by `make test-all`")


def pytest_collection_modifyitems(config, items):
    """Leave long tests out unless asked for, and those that are of no interest to this process to others."""
    if not config.getoption("--all"):
        config.hook.pytest_deselected(items=[item for item in items if item.get_closest_marker("long")])
        items[:] = [item for item in items if not item.get_closest_marker("long")]
    if config.getoption("--share") is None:
        return
    n, parts = map(int, config.getoption("--share").split("/"))
    config.hook.pytest_deselected(items=[item for at, item in enumerate(items) if at % parts != n])
    items[:] = items[n::parts]
