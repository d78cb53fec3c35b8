"""Compare a model on torch's layers with itself accelerated: outputs, gradients, and the ratio of times."""

import copy
import time
from collections.abc import Callable
from statistics import median

import torch
from closeness import assert_all_close
from torch import Tensor, nn

import rnnfast

# What float32 rounding grows to over deep models; torch's own two CPU paths (oneDNN and native) differ by as much.
TOLERANCE = 1e-4
ROUNDS = 5


def compare(model: nn.Module, run: Callable[[nn.Module], dict[str, Tensor]], layers: int) -> nn.Module:
    """Check that `run(model)` gives the same results and parameter gradients on an accelerated copy, and time both.

    run: returns named results; their sum of squares is the loss. layers: how many recurrent layers the model has.

    Returns the accelerated copy.
    """
    fast = copy.deepcopy(model)
    assert [f.reason for f in rnnfast.survey(rnnfast.accelerate(fast))] == [""] * layers
    assert_all_close(results(model, run), results(fast, run), TOLERANCE)
    seconds = [(time_of(model, run), time_of(fast, run)) for _ in range(ROUNDS)]
    theirs, ours = (median(times) for times in zip(*seconds, strict=True))
    print(f"\n{type(model).__name__}: torch {theirs * 1e3:.0f} ms, rnnfast {ours * 1e3:.0f} ms, {theirs / ours:.2f}x")
    return fast


def results(model: nn.Module, run) -> dict[str, Tensor]:
    """Return the results and gradients of one call."""
    model.zero_grad()
    torch.manual_seed(0)
    found = run(model)
    sum(value.square().sum() for value in found.values()).backward()
    grads = {f"d{name}": p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    assert grads
    return {name: value.detach() for name, value in found.items()} | grads


def time_of(model: nn.Module, run) -> float:
    """Return the seconds of one call, forward and backward."""
    start = time.perf_counter()
    results(model, run)
    return time.perf_counter() - start
