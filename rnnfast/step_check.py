"""Whether a step does the same to tensors as what was traced of it: values and gradients of a few numbers are compared.

A trace sees the functions of torch that are applied to values. It sees neither `torch.no_grad` nor a
`torch.autograd.Function`, and takes a random number or a counter for a constant.
"""

from collections.abc import Mapping, Sequence

import torch
from rnnfast_kernels.bind import bind
from rnnfast_kernels.equations import trace
from rnnfast_kernels.equations.cell import Cell
from torch import Tensor

from rnnfast import context, torch_functions
from rnnfast.reference import as_state

ROWS, HIDDEN = 4, 2
# Far above the rounding of float32 and bfloat16, which a step may convert to.
RELATIVE, ABSOLUTE = 0.02, 1e-3
Groups = Mapping[str, Sequence[Tensor]]


def check(cell: Cell) -> None:
    """Raise CellError where torch refuses the step, or computes another value or gradient than its trace says."""
    if not context.is_undisturbed():
        return
    with torch.inference_mode(False), torch.enable_grad():
        groups, seeds = numbers_for(cell)
        expected = traced(cell, groups)
        try:
            derived = gradients(expected, groups, seeds)
        except RuntimeError:  # torch takes no gradients in a forked child of a process that used a GPU
            return
        try:
            new = run(cell, groups)
            gradient = gradients(new, groups, seeds)
        except trace.CellError:
            raise
        except Exception as error:  # whatever the user's code raises
            raise refused(cell, error) from error
    for name, a, b in zip(cell.states, new, expected, strict=True):
        if not close(a, b):
            raise trace.CellError(
                f"{cell.name}: torch computes another {name} than the step did when it was traced; a step may depend "
                "on its arguments alone, not on random numbers, counters or types"
            )
    names = [f"{group}.{name}" for group, each in cell.groups.items() for name in each]
    for name, a, b in zip(names, gradient, derived, strict=True):
        if not close(a, b):
            raise trace.CellError(
                f"{cell.name}: torch computes another gradient by {name} than the operations of the step have; write "
                "rnnfast.surrogate(value, derivative) in place of a torch.autograd.Function, and value.detach() in "
                "place of torch.no_grad"
            )


def numbers_for(cell: Cell) -> tuple[Groups, list[Tensor]]:
    """Return float64 numbers for each argument of a step, [ROWS, HIDDEN] or [HIDDEN], and gradients by its results."""
    random = torch.Generator("cpu").manual_seed(0)

    def make(*size: int) -> Tensor:
        drawn = torch.randn(size, generator=random, dtype=torch.float64, device="cpu")
        drawn[::2] = drawn[::2].sigmoid()  # within 0 and 1, for roots and logarithms
        return drawn

    groups = {
        group: [make(*((HIDDEN,) if group == "p" else (ROWS, HIDDEN))).requires_grad_() for _ in names]
        for group, names in cell.groups.items()
    }
    return groups, [make(ROWS, HIDDEN) for _ in cell.states]


def traced(cell: Cell, groups: Groups) -> list[Tensor]:
    """Compute what was traced."""
    more = (groups["p"], groups["s"]) if cell.more else ()
    step = bind(cell.forward, torch_functions.FORWARD)
    return states_like(step(groups["x"], groups["u"], groups["state"], *more)[0], groups)


def run(cell: Cell, groups: Groups) -> list[Tensor]:
    """Call the step with tensors."""
    given = {name: trace.Group(name, cell.groups[name], values) for name, values in groups.items()}
    return states_like(trace.as_tuple(trace.call_step(cell.step, given)), groups)


def states_like(new: Sequence, groups: Groups) -> list[Tensor]:
    return [as_state(each, old) for each, old in zip(new, groups["state"], strict=True)]


def gradients(new: Sequence[Tensor], groups: Groups, seeds: Sequence[Tensor]) -> list[Tensor]:
    """Return the gradient by each number that the step was given."""
    leaves = [each for values in groups.values() for each in values]
    wanted = [(each, seed) for each, seed in zip(new, seeds, strict=True) if each.requires_grad]
    if not wanted:
        return [torch.zeros_like(leaf) for leaf in leaves]
    outputs, gradient = zip(*wanted, strict=True)
    found = torch.autograd.grad(outputs, leaves, gradient, allow_unused=True)
    return [torch.zeros_like(leaf) if each is None else each for leaf, each in zip(leaves, found, strict=True)]


def close(a: Tensor, b: Tensor) -> bool:
    """Say whether two results agree where both are finite."""
    finite = a.isfinite() & b.isfinite()
    return bool((((a - b).abs() <= RELATIVE * b.abs() + ABSOLUTE) | ~finite).all())


def refused(cell: Cell, error: Exception) -> trace.CellError:
    """Return the error for a step that torch refuses, with the line of the user's code."""
    instead = "a step must run on tensors as well: x, u, state and s are [B, H] there, p is [H]"
    return trace.failed(f"{cell.name}: torch refuses the step", error, instead)
