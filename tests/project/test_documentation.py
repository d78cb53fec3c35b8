"""README.md and docs/*.md: the code runs and prints what is shown, links lead somewhere, and the site builds."""

import contextlib
import doctest
import importlib.util
import io
import linecache
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

import rnnfast
from rnnfast.declare import Cell

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
FENCE = re.compile(r"^```(\S*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
# `output` is what the Python code above it prints. `text` and the others are not run.
LANGUAGES = {"python", "output", "text", "sh", "bibtex"}
# What a page of the site loads.
LOADED = re.compile(r'<(?:script|img|source)[^>]*src(?:set)?="([^"]*)|<link rel="stylesheet" href="([^"]*)')
CHECKER, FLAGS = doctest.OutputChecker(), doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE


class Block(NamedTuple):
    """A fenced block of a page: its language, its text, and the line at which the text begins."""

    language: str
    text: str
    line: int


def blocks_of(text: str) -> list[Block]:
    return [Block(m[1], m[2], text.count("\n", 0, m.start(2))) for m in FENCE.finditer(text)]


def run(blocks: list[Block], name: str) -> None:
    """Run a page's Python blocks in one namespace.

    Raises:
        AssertionError: an `output` is not what the block before it printed.
    """
    namespace: dict[str, object] = {"__name__": "page"}
    printed = None
    for language, text, line in blocks:
        if language == "python":
            # Errors name the page and its line, and show it.
            source = "\n" * line + text
            linecache.cache[name] = len(source), None, source.splitlines(keepends=True), name
            with contextlib.redirect_stdout(io.StringIO()) as stream:
                exec(compile(source, name, "exec"), namespace)
            printed = stream.getvalue()
        elif language == "output":
            assert printed is not None, f"{name}:{line}: no Python code before this output"
            assert CHECKER.check_output(text, printed, FLAGS), f"{name}:{line} shows\n{text}\nbut got\n{printed}"
            printed = None


@pytest.fixture
def one_thread():
    """Small layers gain nothing from a second thread, and wait for it while other programs run."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_code_runs_and_prints_what_is_shown(page, one_thread):
    run(blocks_of(page.read_text()), page.name)


def test_pages_show_code():
    counts = {page.name: sum(b.language == "python" for b in blocks_of(page.read_text())) for page in PAGES}
    for name in ("README.md", "index.md", "cells.md", "sequences.md", "inference.md", "pytorch.md"):
        assert counts[name] >= 2, name


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_block_names_its_language(page):
    text = page.read_text()
    assert {block.language for block in blocks_of(text)} <= LANGUAGES
    assert text.count("\n```") + text.startswith("```") == 2 * len(blocks_of(text))


def test_a_page_that_shows_something_else_is_found():
    page = "```python\nprint(6 * 7)\n```\n\n```output\n{}\n```\n"
    run(blocks_of(page.format("42")), "page")
    with pytest.raises(AssertionError, match=r"but got\s+42"):
        run(blocks_of(page.format("43")), "page")
    with pytest.raises(NameError):
        run(blocks_of("```python\nmissing\n```\n"), "page")


def anchors_of(text: str) -> set[str]:
    """The anchors of a page's headings, as GitHub and the site make them."""
    headings = re.findall(r"^#+ (.*)$", FENCE.sub("", text), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", [ROOT / "CONTRIBUTING.md", *PAGES], ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    for target in re.findall(r"""(?:\]\(|(?:src|srcset|href)=")([^)"\s]+)""", FENCE.sub("", page.read_text())):
        if "://" in target:
            continue
        path, _, anchor = target.partition("#")
        file = page.parent / path if path else page
        assert file.exists(), target
        assert not anchor or anchor in anchors_of(file.read_text()), target


def test_the_api_page_has_every_public_name():
    page = (ROOT / "docs" / "api.md").read_text()
    assert [name for name in rnnfast.__all__ if not re.search(rf"rnnfast\.{name}\b", page)] == []


def test_the_published_cells_are_all_named():
    cells = {name for name, cell in vars(rnnfast.cells).items() if isinstance(cell, Cell)}
    page = (ROOT / "docs" / "cells.md").read_text()
    section = page.split("## Published cells")[1].split("```")[0]
    assert set(re.findall(r"`(\w+)`", section)) == cells
    assert f"`rnnfast.cells` has {len(cells)} published cells" in (ROOT / "README.md").read_text()


@pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in ("mkdocs", "material", "mkdocstrings")),
    reason="the site needs the packages of the extra `docs`: pip install 'rnnfast[docs]'",
)
def test_the_site_builds_without_warnings_and_loads_nothing_from_elsewhere(tmp_path):
    words = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path)]
    done = subprocess.run(
        words, cwd=ROOT, capture_output=True, text=True, env=os.environ | {"NO_MKDOCS_2_WARNING": "1"}
    )
    assert done.returncode == 0, done.stderr[-3000:]
    pages = sorted(tmp_path.glob("*.html"))
    assert {page.stem for page in pages} >= {page.stem for page in PAGES[1:]}
    for page in pages:
        loaded = LOADED.findall(page.read_text())
        assert not [each for pair in loaded for each in pair if "://" in each or each.startswith("//")], page.name
