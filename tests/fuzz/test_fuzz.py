"""The fuzzer with fixed seeds, and that it can find faults; `make fuzz` runs it for longer."""

from dataclasses import replace
from weakref import WeakKeyDictionary

import pytest
import torch
from conftest import INTERPRETED, backends_under_test

import rnnfast
from rnnfast import operators, states_and_signals
from tests.fuzz import declared
from tests.fuzz.cases import Case
from tests.fuzz.search import KINDS, check, check_alone, draw, script, smallest

pytestmark = [
    pytest.mark.skipif(torch.cuda.is_available(), reason="what is drawn is on the CPU"),
    pytest.mark.filterwarnings("ignore"),  # torch's, of what is drawn
]
NUMBER = {"layers": 90, "declared": 25, "actions": 15, "streams": 40}
ON_THE_CPU = pytest.mark.skipif(backends_under_test() != ["numba"], reason="kernels of declared cells are the CPU's")


@pytest.mark.long
@ON_THE_CPU
def test_nothing_is_found_of_published_cells_and_of_some_that_were_made_up():
    for seed in range(200):
        drawn = draw("declared", seed)
        problem = check("declared", drawn)
        assert problem is None, f"{problem}\n{script('declared', drawn)}"


@pytest.mark.parametrize("kind", [pytest.param(kind, marks=ON_THE_CPU if kind == "declared" else ()) for kind in KINDS])
def test_nothing_is_found(kind):
    backend = backends_under_test()[0]
    for seed in range(3 if INTERPRETED else NUMBER[kind]):
        drawn = draw(kind, seed)
        if kind == "declared":  # one cell, whose kernels other tests want, too
            drawn = (declared.legal(replace(drawn[0], cell="everything", dtype="float64")),)
        problem = check(kind, drawn, backend)
        assert problem is None, f"{problem}\n{script(kind, drawn, backend)}"


def test_a_fault_is_found_and_made_small(monkeypatch):
    monkeypatch.setattr(operators, "as_stored", lambda gradients: gradients)
    case = Case("gru", 5, 4, bidirectional=True, steps=2, incoming_layout="negated", hx="given", threads=2)
    found = smallest((case,), KINDS["layers"].simpler, lambda drawn: check("layers", drawn) is not None, 60)[0]
    assert found.incoming_layout == "negated"
    assert (found.cell, found.steps, found.input_size, found.threads, found.hx) == ("rnn_tanh", 1, 1, 1, "none")


@pytest.mark.long
@ON_THE_CPU
def test_a_fault_of_declared_cells_is_found_and_made_small(monkeypatch):
    """One state read for another where states are given by name."""
    given = states_and_signals.named_states
    monkeypatch.setattr(
        states_and_signals,
        "named_states",
        lambda cell, hx: given(cell, tuple(reversed(hx)) if type(hx) is tuple else hx),
    )
    options = {"steps": 3, "batch": 2, "hidden_size": 5, "signals": "mixed", "mode": "no_grad", "seed": 1}
    case = declared.Case("everything", 4, hx="all", **options)
    found = smallest((case,), KINDS["declared"].simpler, lambda drawn: check("declared", drawn) is not None, 60)[0]
    assert (found.hx, found.seed, found.steps, found.batch, found.signals) == ("all", 1, 1, 1, "full")


def test_stale_weights_are_found(monkeypatch):
    read = rnnfast.modules.RNNBase.weights
    kept = WeakKeyDictionary()
    monkeypatch.setattr(rnnfast.modules.RNNBase, "weights", lambda self: kept.setdefault(self, read(self)))
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
