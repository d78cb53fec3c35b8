"""torch.nn.RNN, LSTM and GRU: oneDNN or ATen's own loop on a CPU, cuDNN on a GPU. In float64 it is the oracle.

Called as its users call it, time-major, the initial state left out unless one is handed in; `no_grad` in inference.
On a GPU the weights are flattened, as cuDNN wants them. Where torch has no direct way, the best known detour:

    lengths   pack, run and pad again, the only way to keep the padding out of the results
    resets    one call for every stretch of steps in which no row is reset, instead of one call a step
    states    `torch.lstm_cell` step by step, the only operator that hands out every cell state

Of cells that torch.nn lacks, a loop over the steps in eager torch.
"""

from itertools import pairwise

import torch
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from benchmarks.cases import DECLARED, Case
from benchmarks.contenders import Call, torch_loop
from benchmarks.contenders.module_call import Inputs, Result, build, call, finals, forward_plain
from benchmarks.workload import Workload


def unsupported(case: Case) -> str | None:
    if case.form == "states" and (case.cell != "lstm" or case.layers > 1 or case.bidirectional or case.proj):
        return "gives every cell state only through torch.lstm_cell: one plain LSTM layer"
    return None


def prepare(work: Workload) -> Call:
    if work.case.cell in DECLARED:
        return torch_loop.prepare(work, compiled=False)
    module = build(nn, work)
    module.flatten_parameters()
    forward = {"lengths": forward_lengths, "resets": forward_resets, "states": forward_states}
    return call(work, module, forward.get(work.case.form, forward_plain))


def forward_lengths(module: nn.Module, given: Inputs) -> Result:
    packed = pack_padded_sequence(given.x, given.lengths, enforce_sorted=False)
    output, states = module(packed, given.hx)
    return Result(pad_packed_sequence(output, total_length=len(given.x))[0], finals(states))


def forward_resets(module: nn.Module, given: Inputs) -> Result:
    steps = len(given.x)
    starts = [0, *(t for t in given.resets.any(1).nonzero().flatten().tolist() if t > 0), steps]
    output, states = module(given.x[: starts[1]], given.hx)
    outputs = [output]
    for start, stop in pairwise(starts[1:]):
        keep = (~given.resets[start]).to(output.dtype)[:, None]  # [B, 1]
        states = tuple(state * keep for state in finals(states))
        output, states = module(given.x[start:stop], states if len(states) > 1 else states[0])
        outputs.append(output)
    return Result(torch.cat(outputs), finals(states))


def forward_states(module: nn.Module, given: Inputs) -> Result:
    steps, rows, _ = given.x.shape
    weights = list(module.parameters())
    state = given.x.new_zeros(rows, module.hidden_size), given.x.new_zeros(rows, module.hidden_size)
    seen = []
    for t in range(steps):
        state = torch.lstm_cell(given.x[t], state, *weights)
        seen.append(state)
    output, c_states = (torch.stack(states) for states in zip(*seen, strict=True))  # [T, B, H]
    return Result(output, (output[-1:], c_states[-1:]), c_states)
