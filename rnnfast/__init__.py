"""Fused recurrent layers for PyTorch: `from rnnfast import LSTM` in place of `from torch.nn import LSTM`."""

from rnnfast import functional
from rnnfast.accelerate import Finding, accelerate, restore, survey
from rnnfast.backends.choice import use_backend
from rnnfast.cell_modules import GRUCell, LSTMCell, RNNCell
from rnnfast.modules import GRU, LSTM, RNN
from rnnfast.prepare import warmup
from rnnfast.report import Explanation, explain
from rnnfast.stream import Stream

__all__ = [
    "GRU",
    "LSTM",
    "RNN",
    "Explanation",
    "Finding",
    "GRUCell",
    "LSTMCell",
    "RNNCell",
    "Stream",
    "accelerate",
    "explain",
    "functional",
    "restore",
    "survey",
    "use_backend",
    "warmup",
]
__version__ = "0.1.0"
