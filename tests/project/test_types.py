"""What type checkers and `help` see: `typed_code.py` has no errors but those that it expects."""

import importlib.util
import inspect
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from torch_releases import needs

import rnnfast

ROOT = Path(__file__).parent.parent.parent
CODE = Path(__file__).parent / "typed_code.py"
EXPECTED = {n for n, line in enumerate(CODE.read_text().splitlines(), 1) if line.endswith("# expect error")}


def check(errors: dict[int, str]):
    """Compare the lines that have errors with those that are to have them."""
    assert len(EXPECTED) > 30
    surprising = {n: errors[n] for n in errors.keys() - EXPECTED}
    assert not surprising, f"errors that are none: {surprising}"
    assert not EXPECTED - errors.keys(), f"mistakes that were not caught: {sorted(EXPECTED - errors.keys())}"


def run(*command: str, **environment: str) -> str:
    """Run a checker."""
    result = subprocess.run([sys.executable, "-m", *command], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 1, f"{result.stdout}\n{result.stderr}"
    return result.stdout


@pytest.mark.long
def test_mypy(tmp_path):
    config = tmp_path / "mypy.ini"
    config.write_text(f"[mypy]\nstrict = true\nmypy_path = {ROOT}:{ROOT / 'kernels'}\nfollow_imports = silent\n")
    cache = ROOT / ".mypy_cache" / "strict"
    told = run("mypy", "--config-file", str(config), "--cache-dir", str(cache), "--no-pretty", str(CODE))
    lines = [line.split(":", 3) for line in told.splitlines() if ": error: " in line]
    check({int(number): message for _, number, _, message in lines})


@pytest.mark.skipif(importlib.util.find_spec("basedpyright") is None, reason="needs basedpyright")
@needs(torch.__version__ >= "2.7", "gives torch.nn.Module.__init__ no types")
def test_pyright(tmp_path):
    config = tmp_path / "pyrightconfig.json"
    options = {"include": [str(CODE)], "extraPaths": [str(ROOT), str(ROOT / "kernels")], "typeCheckingMode": "strict"}
    config.write_text(json.dumps(options))
    told = run("basedpyright", "--project", str(config), "--pythonpath", sys.executable, "--outputjson")
    errors = [each for each in json.loads(told)["generalDiagnostics"] if each["severity"] == "error"]
    check({each["range"]["start"]["line"] + 1: each["message"] for each in errors})


def test_types_are_shipped():
    assert (Path(rnnfast.__file__).parent / "py.typed").exists()
    assert (ROOT / "kernels" / "rnnfast_kernels" / "py.typed").exists()


def test_dir_shows_the_public_names():
    assert set(dir(rnnfast)) == set(rnnfast.__all__)
    assert all(getattr(rnnfast, name) is not None for name in dir(rnnfast))
    assert dir(rnnfast.functional) == ["gru", "lstm", "rnn_relu", "rnn_tanh"]


def documented(arguments, text: str):
    """Look for each argument at the start of a line of its own, alone or beside others."""
    for each in arguments:
        assert re.search(rf"^ *(\w+, )*{each.name}(, \w+)*: ", inspect.cleandoc(text), re.MULTILINE), each.name


@pytest.mark.parametrize("name", ["RNN", "LSTM", "GRU", "RNNCell", "LSTMCell", "GRUCell", "Recurrent"])
def test_every_argument_is_documented(name):
    cls = getattr(rnnfast, name)
    for function, text in ((cls.__init__, cls.__doc__), (cls.forward, cls.forward.__doc__)):
        arguments = [each for each in inspect.signature(function).parameters.values() if each.name != "self"]
        assert all(each.kind not in (each.VAR_POSITIONAL, each.VAR_KEYWORD) for each in arguments)
        assert all(each.annotation is not inspect.Parameter.empty for each in arguments)
        documented(arguments, text)


FUNCTIONS = [getattr(rnnfast, n) for n in rnnfast.__all__ if inspect.isfunction(getattr(rnnfast, n))]
FUNCTIONS += [getattr(rnnfast.functional, n) for n in rnnfast.functional.__all__]


@pytest.mark.parametrize("function", FUNCTIONS, ids=lambda function: function.__name__)
def test_every_argument_of_a_function_is_documented(function):
    documented(inspect.signature(function).parameters.values(), function.__doc__)


@pytest.mark.parametrize("name", ["RNN", "LSTM", "GRU"])
def test_constructors_take_what_torch_takes_by_position(name):
    sizes = (5, 4, 2, *(("relu",) if name == "RNN" else ()), False, True, 0.0, True)
    ours, theirs = getattr(rnnfast, name)(*sizes), getattr(nn, name)(*sizes)
    assert repr(ours) == repr(theirs)[:-1] + ", rnnfast)"
    assert ours.state_dict().keys() == theirs.state_dict().keys()
    assert [w.shape for w in ours.parameters()] == [w.shape for w in theirs.parameters()]
