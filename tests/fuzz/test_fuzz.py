"""The fuzzer with fixed seeds, and that it can find faults; `make fuzz` runs it for longer."""

from weakref import WeakKeyDictionary

import pytest
import torch
from conftest import INTERPRETED, backends_under_test

import rnnfast
from rnnfast import operators
from tests.fuzz.cases import Case
from tests.fuzz.search import KINDS, check, check_alone, draw, script, smallest

pytestmark = [
    pytest.mark.skipif(torch.cuda.is_available(), reason="what is drawn is on the CPU"),
    pytest.mark.filterwarnings("ignore"),  # torch's, of what is drawn
]
NUMBER = {"layers": 120, "actions": 25, "streams": 40}


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_is_found(kind):
    backend = backends_under_test()[0]
    for seed in range(3 if INTERPRETED else NUMBER[kind]):
        drawn = draw(kind, seed)
        problem = check(kind, drawn, backend)
        assert problem is None, f"{problem}\n{script(kind, drawn, backend)}"


def test_a_fault_is_found_and_made_small(monkeypatch):
    monkeypatch.setattr(operators, "as_stored", lambda gradients: gradients)
    case = Case("gru", 5, 4, bidirectional=True, steps=2, incoming_layout="negated", hx="given", threads=2)
    found = smallest((case,), KINDS["layers"].simpler, lambda drawn: check("layers", drawn) is not None, 60)[0]
    assert found.incoming_layout == "negated"
    assert (found.cell, found.steps, found.input_size, found.threads, found.hx) == ("rnn_tanh", 1, 1, 1, "none")


def test_stale_weights_are_found(monkeypatch):
    read = rnnfast.modules.Recurrent.weights
    kept = WeakKeyDictionary()
    monkeypatch.setattr(rnnfast.modules.Recurrent, "weights", lambda self: kept.setdefault(self, read(self)))
    actions = [("call", 1), ("set_threads", 2), ("assign", 3), ("call", 4)]
    assert "result 0" in check("actions", (1, actions))
    found = smallest((1, actions), KINDS["actions"].simpler, lambda drawn: check("actions", drawn) is not None, 60)
    assert found == (1, [("call", 1), ("assign", 3), ("call", 4)])


def test_a_stream_that_steps_too_often_is_found(monkeypatch):
    step = rnnfast.Stream.__call__
    monkeypatch.setattr(rnnfast.Stream, "__call__", lambda self, x: (step(self, x), step(self, x))[1])
    assert "output 0" in check("streams", (1, [("step", 1)]))


def test_a_script_runs_alone():
    assert "KeyError" in check_alone("actions", (1, [("no such action", 1)]))
