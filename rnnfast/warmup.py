"""`warmup`: compile kernels now rather than at the first call."""

import logging
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import nn

from rnnfast.frozen import Frozen
from rnnfast.modules import GRU, LSTM, RNN, RNNBase
from rnnfast.recurrent import Recurrent


def warmup(*modules: nn.Module, training: bool = True, verbose: bool = False) -> None:
    """Compile, or load from the disk cache, every kernel that the recurrent layers of `modules` will use.

    Runs each layer on two steps of zeros; parameters, gradients and random state stay as they are. Without modules,
    prepares RNN (tanh and relu), LSTM and GRU in float32 on the CPU. Frozen layers have their kernels since `freeze`.

    Args:
        modules: any modules; their rnnfast layers are found wherever they are.
        training: whether to prepare backward as well. Default True.
        verbose: whether to print what is compiled, which takes seconds, and how long it took. (The logger "rnnfast"
            tells that at level INFO in any case.) Default False.

    Raises:
        TypeError: one of `modules` is no torch.nn.Module.
    """
    for each in modules:
        if not isinstance(each, nn.Module):
            raise TypeError(f"warmup: expected a torch.nn.Module, got {type(each).__name__}")
    kinds = RNNBase, Recurrent
    layers = (layer for module in modules for layer in module.modules())
    found = [layer for layer in layers if isinstance(layer, kinds) and not isinstance(layer, Frozen)]
    # In inference mode there would be no gradients.
    with torch.inference_mode(False), log_on_screen() if verbose else nullcontext():
        for layer in found if modules else standard_layers():
            run_once(layer, training)


@contextmanager
def log_on_screen() -> Iterator[None]:
    """Print what rnnfast logs at level INFO and above."""
    log, handler = logging.getLogger("rnnfast"), logging.StreamHandler(sys.stdout)
    level = log.level
    log.addHandler(handler)
    log.setLevel(logging.INFO)
    try:
        yield
    finally:
        log.setLevel(level)
        log.removeHandler(handler)


def standard_layers() -> list[RNNBase]:
    """Return a small float32 layer of every cell of torch on the CPU."""
    with torch.random.fork_rng(devices=[]):
        made: dict[str, Any] = {"device": "cpu", "dtype": torch.float32}
        return [
            RNN(16, 16, **made),
            RNN(16, 16, nonlinearity="relu", **made),
            LSTM(16, 16, **made),
            GRU(16, 16, **made),
        ]


def run_once(layer: RNNBase | Recurrent, training: bool) -> None:
    """Run a layer's first call, without gradients and, for training, with them."""
    weight = layer.weights()[0]
    x = torch.zeros(2, 2, layer.input_size, dtype=weight.dtype, device=weight.device)
    mode, options = layer.training, dict[str, Any]()
    # A class derived from ours may take other arguments.
    run: Callable[..., Any]
    if isinstance(layer, Recurrent):
        run = partial(Recurrent.forward, layer)
        options = {"signals": {name: torch.zeros(1, device=x.device) for name in layer.cell.signals}}
    else:
        run = partial(RNNBase.forward, layer)
    try:
        layer.training = False  # dropout would consume random numbers
        with torch.no_grad():
            run(x, **options)
        if training and not weight.is_inference():
            with torch.enable_grad():
                output = run(x.requires_grad_(), **options)[0]
            inputs = [x, *(each for each in layer.parameters() if each.requires_grad)]
            torch.autograd.grad(output.sum(), inputs, allow_unused=True)
    finally:
        layer.training = mode
