"""This library, by backend: the module called as torch.nn's is, with `lengths`, `resets` and `all_states` where asked.

`auto` is what a user gets without a choice. A named backend is entered once around many calls, as a program does, and
so is a plan that the Triton backend is told to run by.
"""

from contextlib import ExitStack, contextmanager

from torch import nn

import rnnfast
from benchmarks import tuning
from benchmarks.cases import Case
from benchmarks.contenders import Call
from benchmarks.contenders.module_call import Inputs, Result, build, call, finals, forward_plain
from benchmarks.workload import Workload


def unsupported(case: Case, backend: str, plan: str = "") -> str | None:
    if backend == "reference" and case.T > 1024:
        return "the plain torch loop is not asked for more than 1024 steps"
    return None


def prepare(work: Workload, backend: str, plan: str = "") -> Call:
    forward = {"lengths": forward_lengths, "resets": forward_resets, "states": forward_states}

    @contextmanager
    def chosen():
        with ExitStack() as stack:
            if backend != "auto":
                stack.enter_context(rnnfast.use_backend(backend))
            if plan or (work.device == "cuda" and backend in ("auto", "triton")):
                stack.enter_context(tuning.planned(plan))
            yield

    layer = build(rnnfast, work)
    if work.case.weights:
        layer = rnnfast.freeze(layer, work.case.weights)
    return call(work, layer, forward.get(work.case.form, forward_plain), chosen)


def forward_lengths(module: nn.Module, given: Inputs) -> Result:
    output, states = module(given.x, given.hx, lengths=given.lengths)
    return Result(output, finals(states))


def forward_resets(module: nn.Module, given: Inputs) -> Result:
    output, states = module(given.x, given.hx, resets=given.resets)
    return Result(output, finals(states))


def forward_states(module: nn.Module, given: Inputs) -> Result:
    output, states, every = module(given.x, given.hx, all_states=True)
    return Result(output, finals(states), every[1])
