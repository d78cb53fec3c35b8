"""FlashRNN on a GPU: its fused kernel over the gates' input part, with torch around it for everything else.

Best setting: backend `cuda_fused`, which keeps the recurrent weights on the chip, in the case's own dtype, one head as
wide as the layer; `cuda`, its alternating kernel, where the fused one does not take the size. The library has no input
projection, so one `linear` computes it for all steps, as its authors advise. Its GRU is another function than torch's
(one bias, no fused kernel), so it is not asked.
"""

import torch
from flashrnn import flashrnn
from torch import Tensor, nn

from benchmarks.cases import GATES, Case
from benchmarks.contenders import Call
from benchmarks.contenders.module_call import Inputs, Result, call
from benchmarks.workload import Workload

FUNCTIONS = {"rnn": "elman", "lstm": "lstm"}
BACKENDS = ("cuda_fused", "cuda")


def unsupported(case: Case) -> str | None:
    if case.cell not in FUNCTIONS:
        return "its GRU is another function than torch's"
    if case.layers > 1 or case.bidirectional or case.proj or case.form not in ("dense", "permuted"):
        return "one dense layer in one direction"
    if case.dtype in ("float64", "tf32"):
        return f"has no {case.dtype}"
    return None


class FlashLayer(nn.Module):
    """One layer with torch.nn's parameter names over FlashRNN's functional interface."""

    def __init__(self, work: Workload, backend: str) -> None:
        super().__init__()
        self.case, self.backend = work.case, backend
        for name, value in work.weights.items():
            setattr(self, name, nn.Parameter(work.cast(value)))

    def forward(self, x: Tensor, hx: tuple[Tensor, ...] | None) -> Result:
        gates, width = GATES[self.case.cell], self.case.H
        gate_input = nn.functional.linear(x, self.weight_ih_l0, getattr(self, "bias_ih_l0", None))
        gate_input = gate_input.transpose(0, 1).unflatten(-1, (gates, 1, width))  # [B, T, G, 1, H]
        recurrent = self.weight_hh_l0.view(gates, 1, width, width).transpose(-1, -2)  # [G, 1, H in, H out]
        bias = self.bias_hh_l0 if self.case.bias else x.new_zeros(gates * width)
        states = None if hx is None else torch.stack([state[0, :, None, None] for state in hx])  # [S, B, 1, 1, H]
        every, last = flashrnn(
            gate_input,
            recurrent,
            bias.view(gates, 1, width),
            states=states,
            function=FUNCTIONS[self.case.cell],
            backend=self.backend,
            dtype=self.case.dtype,
        )
        output = every[0].flatten(2).transpose(0, 1)  # [T, B, H]
        return Result(output, tuple(state.reshape(1, -1, width) for state in last))


def forward(module: nn.Module, given: Inputs) -> Result:
    return module(given.x, given.hx if given.hx is None or isinstance(given.hx, tuple) else (given.hx,))


def prepare(work: Workload) -> Call:
    """The fastest of its backends that takes the size."""
    for backend in BACKENDS[:-1]:
        candidate = call(work, FlashLayer(work, backend), forward, note=backend)
        if runs(candidate):
            return candidate
    return call(work, FlashLayer(work, BACKENDS[-1]), forward, note=BACKENDS[-1])


def runs(candidate: Call) -> bool:
    """Try it: FlashRNN builds a kernel for each size, and says no by an error of build, check or device."""
    try:
        with candidate.context():
            candidate.run()
    except Exception:
        return False
    return True
