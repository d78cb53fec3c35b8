"""Pairs of layers, torch's and ours with equal weights, and what a test compares of their runs."""

import copy
from contextlib import contextmanager
from unittest import mock

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

import rnnfast
from rnnfast import fast_path
from rnnfast.backends.dispatch import load

CELLS = {
    "rnn_tanh": ("RNN", {}),
    "rnn_relu": ("RNN", {"nonlinearity": "relu"}),
    "lstm": ("LSTM", {}),
    "lstm_proj": ("LSTM", {"proj_size": 5}),
    "gru": ("GRU", {}),
}


def pair(cell: str, *args, **kwargs) -> tuple[nn.RNNBase, rnnfast.modules.RNNBase]:
    """Return torch's layer and ours, with the same weights."""
    name, extra = CELLS[cell]
    theirs = getattr(nn, name)(*args, **extra, **kwargs)
    ours = getattr(rnnfast, name)(*args, **extra, **kwargs)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    return theirs, ours


def as_tuple(states) -> tuple[Tensor, ...]:
    """Return final states as a tuple, whatever the cell."""
    return (states,) if isinstance(states, Tensor) else tuple(states)


def random_hx(layer: nn.RNNBase, batch: int, seed: int = 5):
    """Return random initial states for a layer, as the layer wants them."""
    weight = layer._flat_weights[0]
    rows = layer.num_layers * (2 if layer.bidirectional else 1)
    generator = torch.Generator().manual_seed(seed)
    widths = [layer.proj_size or layer.hidden_size, layer.hidden_size][: 2 if layer.mode == "LSTM" else 1]
    made = [torch.randn(rows, batch, width, generator=generator, dtype=torch.float64, device="cpu") for width in widths]
    made = tuple(state.to(weight).requires_grad_() for state in made)
    return made if layer.mode == "LSTM" else made[0]


def run(layer: nn.RNNBase, input, hx=None, **options) -> dict[str, Tensor]:
    """Run forward and backward and return every result and gradient by name.

    The loss weighs every element of the output and of the final states differently.
    """
    leaves = {"input": input.data if isinstance(input, PackedSequence) else input}
    if hx is not None:
        leaves |= {f"hx{n}": state for n, state in enumerate(as_tuple(hx))}
    leaves |= {name: p for name, p in layer.named_parameters() if p.requires_grad}
    output, finals, *rest = layer(input, hx, **options)
    results = {"output": output.data if isinstance(output, PackedSequence) else output}
    results |= {f"final{n}": state for n, state in enumerate(as_tuple(finals))}
    results |= {f"states{n}": state for n, state in enumerate(rest[0] if rest else ())}
    wanted = {name: leaf for name, leaf in leaves.items() if leaf.requires_grad}
    if wanted:
        loss = sum((value * weights_like(value)).sum() for value in results.values())
        grads = torch.autograd.grad(loss, list(wanted.values()), allow_unused=True)
        for (name, leaf), grad in zip(wanted.items(), grads, strict=True):
            results[f"d{name}"] = torch.zeros_like(leaf) if grad is None else grad
    return results


def weights_like(tensor: Tensor) -> Tensor:
    """Return fixed weights between -1 and 1, one per element."""
    return torch.cos(torch.arange(tensor.numel(), dtype=torch.float64)).reshape(tensor.shape).to(tensor)


def in_float64(layer: nn.RNNBase) -> nn.RNNBase:
    """Return a float64 copy of a layer."""
    return copy.deepcopy(layer).double()


def count_calls(monkeypatch, backend: str) -> list[str]:
    """Return a list that grows by a name with every call of the backend."""
    module, calls = load(backend), []
    for name in ("forward", "backward"):
        function = getattr(module, name)

        def counted(*args, name=name, function=function, **kwargs):
            calls.append(name)
            return function(*args, **kwargs)

        monkeypatch.setattr(module, name, counted)
    return calls


@contextmanager
def ordinary_path():
    """Keep calls within the block off the fast path."""
    with mock.patch.object(fast_path, "key_of", return_value=None):
        yield
