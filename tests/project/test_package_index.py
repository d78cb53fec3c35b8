"""What a package index shows of the project: absolute links, metadata, and no Triton for who has no GPU."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
from hatchling.metadata.core import ProjectMetadata
from hatchling.plugin.manager import PluginManager

import rnnfast
from hatch_build import absolute_links

ROOT = Path(__file__).parent.parent.parent
TARGETS = re.compile(r'\]\(([^)\s]+)\)|(?:href|src|srcset)="([^"]+)"')
WITHOUT_TRITON = """
import sys
sys.modules["triton"] = None  # what an import finds where it is not installed
import torch, rnnfast
from rnnfast.explain import environment
layer, x = rnnfast.LSTM(3, 5), torch.randn(4, 2, 3)
layer(x)[0].sum().backward()
rnnfast.Stream(layer)(x[0, :1])
assert rnnfast.explain(layer, x).backend in ("numba", "torch")
environment()
try:
    with rnnfast.use_backend("triton"):
        layer(x)
except RuntimeError as error:
    print(error)
"""


@pytest.fixture(scope="module")
def core():
    return ProjectMetadata(str(ROOT), PluginManager()).core


def test_every_link_in_the_description_is_absolute(core):
    targets = [one or two for one, two in TARGETS.findall(core.readme)]
    assert targets
    assert not [target for target in targets if not target.startswith(("https://", "#"))]


def test_links_lead_into_the_repository(core):
    """Each file that the description names exists, so that the absolute link does too."""
    prefix = re.compile(re.escape(core.urls["Repository"]) + r"/(?:blob|raw)/main/([^#]+)")
    named = [found[1] for target in TARGETS.findall(core.readme) if (found := prefix.match(target[0] or target[1]))]
    assert "LICENSE" in named
    assert not [name for name in named if not (ROOT / name).exists()]


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("[a](docs/a.md#b)", "[a](https://host/x/blob/main/docs/a.md#b)"),
        ("![a](docs/a.svg)", "![a](https://host/x/raw/main/docs/a.svg)"),
        ('<img src="a.png">', '<img src="https://host/x/raw/main/a.png">'),
        ('<source srcset="a.svg">', '<source srcset="https://host/x/raw/main/a.svg">'),
        ("[a](#b) [c](https://d) [e](mailto:f)", "[a](#b) [c](https://d) [e](mailto:f)"),
    ],
)
def test_a_relative_link_becomes_absolute(before, after):
    assert absolute_links(before, "https://host/x") == after


def test_triton_is_an_extra(core):
    assert not [name for name in core.dependencies if name.startswith("triton")]
    kernels = (ROOT / "kernels" / "rnnfast_kernels" / "gpu" / "__init__.py").read_text()
    oldest = re.search(r"need Triton (\S+) or newer", kernels)[1]
    assert [name for name in core.optional_dependencies["gpu"] if name.startswith(f"triton>={oldest};")]


def test_layers_run_without_triton():
    command = [sys.executable, "-W", "error", "-c", WITHOUT_TRITON]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "triton" in done.stdout.lower()


def test_the_version_is_one(core):
    assert core.version == rnnfast.__version__
    assert f"version: {core.version}" in (ROOT / "CITATION.cff").read_text()
