"""The built wheel: installs into a clean environment, runs a layer, and adds no import name but ours."""

import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

RUN_A_LAYER = """
import rnnfast, torch
layer = rnnfast.LSTM(3, 5)
x = torch.randn(7, 2, 3)
oracle = torch.nn.LSTM(3, 5)
oracle.load_state_dict(layer.state_dict())
with rnnfast.use_backend("numba"):
    torch.testing.assert_close(layer(x)[0], oracle(x)[0])
print(rnnfast.__file__)
"""


def run(*command: object, cwd: Path) -> str:
    result = subprocess.run([str(part) for part in command], cwd=cwd, capture_output=True, text=True)
    assert result.returncode == 0, f"{command}\n{result.stdout}\n{result.stderr}"
    return result.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """Build the wheel with the installed build backend."""
    folder = tmp_path_factory.mktemp("wheel")
    options = ("--quiet", "--no-deps", "--no-build-isolation", "--wheel-dir", folder)
    run(sys.executable, "-m", "pip", "wheel", *options, ROOT, cwd=folder)
    (path,) = folder.glob("*.whl")
    return path


@pytest.fixture(scope="module")
def environment(wheel, tmp_path_factory) -> Path:
    """Install the wheel, and nothing else, into a new environment that finds torch and Numba where they already are."""
    folder = tmp_path_factory.mktemp("environment")
    venv.create(folder, with_pip=False)
    python = folder / "bin" / "python"
    run(sys.executable, "-m", "pip", "--python", python, "install", "--quiet", "--no-deps", wheel, cwd=folder)
    # A path file's own path files are not read, so the development environment's editable rnnfast stays out.
    (site_packages(folder) / "dependencies.pth").write_text(sysconfig.get_path("purelib"))
    return folder


def site_packages(environment: Path) -> Path:
    (path,) = environment.glob("lib/python3*/site-packages")
    return path


def test_installs_and_runs_a_layer(environment):
    place = run(environment / "bin" / "python", "-c", RUN_A_LAYER, cwd=environment)
    assert Path(place.strip()).is_relative_to(environment)


def test_adds_no_import_name_but_ours(environment):
    added = {path.name for path in site_packages(environment).iterdir()}
    installed = {name for name in added if not name.endswith((".dist-info", ".pth"))}
    assert installed == {"rnnfast", "rnnfast_kernels"}


def test_carries_what_belongs_to_the_package_and_nothing_more(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    assert "rnnfast/py.typed" in names
    assert any(name.endswith("licenses/LICENSE") for name in names)
    assert not [name for name in names if name.startswith(("tests/", "benchmarks/", "examples/"))]
    assert not [name for name in names if not name.endswith((".py", "py.typed")) and ".dist-info/" not in name]
