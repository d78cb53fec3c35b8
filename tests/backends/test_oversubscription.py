"""More threads than cores: quotas, calls that turn slow, and parts whose threads do not come."""

import ctypes
import math
import time

import pytest
from cpu_layers import Case, cells, same, threads
from rnnfast_kernels.cpu.plan import recipe
from rnnfast_kernels.cpu.runtime import pool

GROUPS = {
    "none": ("0::/\n", {}, math.inf),
    "version 2": ("0::/a/b\n", {"a/b/cpu.max": "150000 100000", "a/cpu.max": "max 100000"}, 1.5),
    "version 2, a group above": ("0::/a/b\n", {"a/b/cpu.max": "max 100000", "a/cpu.max": "300000 100000"}, 3.0),
    "version 2, in a container": ("0::/gone\n", {"cpu.max": "50000 100000"}, 0.5),
    "version 1": (
        "3:cpuset:/\n2:cpu,cpuacct:/job\n1:memory:/job\n",
        {"cpu,cpuacct/job/cpu.cfs_quota_us": "200000", "cpu,cpuacct/job/cpu.cfs_period_us": "100000"},
        2.0,
    ),
    "version 1, no limit": (
        "2:cpu:/\n",
        {"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000"},
        math.inf,
    ),
    "nonsense": ("0::/\n", {"cpu.max": "soon"}, math.inf),
}


@pytest.mark.parametrize("case", GROUPS)
def test_quotas_of_control_groups(tmp_path, case):
    listed, files, expected = GROUPS[case]
    groups, root = tmp_path / "cgroup", tmp_path / "fs"
    groups.write_text(listed)
    for name, content in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(content)
    assert pool.quota(groups, root) == expected
    assert pool.quota(tmp_path / "absent", root) == math.inf


def test_no_more_threads_than_cores(monkeypatch):
    monkeypatch.setattr(pool, "quota", lambda *_: 1.5)
    monkeypatch.setattr(pool.os, "sched_getaffinity", lambda _: set(range(8)), raising=False)
    monkeypatch.setattr(pool, "read_at", -math.inf)
    assert pool.usable(4) == 2
    assert pool.usable(1) == 1


def test_slow_calls_mean_oversubscription():
    """One may be chance; two are not. Time on one thread doubles until a team is quick again."""
    state, usual = pool.Oversubscription(), math.inf
    for now in (1.0, 1.1):
        usual = state.note(now, now - 0.001, usual)
    assert usual == pytest.approx(0.001)
    assert state.note(1.2, 1.19, usual) == usual
    assert state.serial_until == -math.inf
    state.note(1.3, 1.29, usual)
    assert state.serial_until == pytest.approx(1.3 + state.SHORTEST)
    state.note(2.0, 1.99, usual)
    assert state.serial_until == pytest.approx(2.0 + 2 * state.SHORTEST)
    state.note(2.5, 2.499, usual)
    assert state.serial_until == -math.inf
    assert state.pause == state.SHORTEST


def test_one_call_runs_on_one_thread_to_compare(monkeypatch):
    """A process that starts oversubscribed knows no quick call by a team."""
    case = Case("lstm", 40, 2, 30, 300)
    layer = case.layer()
    by_team, now, start = [], [0.0], recipe.Recipe.start

    def slow_by_team(self, kernel, scratch, addresses, team, program=None):
        by_team.append(team.start != 0)
        now[0] += 0.004 if by_team[-1] else 0.0005
        return start(self, kernel, scratch, addresses, team, program)

    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(recipe.Recipe, "start", slow_by_team)
    with threads(2):
        pool.oversubscription = pool.Oversubscription()  # `threads` takes it away again
        results = [case.run(layer) for _ in range(recipe.TRIAL + 4)]
    assert not any(same(results[0], each) for each in results)
    # Forward and backward: by a team, once on one thread, by a team, which is slow twice, then on one thread.
    assert by_team == [True] * 2 * recipe.TRIAL + [False, False, True, True, False, False, False, False]


def test_oversubscription_changes_no_bit(monkeypatch):
    case = Case("lstm", 40, 2, 30, 300)
    layer = case.layer()
    with threads(2):
        expected = case.run(layer)
        monkeypatch.setattr(pool.oversubscription, "is_active", lambda: True)
        monkeypatch.setattr(pool, "team", None)
        assert not same(expected, case.run(layer))


@cells
def test_parts_of_absent_threads_are_taken(monkeypatch, cell):
    """One thread that believes to be of a team of three does the work of all."""
    monkeypatch.setattr(pool, "cores", lambda: 3)
    case = Case(cell, 20, 2, 30, 300)
    layer = case.layer()
    with threads(1):
        serial = case.run(layer)
    calls = []

    @ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_int64, ctypes.c_int32, ctypes.c_int32)
    def run_by_one(function, data, count, flags):
        calls.append(count)
        ctypes.CFUNCTYPE(None, ctypes.c_int64)(function)(data)

    size = ctypes.CFUNCTYPE(ctypes.c_int32)(lambda: 3)
    start, size_of = (ctypes.cast(each, ctypes.c_void_p).value for each in (run_by_one, size))
    lying = pool.Team(start, size_of, pool.team().rest)
    monkeypatch.setattr(pool, "team", lambda: lying)
    with threads(3):
        assert not same(serial, case.run(layer))
    assert calls
    assert set(calls) == {3}
