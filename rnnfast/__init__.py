"""Fused recurrent layers for PyTorch: `from rnnfast import LSTM` in place of `from torch.nn import LSTM`."""

import importlib
from typing import TYPE_CHECKING

from rnnfast import functional
from rnnfast.accelerate import Finding, accelerate, restore, survey
from rnnfast.backends.dispatch import use_backend
from rnnfast.cell_modules import GRUCell, LSTMCell, RNNCell
from rnnfast.declare import CellError, cell, surrogate
from rnnfast.explain import explain
from rnnfast.explanations import Explanation
from rnnfast.freeze import freeze
from rnnfast.modules import GRU, LSTM, RNN
from rnnfast.recurrent import Recurrent
from rnnfast.stream import Stream
from rnnfast.warmup import warmup

__all__ = [
    "GRU",
    "LSTM",
    "RNN",
    "CellError",
    "Explanation",
    "Finding",
    "GRUCell",
    "LSTMCell",
    "RNNCell",
    "Recurrent",
    "Stream",
    "accelerate",
    "cell",
    "cells",
    "explain",
    "freeze",
    "functional",
    "restore",
    "surrogate",
    "survey",
    "use_backend",
    "warmup",
]
__version__ = "0.2.0"

if TYPE_CHECKING:
    from rnnfast import cells
else:

    def __getattr__(name: str):
        """Import the library of cells when it is first used."""
        if name == "cells":
            return importlib.import_module("rnnfast.cells")
        raise AttributeError(f"module 'rnnfast' has no attribute {name!r}")


def __dir__() -> list[str]:
    """List the public names alone."""
    return list(__all__)
