"""A cell of your own: a peephole LSTM in nine lines, checked against its eager step, trained beside a Python loop.

Both models have the same weights and see the same batches, turn by turn, so that losses and times can be compared. The
first call compiles the cell's kernels, which takes some seconds, once for this machine. The curves are saved as
own_cell.png.
"""

import inspect
import time
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

import rnnfast
from examples import options
from examples.language_model import Corpus, Run, train

PICTURE = Path("own_cell.png")
OURS, LOOP = "rnnfast.Recurrent", "Python loop"


@rnnfast.cell(gates="i f g o", states="h c", parameters="p_i p_f p_o")
def peephole_lstm(x, u, state, p):
    """LSTM whose gates see the cell state (Gers and Schmidhuber, 2000)."""
    _, c = state
    i = torch.sigmoid(x.i + u.i + p.p_i * c)
    f = torch.sigmoid(x.f + u.f + p.p_f * c)
    c = f * c + i * torch.tanh(x.g + u.g)
    o = torch.sigmoid(x.o + u.o + p.p_o * c)
    return o * torch.tanh(c), c


class Fused(rnnfast.Recurrent):
    """The cell as a layer: one kernel for all steps."""

    def __init__(self, inputs: int, hidden: int):
        super().__init__(peephole_lstm, inputs, hidden)


class Loop(Fused):
    """The same layer as people write it: a loop over time, and the cell as one step of eager torch."""

    def forward(self, input: Tensor, hx=None) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        h = c = input.new_zeros(input.shape[1], self.hidden_size)
        if hx is not None:
            h, c = (state[0] for state in hx)
        x_gates = nn.functional.linear(input, self.weight_ih_l0, self.bias_ih_l0)
        p, outputs = (self.p_i_l0, self.p_f_l0, self.p_o_l0), []
        for x in x_gates:
            u = nn.functional.linear(h, self.weight_hh_l0, self.bias_hh_l0)
            h, c = peephole_lstm(x, u, (h, c), p)
            outputs.append(h)
        return torch.stack(outputs), (h[None], c[None])


def compare(steps: int = 20, batch: int = 5) -> dict[str, float]:
    """Return how far outputs and gradients of the two are apart in float64, relative to the largest entry."""
    torch.manual_seed(0)
    layers = [layer(3, 17).double() for layer in (Fused, Loop)]
    layers[1].load_state_dict(layers[0].state_dict())
    x = torch.randn(steps, batch, 3, dtype=torch.float64)
    found = []
    for layer in layers:
        output, _ = layer(x)
        grads = torch.autograd.grad(output.square().sum(), list(layer.parameters()))
        found.append({"output": output, **dict(zip(dict(layer.named_parameters()), grads, strict=True))})
    return {name: ((found[1][name] - each).abs().max() / each.abs().max()).item() for name, each in found[0].items()}


def source() -> str:
    """Return the cell's declaration, as it stands in this file."""
    return inspect.getsource(peephole_lstm.function).rstrip()


def times(steps: int = 64, batch: int = 16, hidden: int = 128, rounds: int = 15) -> tuple[list[float], list[float]]:
    """Return the seconds of training calls of the loop and of the layer, taken in turn."""
    layers = [layer(hidden, hidden) for layer in (Loop, Fused)]
    x, seconds = torch.randn(steps, batch, hidden), ([], [])
    for _ in range(rounds):
        for layer, taken in zip(layers, seconds, strict=True):
            start = time.perf_counter()
            layer(x)[0].sum().backward()
            taken.append(time.perf_counter() - start)
    return seconds


def draw(runs: Mapping[str, Run]) -> None:
    """Save the loss curves."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4), layout="constrained")
    for (name, run), (color, width) in zip(runs.items(), (("0.6", 4), ("tab:red", 1.2)), strict=True):
        axes.plot(run.losses, label=f"{name}, {sum(run.seconds[1:]):.0f} s", color=color, linewidth=width)
    axes.set(title="Peephole LSTM: same weights, same batches", xlabel="batch", ylabel="cross-entropy")
    axes.legend(frameon=False)
    figure.savefig(PICTURE, dpi=150)


def main(batches: int = 60) -> None:
    print(peephole_lstm)
    begun = time.perf_counter()
    print("\nlargest difference from the eager step, float64:", f"{max(compare().values()):.1e}")
    print(f"(with compiling, or loading what was compiled: {time.perf_counter() - begun:.1f} s)\n")
    corpus = Corpus()
    runs = train({LOOP: Loop, OURS: Fused}, len(corpus.characters), corpus.batches(batches))
    for name, run in runs.items():
        seconds = sorted(run.seconds)[len(run.seconds) // 2]
        print(f"{name:18} loss {run.losses[0]:.3f} -> {run.losses[-1]:.3f}, {1000 * seconds:.0f} ms a batch")
    draw(runs)
    print(f"curves saved as {PICTURE}")


if __name__ == "__main__":
    main(options("examples.own_cell", __doc__, batches=(60, "batches to train")).batches)
