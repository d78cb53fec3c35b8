"""One layer as a CPU backend receives it, with its float64 oracle: what the tests of the Numba kernels share."""

import contextlib
import dataclasses
import os
import subprocess
import sys
import textwrap

import pytest
import torch
from rnnfast_kernels.cells import CELLS, TORCH_CELLS
from rnnfast_kernels.cpu.runtime import pool

from rnnfast.backends import Layer, Needs, Weights, cpu

TOLERANCE = {torch.float32: 2e-6, torch.float64: 1e-13, torch.bfloat16: 6e-3, torch.float16: 8e-4}
ALL = Needs(x=True, hx=True, weights=True)


def make_module(cell: str, inputs: int, hidden: int, **options) -> torch.nn.RNNBase:
    """A float64 torch layer of the kind that a cell belongs to."""
    if cell.startswith("rnn"):
        return torch.nn.RNN(inputs, hidden, nonlinearity=cell[4:], **options).double()
    return {"lstm": torch.nn.LSTM, "gru": torch.nn.GRU}[cell](inputs, hidden, **options).double()


def module_weights(module: torch.nn.RNNBase) -> tuple[Weights, ...]:
    """The module's parameters as a backend receives them."""

    def named(suffix: str) -> Weights:
        names = ("weight_ih", "weight_hh", "bias_ih", "bias_hh", "weight_hr")
        return Weights(*(getattr(module, f"{name}_l0{suffix}", None) for name in names))

    return tuple(named(suffix) for suffix in ("", "_reverse")[: 1 + module.bidirectional])


