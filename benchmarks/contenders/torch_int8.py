"""torch's `quantize_dynamic`: LSTM and GRU with int8 weights, as torch ships them for CPUs."""

import warnings

import torch
from torch import nn

from benchmarks.cases import Case
from benchmarks.contenders import Call
from benchmarks.contenders.module_call import build, call, forward_plain
from benchmarks.workload import Workload


def unsupported(case: Case) -> str | None:
    return None if case.weights == "int8" and case.cell in ("lstm", "gru") else "int8 weights of an LSTM or GRU alone"


class Quantised(nn.Module):
    """The quantised layer, under a name of its own: `quantize_dynamic` replaces the layers within a model."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of its deprecation
            self.layers = torch.ao.quantization.quantize_dynamic(nn.Sequential(layer), {type(layer)})

    def forward(self, x, hx=None):
        return self.layers[0](x, hx)


def prepare(work: Workload) -> Call:
    return call(work, Quantised(build(nn, work)), forward_plain)
