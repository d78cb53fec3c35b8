"""The suite's cases under pytest-benchmark: `pytest benchmarks --benchmark-json=results.json`.

Grouped by cell, mode and sequence length; `--benchmark-compare` works as ever. A contender is checked against the
oracle before it is timed, and skipped with the reason where it is not installed or cannot run the case.
"""

from functools import lru_cache

import pytest

from benchmarks import oracle, questions
from benchmarks.cases import Case
from benchmarks.contenders import PEERS, Contender, by_backend
from benchmarks.workload import draw

DEVICE = "cpu"
CASES = [case for question in questions.quick(DEVICE) for case in question.cases]
CONTENDERS = [PEERS["torch"], by_backend("auto"), PEERS["onnxruntime"]]


@lru_cache(maxsize=1)
def workload_and_reference(case: Case):
    work = draw(case, DEVICE, seed=0)
    return work, oracle.expected(work)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
@pytest.mark.parametrize("contender", CONTENDERS, ids=lambda contender: contender.name)
def test_case(benchmark, case: Case, contender: Contender) -> None:
    benchmark.group = f"{case.cell} {case.mode} T={case.T}" + (f" B={case.B} H={case.H}" if case.mode == "step" else "")
    missing = contender.missing(DEVICE)
    if missing:
        pytest.skip(missing)
    module = contender.load()
    reason = module.unsupported(case, **contender.options)
    if reason:
        pytest.skip(reason)
    work, reference = workload_and_reference(case)
    call = module.prepare(work, **contender.options)
    assert oracle.verdict(oracle.errors(reference, oracle.results(call)), case) == ""
    with call.context():
        benchmark.pedantic(call.run, rounds=5, warmup_rounds=1, iterations=iterations(case))


def iterations(case: Case) -> int:
    """Runs per round: single steps are too short for one."""
    return 100 if case.mode == "step" else max(1, 64 // case.T)
