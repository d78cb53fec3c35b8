"""Plans of the Triton backend from the command line, so that a kernel can be tuned without editing it.

rows=32,warps=8                                     for both passes; names as in rnnfast_kernels.gpu.vary
forward:loop=streamed;backward:units=16,split=4     for one pass each
"""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager

LOOPS = ("resident", "cooperative", "streamed")
PASSES = ("forward", "backward")


def parse(text: str) -> dict[str, dict[str, str]]:
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

    asked = parse(text) if text else {name: {} for name in PASSES}

    def choose(problem: plan.Problem) -> plan.Plan:
        own = dict(asked["backward" if problem.backward else "forward"])
        loop = own.pop("loop", None)
        choices = {name: int(value) for name, value in own.items()}
        return vary.varied(problem, choices, loop) if choices or loop else plan.best(problem)

    with plan.override(choose), warnings.catch_warnings():
        warnings.filterwarnings("error", message="the device refused")
        yield
