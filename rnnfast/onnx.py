"""Layers as ONNX's own operators RNN, LSTM and GRU, for `torch.onnx.export(dynamo=True)`.

While a model is exported to ONNX, `layer` stands in for the operator of `rnnfast.operators`, so that what comes out
runs wherever ONNX does. ONNX orders the gates differently, and its GRU needs `linear_before_reset` to be torch's.
"""

import torch
from torch import Tensor

from rnnfast.spec import Layer, States

NAMES = {"rnn_tanh": "RNN", "rnn_relu": "RNN", "lstm": "LSTM", "gru": "GRU"}
# For each of ONNX's gates, the number of torch's: i o f c of i f g o, and z r h of r z n.
GATES = {"rnn_tanh": (0,), "rnn_relu": (0,), "lstm": (0, 3, 1, 2), "gru": (1, 0, 2)}


def layer(layer: Layer, all_states: bool) -> tuple[States, States]:
    """Describe one layer to the exporter; returns its states after every step and its final states.

    Raises:
        RuntimeError: ONNX's operators cannot do what the layer does.
    """
    cell, x, hx, batch_sizes, reverse = layer.cell, layer.x, layer.hx, layer.batch_sizes, layer.reverse
    steps, batch = x.shape[:2]
    directions, hidden = hx[0].shape[0], hx[0].shape[-1]
    named = layer.weights
    check(cell, x, all_states, layer.resets, named[0].w_hr)
    lengths = None
    if batch_sizes is not None:
        rows = torch.arange(batch, device=x.device)
        lengths = (batch_sizes[:, None] > rows).sum(0, dtype=torch.int32)
    biases = None
    pairs = [(w.b_ih, w.b_hh) for w in named if w.b_ih is not None and w.b_hh is not None]
    if pairs:
        biases = torch.stack([torch.cat((reordered(b_ih, cell), reordered(b_hh, cell))) for b_ih, b_hh in pairs])
    inputs = [
        x,
        torch.stack([reordered(w.w_ih, cell) for w in named]),
        torch.stack([reordered(w.w_hh, cell) for w in named]),
        biases,
        lengths,
        *hx,
    ]
    shapes = [[steps, directions, batch, hidden], *([directions, batch, hidden] for _ in hx)]
    output, *finals = torch.onnx.ops.symbolic_multi_out(
        NAMES[cell], inputs, attributes(cell, reverse, hidden), dtypes=[x.dtype] * len(shapes), shapes=shapes
    )
    if lengths is not None:
        finals = [torch.where((lengths > 0)[:, None], final, first) for final, first in zip(finals, hx, strict=True)]
    return (output.transpose(1, 2), *hx[1:]), tuple(finals)


def reordered(weight: Tensor, cell: str) -> Tensor:
    """Put torch's gates, [G*H, *], into ONNX's order."""
    parts = weight.chunk(len(GATES[cell]))
    return torch.cat([parts[n] for n in GATES[cell]])


def attributes(cell: str, reverse: tuple[bool, ...], hidden: int) -> dict:
    """Return the attributes of ONNX's operator."""
    direction = "bidirectional" if len(reverse) == 2 else "reverse" if reverse[0] else "forward"
    chosen: dict = {"direction": direction, "hidden_size": int(hidden)}
    if cell.startswith("rnn"):
        chosen["activations"] = ["Tanh" if cell == "rnn_tanh" else "Relu"] * len(reverse)
    if cell == "gru":
        chosen["linear_before_reset"] = 1
    return chosen


def check(cell: str, x: Tensor, all_states: bool, resets: Tensor | None, projection: Tensor | None) -> None:
    """Refuse what ONNX's operators lack."""
    missing = {
        "resets": resets is not None,
        "proj_size": projection is not None,
        "all_states of an LSTM": all_states and cell == "lstm",
        "PackedSequence (use lengths=)": x.dim() == 2,
    }
    for what, is_used in missing.items():
        if is_used:
            raise RuntimeError(
                f"torch.onnx.export: ONNX's {NAMES[cell]} has no {what}; export a fixed number of steps under "
                f'rnnfast.use_backend("reference") instead, which unrolls the loop'
            )
