"""A loop over the steps in torch, as people write it: eager, the baseline of cells that torch.nn lacks, or compiled.

Best setting found: the input product of all steps is one product outside the loop. Under `torch.compile`, Inductor's
default mode, the loop is compiled in stretches of 8 unrolled steps, so that the pointwise work of a step fuses while
the compile time stays within a minute whatever T is. (Dynamo unrolls a Python loop: one graph of 1,000 steps takes
longer to compile than anyone waits.)
"""

import inspect

import torch
from torch import Tensor, nn

from benchmarks.cases import DECLARED, Case, declared_layer
from benchmarks.contenders import Call
from benchmarks.contenders.module_call import Inputs, Result, call
from benchmarks.workload import Workload

STRETCH = 8
State = tuple[Tensor, ...]


def unsupported(case: Case) -> str | None:
    if case.layers > 1 or case.bidirectional or case.proj or case.form not in ("dense", "permuted"):
        return "the suite asks it for one dense layer in one direction"
    if case.weights:
        return "has no frozen layers"
    if case.T < STRETCH and case.mode != "step":
        return f"fewer steps than one graph of {STRETCH}: a compilation of its own for every T"
    return None


def rnn_step(x: Tensor, u: Tensor, state: State) -> State:
    return (torch.tanh(x + u),)


def lstm_step(x: Tensor, u: Tensor, state: State) -> State:
    i, f, g, o = (x + u).chunk(4, -1)
    c = torch.sigmoid(f) * state[1] + torch.sigmoid(i) * torch.tanh(g)
    return torch.sigmoid(o) * torch.tanh(c), c


def gru_step(x: Tensor, u: Tensor, state: State) -> State:
    (x_r, x_z, x_n), (u_r, u_z, u_n) = x.chunk(3, -1), u.chunk(3, -1)
    n = torch.tanh(x_n + torch.sigmoid(x_r + u_r) * u_n)
    return (n + torch.sigmoid(x_z + u_z) * (state[0] - n),)


STEPS = {"rnn": rnn_step, "lstm": lstm_step, "gru": gru_step}


class Loop(nn.Module):
    """One layer in one direction, with the parameters' names of torch.nn and of `rnnfast.Recurrent`."""

    def __init__(self, work: Workload, compiled: bool) -> None:
        super().__init__()
        self.hidden_size, self.states = work.case.H, max(1, len(work.hx))
        self.step = STEPS.get(work.case.cell)
        if work.case.cell in DECLARED:
            cell = declared_layer(work.case, device="meta").cell
            self.states, self.step = len(cell.states), self.declared_step
            self.cell, self.takes = cell, tuple(inspect.signature(cell.function).parameters)
        for name, value in work.weights.items():
            self.register_parameter(name, nn.Parameter(work.cast(value)))
        self.stretch = torch.compile(self.steps, dynamic=False) if compiled else self.steps
        self.longest = STRETCH if compiled else work.case.T

    def declared_step(self, x: Tensor, u: Tensor | None, state: State) -> State:
        """The declared cell, called with tensors."""
        p = {name: getattr(self, f"{name}_l0") for name in self.cell.parameters}
        given = {"x": x, "u": u, "state": state, "p": p}
        new = self.cell(**{name: given[name] for name in self.takes})
        return new if isinstance(new, tuple) else (new,)

    def steps(self, gates: Tensor, state: State) -> tuple[Tensor, State]:
        weight, bias = getattr(self, "weight_hh_l0", None), getattr(self, "bias_hh_l0", None)
        outputs = []
        for x in gates.unbind(0):
            state = self.step(x, None if weight is None else nn.functional.linear(state[0], weight, bias), state)
            outputs.append(state[0])
        return torch.stack(outputs), state

    def forward(self, x: Tensor, hx: State | None) -> Result:
        gates = nn.functional.linear(x, self.weight_ih_l0, getattr(self, "bias_ih_l0", None))  # [T, B, G*H]
        state = hx or (x.new_zeros(x.shape[1], self.hidden_size),) * self.states
        outputs = []
        for part in gates.split(self.longest):
            output, state = self.stretch(part, state)
            outputs.append(output)
        return Result(torch.cat(outputs), tuple(value.unsqueeze(0) for value in state))


def forward(module: nn.Module, given: Inputs) -> Result:
    states = given.hx if isinstance(given.hx, tuple) else None if given.hx is None else (given.hx,)
    return module(given.x, None if states is None else tuple(state[0] for state in states))


def prepare(work: Workload, compiled: bool = True) -> Call:
    if compiled:
        torch.compiler.reset()
    return call(work, Loop(work, compiled).to(work.device), forward)
