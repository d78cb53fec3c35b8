"""Installations on which the kernels of a device cannot run: `auto` runs torch, warns once, and says why."""

import os
import subprocess
import sys

import pytest
import torch

import rnnfast
from rnnfast.backends import cpu, dispatch
from rnnfast.backends.cpu import available
from rnnfast.explain import environment

BREAKAGES = {
    "numba refuses to import": (
        "import builtins; true_import = builtins.__import__\n"
        "def refuse(name, *args, **kw):\n"
        "    if name == 'numba': raise ImportError('Numba needs NumPy 2.1 or less')\n"
        "    return true_import(name, *args, **kw)\n"
        "builtins.__import__ = refuse",
        "numba cannot be imported",
    ),
    "no library of llvmlite": (
        "import builtins; real = builtins.__import__\n"
        "def fail(name, *args, **kw):\n"
        "    if name.startswith('llvmlite'): raise OSError('Could not find/load shared object file')\n"
        "    return real(name, *args, **kw)\n"
        "builtins.__import__ = fail",
        "Could not find/load shared object file",
    ),
    "no sources": (
        "import pathlib; real = pathlib.Path.read_text\n"
        "def fail(self, *args, **kw):\n"
        "    if self.suffix == '.py': raise FileNotFoundError(2, 'No such file', str(self))\n"
        "    return real(self, *args, **kw)\n"
        "pathlib.Path.read_text = fail",
        "sources of the kernels cannot be read",
    ),
    "no compilation": ("os.environ['NUMBA_DISABLE_JIT'] = '1'", "NUMBA_DISABLE_JIT"),
    "a kernel that does not compile": (
        "from rnnfast_kernels.cpu.runtime import compiled\n"
        "def fail(*args): fail.count += 1; raise TypeError('no such type')\n"
        "fail.count = 0; compiled.compile_code = fail",
        "TypeError: no such type",
    ),
}
CODE = """
import os, sys, warnings
import torch, rnnfast
{breakage}
layer, cell, x = rnnfast.GRU(3, 5), rnnfast.GRUCell(3, 5), torch.randn(4, 2, 3)
if "TypeError" not in {reason!r}:
    assert {reason!r} in rnnfast.explain(layer, x).reason, rnnfast.explain(layer, x)
    from rnnfast.explain import environment
    environment()
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    for n in range(4):
        output = layer(x)[0]
        output.sum().backward()
        with torch.no_grad():
            assert torch.equal(layer(x)[0], output)
        cell(x[0])
        layer(x, resets=torch.zeros(4, 2, dtype=torch.bool))
found = [str(w.message) for w in caught if issubclass(w.category, RuntimeWarning)]
assert any({reason!r} in each for each in found), found
explained = rnnfast.explain(layer, x)
assert explained.backend == "torch" and {reason!r} in explained.reason, explained
assert len(found) == 1, found
if "TypeError" in {reason!r}:
    assert fail.count == 1
with rnnfast.use_backend("numba"):
    try:
        layer(x)
    except RuntimeError as error:
        assert {reason!r} in str(error), error
    else:
        raise AssertionError("ran")
"""


@pytest.mark.parametrize("what", BREAKAGES)
def test_auto_runs_torch_and_says_why(what, tmp_path):
    breakage, reason = BREAKAGES[what]
    environment = os.environ | {"NUMBA_CACHE_DIR": str(tmp_path), "RNNFAST_BACKEND": "auto"}
    code = [sys.executable, "-c", CODE.format(breakage=breakage, reason=reason)]
    run = subprocess.run(code, env=environment, capture_output=True, text=True, check=False, timeout=200)
    assert run.returncode == 0, run.stderr[-3000:]


ON_A_GPU = """
import sys, warnings
from types import SimpleNamespace
import torch, rnnfast
from rnnfast.backends.dispatch import automatic, backend_of, choose, steps_by_torch
gpu = torch.device("cuda")
for triton, reason in (
    (None, "triton cannot be imported"),
    (SimpleNamespace(__version__="3.2.0"), "the GPU kernels need Triton 3.5 or newer, found 3.2.0"),
):
    sys.modules["triton"] = triton
    automatic.cache_clear()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert steps_by_torch("lstm", gpu, torch.float32)
        assert len(caught) == 1
        assert backend_of("lstm", gpu, torch.bfloat16, False) == "torch"
        assert backend_of("lstm", gpu, torch.float32, True) == "reference"
        assert backend_of("lstm", torch.device("meta"), torch.float32, False) == "torch"
    (warned,) = [str(w.message) for w in caught]
    assert reason in warned, warned
    explained = choose("lstm", gpu, torch.float32, False)
    assert reason in explained.reason, explained
"""


def test_auto_says_why_a_gpu_has_no_kernels():
    """Without Triton, and with the one that torch 2.6 brings."""
    environment = os.environ | {"RNNFAST_BACKEND": "auto"}
    run = subprocess.run([sys.executable, "-c", ON_A_GPU], env=environment, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr[-3000:]


def test_second_derivatives_do_without_kernels_that_fail(monkeypatch):
    if dispatch.setting() not in ("auto", "numba"):
        pytest.skip("about the CPU's kernels")
    layer, x = rnnfast.GRU(3, 5).double(), torch.randn(4, 2, 3, dtype=torch.float64, requires_grad=True)

    def second():
        (gradient,) = torch.autograd.grad(layer(x)[0].square().sum(), x, create_graph=True)
        return torch.autograd.grad(gradient.square().sum(), x)[0]

    expected = second()
    monkeypatch.setattr(available, "obtained", available.obtained - {("gru", torch.float64, 2)})
    monkeypatch.setattr(available, "failures", {("gru", torch.float64, 2): "broken"})
    monkeypatch.setattr(cpu, "jvp", None)
    monkeypatch.setattr(cpu, "hvp", None)
    assert torch.allclose(second(), expected)


def test_the_report_names_folder_vectors_and_threads(tmp_path, monkeypatch):
    monkeypatch.setenv("NUMBA_CACHE_DIR", str(tmp_path))
    (tmp_path / "rnnfast").mkdir()
    (tmp_path / "rnnfast" / "kernel.bin").write_bytes(bytes(2_000_000))
    told = environment()
    assert f"{tmp_path / 'rnnfast'} (1 kernels, 2.0 MB, writable)" in told
    assert "vectors of" in told
    assert available.team_name() in told
