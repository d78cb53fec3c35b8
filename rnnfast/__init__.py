"""Fused recurrent layers for PyTorch: `from rnnfast import LSTM` in place of `from torch.nn import LSTM`."""

from rnnfast import functional
from rnnfast.backends.choice import use_backend
from rnnfast.modules import GRU, LSTM, RNN

__all__ = ["GRU", "LSTM", "RNN", "functional", "use_backend"]
__version__ = "0.1.0"
