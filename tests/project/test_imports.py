"""What importing costs, and that imports flow one way.

modules -> functional -> autograd -> operators -> backends -> kernels -> cells
"""

import ast
import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGES = {"rnnfast": ROOT / "rnnfast", "rnnfast_kernels": ROOT / "kernels" / "rnnfast_kernels"}

# From what a user imports down to the equations. A module imports from its own layer and those below, never upwards.
LAYERS = (
    ("rnnfast", "rnnfast.__main__"),
    ("rnnfast.freeze",),
    ("rnnfast.explain", "rnnfast.stream", "rnnfast.warmup"),
    ("rnnfast.explanations",),
    ("rnnfast.accelerate", "rnnfast.limits"),
    ("rnnfast.frozen_cells",),
    ("rnnfast.frozen",),
    ("rnnfast.frozen_weights",),
    ("rnnfast.cell_modules", "rnnfast.cells", "rnnfast.modules", "rnnfast.recurrent"),
    ("rnnfast.states_and_signals",),
    ("rnnfast.functional",),
    ("rnnfast.validate", "rnnfast.fast_path"),
    ("rnnfast.native",),
    ("rnnfast.autograd",),
    ("rnnfast.gradients",),
    ("rnnfast.flops", "rnnfast.frozen_ops", "rnnfast.onnx", "rnnfast.second_order"),
    ("rnnfast.declare",),
    ("rnnfast.operators", "rnnfast.tangent", "rnnfast.reference", "rnnfast.step_check"),
    ("rnnfast.changes", "rnnfast.layers", "rnnfast.operator_checks", "rnnfast.torch_functions", "rnnfast.vmap"),
    ("rnnfast.context",),
    ("rnnfast.backends",),
    ("rnnfast.call",),
    ("rnnfast.spec",),
    ("rnnfast._torch", "rnnfast.signatures"),
    ("rnnfast_kernels.cpu.plan",),
    ("rnnfast_kernels.cpu.runtime",),
    ("rnnfast_kernels.cpu.loops",),
    ("rnnfast_kernels.cpu.ir",),
    ("rnnfast_kernels.cpu", "rnnfast_kernels.gpu"),
    ("rnnfast_kernels.bind",),
    ("rnnfast_kernels.cells", "rnnfast_kernels"),
    ("rnnfast_kernels.equations",),
)


def modules() -> dict[str, Path]:
    """Return the file of every module of the library, by its import name."""
    found = {}
    for package, folder in PACKAGES.items():
        for path in folder.rglob("*.py"):
            parts = [package, *path.relative_to(folder).with_suffix("").parts]
            found[".".join(parts).removesuffix(".__init__")] = path
    return found


def imports(path: Path) -> set[str]:
    """Return the modules of the library that a file imports, wherever in the file it does."""
    known, found = modules(), set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: imports are absolute here"
            members = {f"{node.module}.{alias.name}" for alias in node.names}
            submodules = members & known.keys()
            found |= submodules
            if submodules != members:
                found.add(node.module)
    return found


def depth(module: str) -> int:
    """Return how far down the flow a module stands: the layer with the longest name that contains it."""
    places = {name: n for n, names in enumerate(LAYERS) for name in names}
    while module not in places:
        module, dot, _ = module.rpartition(".")
        assert dot, f"{module} has no place in LAYERS"
    return places[module]


@pytest.mark.parametrize("module", sorted(modules()))
def test_imports_flow_one_way(module):
    inner = {name for name in imports(modules()[module]) if name.split(".")[0] in PACKAGES}
    upwards = {name for name in inner if depth(name) < depth(module)}
    assert not upwards, f"{module} imports from above itself: {sorted(upwards)}"


@pytest.mark.parametrize("module", sorted(name for name in modules() if name.startswith("rnnfast_kernels")))
def test_kernels_know_no_torch(module):
    assert not {name for name in imports(modules()[module]) if name.split(".")[0] in ("torch", "rnnfast")}


def test_every_module_of_rnnfast_has_its_own_place():
    placed = {name for names in LAYERS for name in names}
    direct = {name for name in modules() if name.count(".") == 1 and name.startswith("rnnfast.")}
    assert not direct - placed, "name these in LAYERS"


PROBE = """
import json, sys, time
import torch
loaded = set(sys.modules)
start = time.process_time()
import rnnfast
seconds = time.process_time() - start
print(json.dumps({"seconds": seconds, "modules": sorted(set(sys.modules) - loaded)}))
"""


@pytest.fixture(scope="module")
def import_cost():
    """Return what importing rnnfast after torch loads, and the least processor time of three imports, in seconds."""
    reports = [
        json.loads(subprocess.run([sys.executable, "-c", PROBE], check=True, capture_output=True, text=True).stdout)
        for _ in range(3)
    ]
    return {"modules": reports[0]["modules"], "seconds": min(report["seconds"] for report in reports)}


def test_importing_loads_no_compiler(import_cost):
    compilers = ("numba", "llvmlite", "triton", "torch._dynamo", "torch._inductor")
    assert not [name for name in import_cost["modules"] if name.startswith(compilers)]


def test_importing_costs_little_over_torch(import_cost):
    assert import_cost["seconds"] < 0.3
