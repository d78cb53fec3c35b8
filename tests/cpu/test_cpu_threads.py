"""The Numba kernels by any number of threads, in forked processes and from many Python threads: the same bits."""

import concurrent.futures
import os

import pytest
import torch
from cpu_layers import ALL, Case, cells, replaced, run_python, same, threads
from rnnfast_kernels.cpu.runtime import pool

from rnnfast.backends import cpu
from rnnfast.backends.cpu.arguments import described
from rnnfast.backends.cpu.executable import shape_of


@cells
def test_bits_do_not_depend_on_threads_or_on_other_rows(cell):
    """Large enough that the plan uses several threads."""
    case = Case(cell, 40, 33, 64, 130, bidirectional=True)
    layer = case.layer()
    with threads(1):
        serial = case.run(layer)
    for count in (2, 3, 5):
        with threads(count):
            assert not same(serial, case.run(layer))
    few = replaced(layer, x=layer.x[:, 7:10], hx=tuple(initial[:, 7:10] for initial in layer.hx))
    assert torch.equal(cpu.forward(few, save=False, all_states=False).states[0], serial["output"][:, 7:10])


FEW_ROWS = {"one": (30, 1, 300, False), "both": (20, 3, 300, True), "odd": (50, 2, 213, False)}


@cells
@pytest.mark.parametrize("size", FEW_ROWS)
def test_threads_may_share_hidden_units(cell, size):
    """Too few rows to share: the threads compute parts of every step and meet."""
    steps, batch, hidden, bidirectional = FEW_ROWS[size]
    case = Case(cell, steps, batch, 30, hidden, bidirectional=bidirectional)
    layer = case.layer()
    with threads(1):
        serial = case.run(layer)
    for count in (2, 3, 5):
        with threads(count):
            assert (shape_of(described(layer)[0]).workers > 1) == (count // len(layer.reverse) > 1)
            for _ in range(5):
                assert not same(serial, case.run(layer))


TEAMS = {"none": pool.NO_TEAM, "too small": pool.team()._replace(size=0)}


@cells
@pytest.mark.parametrize("team", TEAMS)
def test_threads_that_meet_need_a_team(monkeypatch, team, cell):
    """Without OpenMP, or with fewer of its threads than were asked for, one thread does the work of all."""
    case = Case(cell, 20, 2, 30, 300)
    layer = case.layer()
    with threads(1):
        serial = case.run(layer)
    monkeypatch.setattr(pool, "team", lambda: TEAMS[team])
    with threads(2):
        assert not same(serial, case.run(layer))


def test_calls_at_once_share_the_cores():
    """A call that finds the cores taken runs on its own thread, to the same bits."""
    case = Case("lstm", 20, 2, 30, 300)
    layer = case.layer()
    with threads(2):
        expected = case.run(layer)
        token = object()
        assert pool.reserve(token, pool.cores())
        try:
            assert not pool.reserve(object(), 2)
            assert not same(expected, case.run(layer))
        finally:
            del pool.reserved[token]
        assert not pool.reserved


@cells
def test_python_threads_share_rows(monkeypatch, cell):
    case = Case(cell, 40, 33, 64, 130)
    layer = case.layer()
    with threads(1):
        serial = case.run(layer)
    monkeypatch.setattr(pool, "team", lambda: pool.NO_TEAM)
    with threads(3):
        assert not same(serial, case.run(layer))


def test_many_threads_at_once():
    case = Case("lstm", 30, 16, 32, 64)
    layer = case.layer()
    expected = case.run(layer)
    with concurrent.futures.ThreadPoolExecutor(16) as executor:
        for found in executor.map(lambda _: case.run(layer), range(64)):
            assert not same(expected, found)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this platform")
@pytest.mark.filterwarnings("ignore:This process.*multi-threaded:DeprecationWarning")
def test_a_forked_child_runs():
    """The child compares bytes itself: torch's own parallel operators may hang after a fork."""
    case = Case("lstm", 60, 32, 64, 64)
    layer = case.layer()
    dy = case.dy.float()

    def run() -> list[bytes]:
        states, finals, saved = cpu.forward(layer, save=True, all_states=False)
        gradients = cpu.backward(layer, states, saved, (dy, None), (None, None), ALL)
        tensors = (*states, *finals, gradients.x, *gradients.hx, *gradients.weights[0][:4])
        return [tensor.numpy().tobytes() for tensor in tensors]

    expected = run()
    child = os.fork()
    if child == 0:
        os._exit(run() != expected)
    assert os.waitpid(child, 0)[1] == 0


def test_a_limit_on_openmp_threads():
    code = """
        import torch
        from cpu_layers import Case
        torch.set_num_threads(2)
        Case("lstm", 20, 2, 30, 300).check()
        Case("gru", 40, 33, 64, 130).check()
    """
    done = run_python(code, OMP_THREAD_LIMIT="1")
    assert done.returncode == 0, done.stderr
