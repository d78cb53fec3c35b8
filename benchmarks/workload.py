"""The weights and inputs of a case: the same numbers for every contender, drawn once from a seed.

All tensors here are float64 on the CPU and hold values that the case's dtype can represent, so that rounding the
inputs is no contender's error.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks.cases import Case, parameter_shapes

RESET_PROBABILITY = 0.02


@dataclass(frozen=True)
class Workload:
    case: Case
    device: str
    weights: dict[str, Tensor]  # torch's parameter names and shapes
    x: Tensor  # [T, B, I]
    dy: Tensor  # [T, B, D*P], gradient of the loss by the output
    hx: tuple[Tensor, ...]  # [layers*D, B, P or H] per state; used in mode `step`; none for declared cells
    lengths: Tensor | None  # [B], forms `packed` and `lengths`
    resets: Tensor | None  # bool [T, B], form `resets`

    def cast(self, tensor: Tensor) -> Tensor:
        """A copy in the case's dtype on its device."""
        return tensor.to(device=self.device, dtype=torch_dtype(self.case.dtype), copy=True)


def torch_dtype(name: str) -> torch.dtype:
    return torch.float32 if name == "tf32" else getattr(torch, name)


def draw(case: Case, device: str, seed: int) -> Workload:
    generator = torch.Generator().manual_seed(seed)
    dtype = torch_dtype(case.dtype)
    bound = 1 / math.sqrt(case.H)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype).double()

    def weight(shape: tuple[int, ...]) -> Tensor:
        return torch.empty(shape, dtype=torch.float64).uniform_(-bound, bound, generator=generator).to(dtype).double()

    rows = (case.layers * case.directions, case.B)
    widths = {"lstm": (case.out, case.H), "gru": (case.out,), "rnn": (case.out,)}.get(case.cell, ())
    return Workload(
        case=case,
        device=device,
        weights={name: weight(shape) for name, shape in parameter_shapes(case).items()},
        x=normal(case.T, case.B, case.I),
        dy=normal(case.T, case.B, case.directions * case.out),
        hx=tuple(normal(*rows, width).tanh().to(dtype).double() for width in widths),
        lengths=draw_lengths(case, generator) if case.form in ("packed", "lengths") else None,
        resets=draw_resets(case, generator) if case.form == "resets" else None,
    )


def draw_lengths(case: Case, generator: torch.Generator) -> Tensor:
    """Lengths spread evenly around `live * T`, in random order, the longest being T."""
    low = max(1.0, (2 * case.live - 1) * case.T)
    high = min(float(case.T), 2 * case.live * case.T)
    lengths = torch.linspace(low, high, case.B, dtype=torch.float64).round().long()
    lengths[-1] = case.T
    return lengths[torch.randperm(case.B, generator=generator)]  # [B]


def draw_resets(case: Case, generator: torch.Generator) -> Tensor:
    return torch.rand(case.T, case.B, generator=generator) < RESET_PROBABILITY  # [T, B]
