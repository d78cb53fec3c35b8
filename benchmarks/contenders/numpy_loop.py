"""The teaching notes' network in NumPy: an Elman layer as a loop over the steps, with backpropagation through time.

Written as the notes write it, one step after the other, input product and all, except that its gradients are exact. It
has no better setting; NumPy's BLAS gets as many threads as the process has cores.
"""

from dataclasses import dataclass

import numpy as np
import torch

from benchmarks.cases import Case
from benchmarks.contenders import Call
from benchmarks.workload import Workload

DTYPES = {"float32": np.float32, "float64": np.float64}


def unsupported(case: Case) -> str | None:
    if case.mode == "penalty":
        return "the suite does not ask it for second derivatives"
    plain = case.layers == 1 and not case.bidirectional and case.bias and case.form in ("dense", "permuted")
    if case.cell != "rnn" or not plain:
        return "the notes' loop is one Elman layer in one direction over dense input"
    if case.dtype not in DTYPES:
        return f"NumPy has no fast {case.dtype}"
    return None


@dataclass
class ElmanLoop:
    w_ih: np.ndarray  # [H, I]
    w_hh: np.ndarray  # [H, H]
    b_ih: np.ndarray  # [H]
    b_hh: np.ndarray  # [H]

    def forward(self, x: np.ndarray, h: np.ndarray) -> np.ndarray:
        """h_t = tanh(W_ih x_t + b_ih + W_hh h_{t-1} + b_hh), every step: [T + 1, B, H], the initial state first."""
        states = [h]
        for x_t in x:
            h = np.tanh(x_t @ self.w_ih.T + self.b_ih + h @ self.w_hh.T + self.b_hh)
            states.append(h)
        return np.stack(states)

    def backward(self, x: np.ndarray, states: np.ndarray, dy: np.ndarray) -> dict[str, np.ndarray]:
        dw_ih, dw_hh = np.zeros_like(self.w_ih), np.zeros_like(self.w_hh)
        db = np.zeros_like(self.b_ih)
        dx = np.empty_like(x)
        dh = np.zeros_like(states[0])
        for t in reversed(range(len(x))):
            da = (dy[t] + dh) * (1 - states[t + 1] ** 2)  # [B, H]
            dw_ih += da.T @ x[t]
            dw_hh += da.T @ states[t]
            db += da.sum(0)
            dx[t] = da @ self.w_ih
            dh = da @ self.w_hh
        return {"x": dx, "weight_ih_l0": dw_ih, "weight_hh_l0": dw_hh, "bias_ih_l0": db, "bias_hh_l0": db}


def prepare(work: Workload) -> Call:
    dtype = DTYPES[work.case.dtype]

    def array(tensor: torch.Tensor) -> np.ndarray:
        return tensor.numpy().astype(dtype)

    loop = ElmanLoop(*(array(work.weights[f"{name}_l0"]) for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")))
    x, dy = array(work.x), array(work.dy)
    h = array(work.hx[0][0]) if work.case.mode == "step" else np.zeros((work.case.B, work.case.H), dtype)

    def run() -> tuple[np.ndarray, dict[str, np.ndarray]]:
        states = loop.forward(x, h)
        return states, loop.backward(x, states, dy) if work.case.mode == "training" else {}

    def read(result: tuple[np.ndarray, dict[str, np.ndarray]]) -> dict[str, torch.Tensor]:
        states, gradients = result
        arrays = {
            "output": states[1:],
            "h": states[-1:],
            **{f"grad {name}": value for name, value in gradients.items()},
        }
        return {name: torch.from_numpy(value.astype(np.float64)) for name, value in arrays.items()}

    return Call(run, read)
