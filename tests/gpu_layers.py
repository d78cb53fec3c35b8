"""Layers as the Triton backend receives them, and what they must give: the reference loop in float64."""

from dataclasses import dataclass, replace

import loop_backend
import torch
from closeness import assert_all_close
from torch import Tensor

from rnnfast.backends import Layer, Needs, Weights

STATES = {"rnn_tanh": 1, "rnn_relu": 1, "lstm": 2, "gru": 1}
GATES = {"rnn_tanh": 1, "rnn_relu": 1, "lstm": 4, "gru": 3}
ALL = Needs(True, True, True)


@dataclass(frozen=True)
class Case:
    """A layer to make. layout: "dense", "padded" or "packed"; P: width of a projection, or None."""

    cell: str
    T: int = 4
    B: int = 7
    I: int = 3  # noqa: E741
    H: int = 17
    P: int | None = None
    dtype: torch.dtype = torch.float32
    layout: str = "dense"
    reverse: tuple[bool, ...] = (False, True)
    resets: bool = False
    bias: bool = True

    def __str__(self) -> str:
        sizes = "x".join(map(str, (self.T, self.B, self.I, self.H)))
        extra = [f"p{self.P}"] * (self.P is not None) + ["resets"] * self.resets + ["nobias"] * (not self.bias)
        way = "".join("<" if r else ">" for r in self.reverse)
        return "-".join((self.cell, sizes, str(self.dtype).removeprefix("torch."), self.layout, way, *extra))


def lengths_of(case: Case) -> list[int]:
    """Lengths that fall, with a full row first and, where the layout allows it, an empty one last."""
    shortest = 0 if case.layout == "padded" and case.B > 1 else 1
    span = case.T - shortest
    return [case.T - span * b // max(case.B - 1, 1) for b in range(case.B)]


def make(case: Case, device: torch.device) -> Layer:
    """Build a layer with random contents, NaN in the padding."""
    generator = torch.Generator().manual_seed(case.T + 10 * case.B + 100 * case.H)

    def random(*shape: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(*shape, generator=generator, dtype=torch.float64) * scale).to(device, case.dtype)

    D, P, rows = len(case.reverse), case.P or case.H, GATES[case.cell] * case.H
    x = random(case.T, case.B, case.I)
    batch_sizes = None
    if case.layout != "dense":
        lengths = torch.tensor(lengths_of(case))
        batch_sizes = (lengths > torch.arange(case.T)[:, None]).sum(1)
        dead = torch.arange(case.B) >= batch_sizes[:, None]
        x = x[~dead] if case.layout == "packed" else x.masked_fill(dead[..., None].to(device), float("nan"))
        batch_sizes = batch_sizes if case.layout == "packed" else batch_sizes.to(device)
    scale = case.H**-0.5
    weights = tuple(
        Weights(
            random(rows, case.I, scale=scale),
            random(rows, P, scale=scale),
            random(rows, scale=scale) if case.bias else None,
            random(rows, scale=scale) if case.bias else None,
            None if case.P is None else random(P, case.H, scale=scale),
        )
        for _ in range(D)
    )
    hx = tuple(random(D, case.B, width) for width in (P, case.H)[: STATES[case.cell]])
    resets = None
    if case.resets:
        resets = (torch.rand(case.T, case.B, generator=generator) < 0.3).to(device)
    return Layer(case.cell, x, hx, weights, case.reverse, batch_sizes, resets)


def exact(layer: Layer) -> Layer:
    """The same layer in float64 on the CPU, zeros in the padding."""

    def wide(tensor: Tensor | None) -> Tensor | None:
        return None if tensor is None else tensor.detach().cpu().double()

    sizes = None if layer.batch_sizes is None else layer.batch_sizes.cpu()
    x = wide(layer.x)
    if sizes is not None and x.dim() == 3:
        x = x.masked_fill((torch.arange(x.shape[1]) >= sizes[:, None])[..., None], 0)
    return replace(
        layer,
        x=x,
        hx=tuple(map(wide, layer.hx)),
        weights=tuple(Weights(*map(wide, w)) for w in layer.weights),
        batch_sizes=sizes,
        resets=None if layer.resets is None else layer.resets.cpu(),
    )


def gradients_like(tensors: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Fixed gradients by some results, different for every element."""
    return tuple(torch.cos(torch.arange(t.numel(), dtype=torch.float64)).view(t.shape).to(t) for t in tensors)


def named(prefix: str, tensors) -> dict[str, Tensor]:
    return {f"{prefix}{n}": t.detach().cpu() for n, t in enumerate(tensors) if t is not None}


def run(backend, layer: Layer, needs: Needs = ALL, groups: int = 1, dstates: bool = True, dfinals: bool = True):
    """Forward and backward of one layer: every result and gradient by name."""
    result = backend.forward(layer, save=True, all_states=True)
    ds = gradients_like(result.states) if dstates else (None,) * len(result.states)
    df = gradients_like(result.finals) if dfinals else (None,) * len(result.finals)
    grads = backend.backward(layer, result.states, result.saved, ds, df, needs, groups)
    weights = [w for direction in grads.weights for w in direction]
    return {
        **named("states", result.states),
        **named("finals", result.finals),
        **named("dx", [grads.x] * needs.x),
        **named("dhx", grads.hx * needs.hx),
        **named("dw", weights * needs.weights),
    }


def check(backend, layer: Layer, tolerance: float | None = None, **options) -> dict[str, Tensor]:
    """Compare a backend with the reference loop in float64; return what the backend gave."""
    got = run(backend, layer, **options)
    expected = run(loop_backend, exact(layer), **options)
    for name, value in expected.items():
        if name.startswith("dx") and layer.batch_sizes is not None and value.dim() == 3:
            assert not value[torch.arange(value.shape[1]) >= layer.batch_sizes.cpu()[:, None]].any()
    assert_all_close(expected, got, tolerance)
    return got
