"""docs/architecture.md names modules and functions that exist."""

import importlib
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "docs" / "architecture.md").read_text()
NAMES = sorted(set(re.findall(r"`((?:rnnfast|rnnfast_kernels)(?:\.\w+)+)`", TEXT)))
FILES = sorted(set(re.findall(r"`([\w/]+\.(?:py|md|svg))`", TEXT)))


def test_the_map_names_enough_to_be_one():
    assert len(NAMES) > 25


@pytest.mark.parametrize("name", NAMES)
def test_names(name):
    head, *parts = name.split(".")
    thing = importlib.import_module(head)
    for n, part in enumerate(parts):
        if not hasattr(thing, part):
            importlib.import_module(".".join((head, *parts[: n + 1])))
        thing = getattr(thing, part)


@pytest.mark.parametrize("name", FILES)
def test_files(name):
    assert any(
        path.as_posix().endswith(f"/{name}") for path in ROOT.rglob(Path(name).name) if ".venv" not in path.parts
    )
