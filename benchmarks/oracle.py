"""What is right: torch.nn in float64, on the same device and numbers. A contender is checked before it is timed."""

from dataclasses import replace

import torch
from torch import Tensor

from benchmarks.cases import Case
from benchmarks.contenders import Call, torch_nn
from benchmarks.workload import Workload

# The largest relative L2 norm of an error, over all tensors, with which a result counts as the same function. These
# bounds tell a wrong gate from rounding over thousands of steps; the errors themselves are reported beside the times.
TOLERANCE = {"float64": 1e-9, "float32": 1e-4, "tf32": 2e-2, "float16": 2e-2, "bfloat16": 1e-1, "int8": 1e-1}


def expected(work: Workload) -> dict[str, Tensor]:
    """Every result of the case in float64."""
    exact = replace(work, case=replace(work.case, dtype="float64"))
    return results(torch_nn.prepare(exact))


def results(call: Call) -> dict[str, Tensor]:
    """Run a contender once and read what it computed."""
    with call.context():
        return call.read(call.run())


def errors(reference: dict[str, Tensor], got: dict[str, Tensor]) -> dict[str, float]:
    """Relative L2 norm of the error, by tensor. A result that is missing or has another shape is wrong: infinite."""
    return {name: relative_error(tensor, got.get(name)) for name, tensor in reference.items()}


def relative_error(reference: Tensor, got: Tensor | None) -> float:
    if got is None or got.shape != reference.shape:
        return float("inf")
    scale = torch.linalg.vector_norm(reference).item()
    difference = torch.linalg.vector_norm(got - reference).item()
    return difference / scale if scale else difference


def verdict(found: dict[str, float], case: Case) -> str:
    """Say what is wrong, worst tensor first; empty where everything is right. NaN counts as wrong."""
    allowed = TOLERANCE[case.weights if case.weights in TOLERANCE else case.dtype]
    wrong = {name: error for name, error in found.items() if not error <= allowed}
    if not wrong:
        return ""
    name = max(wrong, key=lambda key: wrong[key] if wrong[key] == wrong[key] else float("inf"))
    return f"{name}: relative error {wrong[name]:.1e}, allowed {allowed:.0e}"
