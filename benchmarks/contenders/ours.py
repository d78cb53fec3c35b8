"""This library, by backend: the module called as torch.nn's is, with `lengths`, `resets` and `all_states` where asked.

`auto` is what a user gets without a choice. A named backend is entered once around many calls, as a program does, and
so is a plan that the Triton backend is told to run by, so that a kernel can be tuned without editing it:

    rows=32,warps=8                                     for both passes; names as in rnnfast_kernels.gpu.vary
    forward:loop=streamed;backward:units=16,slices=4    for one pass each
"""

import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

from torch import nn

import rnnfast
from benchmarks.cases import Case
from benchmarks.contenders import Call
from benchmarks.contenders.module_call import Inputs, Result, build, call, finals, forward_plain
from benchmarks.workload import Workload

LOOPS = ("resident", "cooperative", "streamed")
PASSES = ("forward", "backward")


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
                stack.enter_context(planned(plan))
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


def parse_plan(text: str) -> dict[str, dict[str, str]]:
    """The choices for each pass. Raises ValueError where the text does not read like one of the above."""
    choices: dict[str, dict[str, str]] = {name: {} for name in PASSES}
    for part in text.split(";"):
        way, _, words = part.rpartition(":")
        if way.strip() not in ("", *PASSES):
            raise ValueError(f"a plan is for forward or backward, got {way.strip()!r}")
        for word in words.split(","):
            name, _, value = (piece.strip() for piece in word.partition("="))
            if value not in LOOPS if name == "loop" else not value.isdecimal():
                raise ValueError(f"a plan must read like rows=32,warps=8 or loop=streamed, got {word!r}")
            for own in [way.strip()] if way else PASSES:
                choices[own][name] = value
    return choices


@contextmanager
def planned(text: str) -> Iterator[None]:
    """Run what follows by the best plans, changed as the text says, or by the best ones where it says nothing.

    A launch that the device refuses is an error, where a layer else runs step by step, with a warning.
    """
    from rnnfast_kernels.gpu import plan, vary

    asked = parse_plan(text) if text else {name: {} for name in PASSES}

    def choose(problem: plan.Problem) -> plan.Plan:
        own = dict(asked["backward" if problem.backward else "forward"])
        loop = own.pop("loop", None)
        choices = {name: int(value) for name, value in own.items()}
        return vary.varied(problem, choices, loop) if choices or loop else plan.best(problem)

    with plan.override(choose), warnings.catch_warnings():
        warnings.filterwarnings("error", message="the device refused")
        yield
