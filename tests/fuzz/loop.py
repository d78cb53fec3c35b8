"""The layers as plain loops of torch's operators, on padded input, in any dtype."""

import torch
from torch import Tensor

from tests.fuzz.cases import Case


class Activations:
    """tanh and sigmoid, whose results may be off by a relative error of the size `noise`, as rounding makes them."""

    def __init__(self, noise: float, random: torch.Generator):
        self.noise, self.random = noise, random

    def tanh(self, x: Tensor) -> Tensor:
        """Return tanh(x)."""
        return torch.tanh(self.shaken(x, torch.tanh, lambda y: 1 - y * y))

    def sigmoid(self, x: Tensor) -> Tensor:
        """Return sigmoid(x)."""
        return torch.sigmoid(self.shaken(x, torch.sigmoid, lambda y: y * (1 - y)))

    def shaken(self, x: Tensor, function, derivative) -> Tensor:
        """Move x so that the function's result, which its derivative is taken from, moves by the noise."""
        if not self.noise:
            return x
        with torch.no_grad():
            y = function(x.detach())
            change = self.noise * y * torch.randn(y.shape, generator=self.random, dtype=y.dtype)
            change = change / derivative(y).clamp_min(self.noise)
        return x + change


def step(cell: str, x: Tensor, h: Tensor, c: Tensor, w: list[Tensor], at: Activations) -> tuple[Tensor, Tensor]:
    """Take one step. w: w_ih, w_hh, b_ih, b_hh."""
    a, u = x @ w[0].mT + w[2], h @ w[1].mT + w[3]
    if cell == "lstm":
        i, f, g, o = (a + u).chunk(4, -1)
        c = at.sigmoid(f) * c + at.sigmoid(i) * at.tanh(g)
        return at.sigmoid(o) * at.tanh(c), c
    if cell == "gru":
        (ar, az, an), (ur, uz, un) = a.chunk(3, -1), u.chunk(3, -1)
        z = at.sigmoid(az + uz)
        return (1 - z) * at.tanh(an + at.sigmoid(ar + ur) * un) + z * h, c
    return (at.tanh(a + u) if cell == "rnn_tanh" else (a + u).relu()), c


def run(
    case: Case, x: Tensor, hx: list[Tensor], weights: list[Tensor], resets: Tensor, at: Activations
) -> dict[str, Tensor]:
    """Run the layers over x [T, B, I], from one [layers*D, B, *] tensor per state, and return every result by name."""
    steps, batch = x.shape[:2]
    lengths = torch.tensor(case.lengths or (steps,) * batch, dtype=torch.long)
    live = (torch.arange(steps)[:, None] < lengths)[..., None]  # [T, B, 1]
    count = len(weights) // (case.layers * case.directions)
    x = torch.where(live, x, torch.zeros_like(x))
    finals: list[list[Tensor]] = []
    states: list[Tensor] = []
    for layer in range(case.layers):
        found = []
        for d in range(case.directions):
            n = layer * case.directions + d
            w = weights[n * count : (n + 1) * count]
            named = [*w[:2], *(w[2:4] if case.bias else (w[0].new_zeros(()),) * 2)]
            h, c = hx[0][n], hx[-1][n]
            zeros = torch.zeros_like
            rows = [(zeros(h), zeros(c))] * steps
            for t in reversed(range(steps)) if d else range(steps):
                keep = ~resets[t][:, None]
                entering = torch.where(keep, h, zeros(h)), torch.where(keep, c, zeros(c))
                new = step(case.cell, x[t], *entering, named, at)
                if case.proj_size:
                    new = new[0] @ w[-1].mT, new[1]
                h, c = torch.where(live[t], new[0], h), torch.where(live[t], new[1], c)
                rows[t] = torch.where(live[t], new[0], zeros(h)), torch.where(live[t], new[1], zeros(c))
            finals.append([h, c])
            if rows:
                found.append([torch.stack(parts) for parts in zip(*rows, strict=True)])
            else:
                found.append([s.new_zeros(0, *s.shape) for s in (h, c)])
        states = [torch.cat(parts, -1) for parts in zip(*found, strict=True)]
        x = states[0]
        if case.dropout == "total" and layer < case.layers - 1:
            x = x * 0
    number = 2 if case.cell == "lstm" else 1
    results = {"output": x}
    results |= {f"final{s}": torch.stack([f[s] for f in finals]) for s in range(number)}
    if case.all_states:
        results |= {f"states{s}": states[s] for s in range(number)}
    return results
