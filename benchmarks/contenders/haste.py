"""haste on a GPU: its LSTM and GRU modules, which compute torch's functions with the gates in another order.

Best setting: time-major, no DropConnect and no zoneout, so that its plain kernels run. Its LSTM has one bias, which
gets the sum of torch's two; so the gradient of that sum is the gradient of either.
"""

import haste_pytorch
import torch
from torch import Tensor, nn

from benchmarks.cases import Case
from benchmarks.contenders import Call
from benchmarks.contenders.module_call import Inputs, Result, call, finals
from benchmarks.workload import Workload

# The gates of torch in haste's order: i g f o, and z r n.
GATE_ORDER = {"lstm": (0, 2, 1, 3), "gru": (1, 0, 2)}


def unsupported(case: Case) -> str | None:
    if case.cell not in GATE_ORDER:
        return "has no Elman layer"
    if case.layers > 1 or case.bidirectional or case.proj or not case.bias or case.form not in ("dense", "permuted"):
        return "one dense layer in one direction"
    if case.dtype != "float32":
        return f"has no {case.dtype}"
    return None


class HasteLayer(nn.Module):
    """haste's module with torch's parameters in its own layout."""

    def __init__(self, work: Workload) -> None:
        super().__init__()
        case = work.case
        self.cell = case.cell
        self.layer = getattr(haste_pytorch, case.cell.upper())(case.I, case.H).to(work.device)
        arranged = {name: self.arrange(value) for name, value in work.weights.items()}
        values = {"kernel": arranged["weight_ih_l0"].T, "recurrent_kernel": arranged["weight_hh_l0"].T}
        if case.cell == "lstm":
            values["bias"] = arranged["bias_ih_l0"] + arranged["bias_hh_l0"]
        else:
            values |= {"bias": arranged["bias_ih_l0"], "recurrent_bias": arranged["bias_hh_l0"]}
        with torch.no_grad():
            for name, value in values.items():
                getattr(self.layer, name).copy_(value)

    def arrange(self, value: Tensor, back: bool = False) -> Tensor:
        """Reorder the gates along the first dimension, torch's to haste's or back."""
        order = GATE_ORDER[self.cell]
        parts = value.chunk(len(order))
        return torch.cat([parts[order.index(gate) if back else order[gate]] for gate in range(len(order))])

    def gradients(self) -> dict[str, Tensor]:
        """The parameters' gradients under torch's names and in torch's order."""
        layer = self.layer
        second = layer.bias if self.cell == "lstm" else layer.recurrent_bias
        found = {
            "weight_ih_l0": layer.kernel.grad.T,
            "weight_hh_l0": layer.recurrent_kernel.grad.T,
            "bias_ih_l0": layer.bias.grad,
            "bias_hh_l0": second.grad,
        }
        return {f"grad {name}": self.arrange(value, back=True) for name, value in found.items()}


def forward(module: nn.Module, given: Inputs) -> Result:
    output, states = module.layer(given.x, given.hx)
    return Result(output, finals(states))


def prepare(work: Workload) -> Call:
    module = HasteLayer(work)
    return call(work, module, forward, gradients=module.gradients)
