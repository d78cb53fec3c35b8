"""A plain torch loop over the steps under `torch.compile`, Inductor's default mode.

Best setting found: the input projection of all steps is one product outside the loop; the loop is compiled in stretches
of 8 unrolled steps, so that the pointwise work of a step fuses while the compile time stays within a minute whatever T
is (Dynamo unrolls a Python loop: one graph of 1,000 steps takes longer to compile than anyone waits).
"""

import torch
from torch import Tensor, nn

from benchmarks.cases import Case
from benchmarks.contenders import Call
from benchmarks.contenders.module_call import Inputs, Result, call
from benchmarks.workload import Workload

STRETCH = 8


def unsupported(case: Case) -> str | None:
    if case.layers > 1 or case.bidirectional or case.proj or case.form not in ("dense", "permuted"):
        return "the suite asks it for one dense layer in one direction"
    if case.T < STRETCH and case.mode != "step":
        return f"fewer steps than one graph of {STRETCH}: a compilation of its own for every T"
    return None


def rnn_step(gates: Tensor, u: Tensor, state: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return (torch.tanh(gates + u),)


def lstm_step(gates: Tensor, u: Tensor, state: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    i, f, g, o = (gates + u).chunk(4, -1)
    c = torch.sigmoid(f) * state[1] + torch.sigmoid(i) * torch.tanh(g)
    return torch.sigmoid(o) * torch.tanh(c), c


def gru_step(gates: Tensor, u: Tensor, state: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    (x_r, x_z, x_n), (u_r, u_z, u_n) = gates.chunk(3, -1), u.chunk(3, -1)
    n = torch.tanh(x_n + torch.sigmoid(x_r + u_r) * u_n)
    return (n + torch.sigmoid(x_z + u_z) * (state[0] - n),)


STEPS = {"rnn": rnn_step, "lstm": lstm_step, "gru": gru_step}


class PlainLoop(nn.Module):
    """One layer with torch.nn's parameter names."""

    def __init__(self, work: Workload) -> None:
        super().__init__()
        self.hidden_size = work.case.H
        self.states = len(work.hx)
        for name, value in work.weights.items():
            setattr(self, name, nn.Parameter(work.cast(value)))
        step = STEPS[work.case.cell]

        def stretch(gates, w_hh, b_hh, state):
            outputs = []
            for gates_t in gates.unbind(0):
                state = step(gates_t, nn.functional.linear(state[0], w_hh, b_hh), state)
                outputs.append(state[0])
            return torch.stack(outputs), state

        self.stretch = torch.compile(stretch, dynamic=False)

    def forward(self, x: Tensor, hx: tuple[Tensor, ...] | None) -> Result:
        gates = nn.functional.linear(x, self.weight_ih_l0, getattr(self, "bias_ih_l0", None))  # [T, B, G*H]
        state = hx or (x.new_zeros(x.shape[1], self.hidden_size),) * self.states
        outputs = []
        for part in gates.split(STRETCH):
            output, state = self.stretch(part, self.weight_hh_l0, getattr(self, "bias_hh_l0", None), state)
            outputs.append(output)
        return Result(torch.cat(outputs), tuple(value.unsqueeze(0) for value in state))


def forward(module: nn.Module, given: Inputs) -> Result:
    states = given.hx if isinstance(given.hx, tuple) else None if given.hx is None else (given.hx,)
    return module(given.x, None if states is None else tuple(state[0] for state in states))


def prepare(work: Workload) -> Call:
    torch.compiler.reset()
    return call(work, PlainLoop(work).to(work.device), forward)
