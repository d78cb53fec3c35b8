"""Sizes at which torch was measured faster than the CPU kernels: there, "auto" runs torch's own operator.

The measurements are data, `rnnfast.backends.slower`, written by `python -m benchmarks --facts`. They are of one float32
layer in one direction, as wide as its input. A row covers sizes up to halfway to the next size of the grid. It is
applied for every number of threads, although only the one named with it was measured.
"""

from functools import cache, lru_cache
from typing import NamedTuple

import torch

from rnnfast import _torch
from rnnfast.backends.slower import MEASURED
from rnnfast.call import Call

# Measured with as many inputs as hidden units; how many times more or fewer there may be.
INPUTS_PER_HIDDEN = 2
FAMILIES = {"rnn_tanh": "rnn", "rnn_relu": "rnn", "lstm": "lstm", "gru": "gru"}
PASSES = {False: "forward", True: "training"}

Range = tuple[int, int]


class Fact(NamedTuple):
    """ratio: torch's time over the kernels'."""

    cell: str
    what: str
    T: Range
    B: Range
    H: Range
    ratio: float

    def __str__(self) -> str:
        ranges = ", ".join(f"{name} {low} to {high}" for name, (low, high) in zip("TBH", self[2:5], strict=True))
        where, _ = MEASURED[instructions()]
        return f"measured {self.ratio:.2f}x torch's speed in {self.what} on {instructions()} at {ranges} ({where})"


class Sizes(NamedTuple):
    """What the facts depend on. differentiated: whether a backward pass may follow."""

    T: int
    B: int
    I: int  # noqa: E741
    H: int
    differentiated: bool


@cache
def facts() -> tuple[Fact, ...]:
    """Return the facts about this processor's instructions."""
    _, rows = MEASURED.get(instructions(), ("", ()))
    return tuple(Fact(*row) for row in rows)


@cache
def instructions() -> str:
    """Name the vector instructions of the CPU kernels; with AVX-512, AMD's and Intel's processors differ too much."""
    from rnnfast_kernels.cpu.target import processor, target

    if not processor().triple.startswith("x86_64"):
        return "NEON"
    bits = 8 * target("float32").vector
    if bits == 512:
        return "AVX-512 of AMD" if processor().name.startswith("znver") else "AVX-512 of Intel"
    return {256: "AVX2"}.get(bits, "SSE")


@lru_cache(maxsize=4096)
def slower(cell: str, sizes: Sizes) -> Fact | None:
    """Return the fact by which torch runs a call of these sizes, or None."""
    T, B, I, H, differentiated = sizes  # noqa: E741
    if not H <= I * INPUTS_PER_HIDDEN <= H * INPUTS_PER_HIDDEN**2:
        return None
    for fact in facts():
        if (fact.cell, fact.what) == (FAMILIES.get(cell), PASSES[differentiated]) and all(
            low <= size <= high for size, (low, high) in zip((T, B, H), fact[2:5], strict=True)
        ):
            return fact
    return None


def sizes_of_call(call: Call) -> Sizes | None:
    """Return the sizes of a call of which there may be facts: eager, plain tensors, no option of ours."""
    if torch.compiler.is_compiling() or call.batch_sizes is not None or call.resets is not None or call.all_states:
        return None
    options, x, tensors = call.options, call.x, (call.x, *call.hx, *call.weights)
    if options.cell not in FAMILIES or options.projected or options.num_layers > 1 or options.bidirectional:
        return None
    if {*map(type, tensors)} - {torch.Tensor, torch.nn.Parameter} or _torch.has_transforms() or _torch.in_dual_level():
        return None
    if options.recompute or x.dtype != torch.float32:
        return None
    differentiated = torch.is_grad_enabled() and any(t.requires_grad for t in tensors)
    steps, batch, inputs = x.shape
    return Sizes(steps, batch, inputs, options.hidden(call.weights), differentiated)