class Case:
    """One layer with its data, its float64 oracle and the gradients that flow into its results."""

    def __init__(
        self, cell, steps, batch, inputs, hidden, *, lengths=None, layout="dense", dtype=torch.float32, **options
    ):
        torch.manual_seed(0)
        self.cell, self.layout, self.dtype, self.lengths = cell, layout, dtype, lengths
        self.module = make_module(cell, inputs, hidden, **options)
        with torch.no_grad():
            for parameter in self.module.parameters():
                parameter.copy_(parameter.to(dtype))
        directions = 1 + self.module.bidirectional
        width = self.module.proj_size or hidden
        widths = (width, hidden)[: len(CELLS[cell].states)]
        self.x = torch.randn(steps, batch, inputs, dtype=torch.float64).to(dtype).double()
        self.hx = tuple(torch.randn(directions, batch, w, dtype=torch.float64).to(dtype).double() for w in widths)
        self.sizes = None
        if lengths is not None:
            self.sizes = (torch.tensor(lengths)[None] > torch.arange(steps)[:, None]).sum(1)
        self.dy = torch.randn(steps, batch, directions, width, dtype=torch.float64).to(dtype).double()
        self.dfinals = tuple(torch.randn_like(initial).to(dtype).double() for initial in self.hx)

    def live(self, tensor):
        """Select the valid rows, packed."""
        return torch.cat([tensor[t, : int(size)] for t, size in enumerate(self.sizes)])

    def expected(self) -> dict[str, torch.Tensor]:
        """Results and gradients of torch.nn in float64."""
        x = self.x.clone().requires_grad_()
        hx = tuple(initial.clone().requires_grad_() for initial in self.hx)
        inner = x
        if self.lengths is not None:
            inner = torch.nn.utils.rnn.pack_padded_sequence(x, torch.tensor(self.lengths))
        output, finals = self.module(inner, hx if len(hx) > 1 else hx[0])
        if self.lengths is not None:
            output = torch.nn.utils.rnn.pad_packed_sequence(output, total_length=x.shape[0])[0]
        finals = finals if isinstance(finals, tuple) else (finals,)
        loss = (output * self.dy.flatten(2)).sum() + sum(
            (a * b).sum() for a, b in zip(finals, self.dfinals, strict=True)
        )
        loss.backward()
        found = {"output": output.view_as(self.dy), "dx": x.grad}
        for n, (final, initial) in enumerate(zip(finals, hx, strict=True)):
            found |= {f"final{n}": final, f"dhx{n}": initial.grad}
        for d, weights in enumerate(module_weights(self.module)):
            found |= {f"d{name}{d}": w.grad for name, w in weights._asdict().items() if w is not None}
        return {name: tensor.detach() for name, tensor in found.items()}

    def layer(self, **changes) -> Layer:
        x, sizes = self.x, self.sizes
        if self.layout == "packed":
            x = self.live(x)
        if self.layout == "padded":
            x = x.clone()
            for t, size in enumerate(sizes):
                x[t, size:] = float("nan")
        weights = tuple(
            Weights(*(w if w is None else w.detach().to(self.dtype) for w in each))
            for each in module_weights(self.module)
        )
        reverse = (False, True)[: len(weights)]
        hx = tuple(initial.to(self.dtype) for initial in self.hx)
        return Layer(self.cell, x.to(self.dtype), hx, weights, reverse, sizes, **changes)

    def run(self, layer: Layer | None = None) -> dict[str, torch.Tensor]:
        """Results and gradients of the backend."""
        layer = layer or self.layer()
        states, finals, saved = cpu.forward(layer, save=True, all_states=False)
        dy = self.live(self.dy) if self.layout == "packed" else self.dy
        dstates = (dy.to(self.dtype),) + (None,) * (len(states) - 1)
        dfinals = tuple(d.to(self.dtype) for d in self.dfinals)
        dx, dhx, dweights, _ = cpu.backward(layer, states, saved, dstates, dfinals, ALL)
        found = {"output": states[0], "dx": dx}
        for n, (final, initial) in enumerate(zip(finals, dhx, strict=True)):
            found |= {f"final{n}": final, f"dhx{n}": initial}
        for d, weights in enumerate(dweights):
            found |= {f"d{name}{d}": w for name, w in weights._asdict().items() if w is not None}
        return found

    def check(self, found: dict[str, torch.Tensor] | None = None) -> None:
        expected = self.expected()
        found = found or self.run()
        if self.layout == "packed":
            expected |= {name: self.live(expected[name]) for name in ("output", "dx")}
        assert found.keys() == expected.keys()
        errors = {name: relative(found[name], expected[name]) for name in expected}
        worst = {name: error for name, error in errors.items() if not error <= TOLERANCE[self.dtype]}
        assert not worst, worst


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    assert found.shape == expected.shape
    norm = expected.norm()
    return float((found.double() - expected).norm() / (norm if norm > 0 else 1))


cells = pytest.mark.parametrize("cell", TORCH_CELLS)
dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])


def replaced(layer: Layer, **changes) -> Layer:
    return dataclasses.replace(layer, **changes)


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> list[str]:
    """Names of the tensors that differ in any bit."""
    return [name for name in a if not torch.equal(a[name], b[name])]


@contextlib.contextmanager
def threads(count: int):
    """Use so many threads, also where there are fewer cores; calls that are slow for that reason mean nothing."""
    before, cores, oversubscription = torch.get_num_threads(), pool.cores, pool.oversubscription
    torch.set_num_threads(count)
    pool.cores, pool.oversubscription = lambda: max(count, cores()), pool.Oversubscription()
    pool.oversubscription.SLACK = 60.0
    try:
        yield
    finally:
        torch.set_num_threads(before)
        pool.cores, pool.oversubscription = cores, oversubscription


def run_python(code: str, **environment: str) -> subprocess.CompletedProcess:
    paths = os.pathsep.join(filter(None, sys.path))
    return subprocess.run(
        [sys.executable, "-W", "error::RuntimeWarning", "-c", textwrap.dedent(code)],
        env={**os.environ, "PYTHONPATH": paths, **environment},
        capture_output=True,
        text=True,
        timeout=280,
    )
