"""Initial states and signals of declared cells: from a user's, by name and in any layout, to those of loops, and back.

Loops take states in an order of their own (see `rnnfast.declare.Cell.order`), and signals as [T or 1, B or 1, H or 1].
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from rnnfast import functional, operators, validate
from rnnfast.declare import Cell
from rnnfast.spec import Options


def in_loop_layout(
    cell: Cell,
    options: Options,
    input: Tensor | PackedSequence,
    weights: Sequence[Tensor],
    hx,
    signals: Mapping[str, Tensor] | None,
) -> tuple[Any, tuple[Tensor, ...]]:
    """Return initial states in the order of loops, None if none are given, and signals in their layout."""
    if torch.compiler.is_compiling() and operators.in_onnx_export():
        raise RuntimeError(f"rnnfast: layers of declared cells, such as {cell.__name__}, cannot be exported to ONNX")
    by_name, given = named_signals(cell, signals), named_states(cell, hx)
    initial: Any = None
    if not (given or by_name):
        return initial, ()
    packed = isinstance(input, PackedSequence)
    data: Tensor = input.data if packed else input  # type: ignore[assignment]
    batched = packed or validate.input_is_batched(options, data)
    steps, batch = extent(options, input, batched)
    hidden = options.hidden(weights)
    if given:
        rows = (options.num_layers * options.directions, batch, hidden)
        states = [initial_state(name, given.get(name), rows, data, batched) for name in cell.states]
        initial = functional.single(tuple(states[n] for n in cell.order))
    batch_first = options.batch_first and not packed
    laid_out = tuple(
        lay_out(name, by_name[name], steps, batch, hidden, batch_first, batched).to(data.dtype) for name in cell.signals
    )
    return initial, laid_out


def named_states(cell: Cell, hx) -> dict[str, Tensor]:
    """Return the initial states that were given, by name."""
    if hx is None:
        return {}
    if isinstance(hx, Mapping):
        unknown = set(hx) - set(cell.states)
        if unknown:
            raise ValueError(
                f"hx: expected some of {', '.join(cell.states)}, got {', '.join(sorted(map(str, unknown)))}"
            )
        return {name: state for name, state in hx.items() if state is not None}
    if isinstance(hx, Tensor):
        if len(cell.states) > 1:
            raise TypeError(f"hx: expected a sequence of {len(cell.states)} tensors, got one tensor")
        hx = (hx,)
    if not isinstance(hx, (tuple, list)):
        raise TypeError(f"hx: expected tensors of {', '.join(cell.states)}, got {type(hx).__name__}")
    if len(hx) != len(cell.states):
        raise RuntimeError(f"hx: expected {len(cell.states)} states ({', '.join(cell.states)}), got {len(hx)}")
    return {name: state for name, state in zip(cell.states, hx, strict=True) if state is not None}


def named_signals(cell: Cell, signals: Mapping[str, Tensor] | None) -> dict[str, Tensor]:
    """Check which signals there are."""
    if signals is not None and not isinstance(signals, Mapping):
        raise TypeError(f"signals: expected a mapping of tensors by name, got {type(signals).__name__}")
    given = dict(signals or {})
    missing, unknown = [n for n in cell.signals if n not in given], sorted(set(given) - set(cell.signals))
    if missing or unknown:
        wanted = ", ".join(cell.signals) or "none"
        raise ValueError(f"signals: {cell.__name__} expects {wanted}, got {', '.join(given) or 'none'}")
    for name, signal in given.items():
        if not isinstance(signal, Tensor):
            raise TypeError(f"signals: expected a tensor for {name}, got {type(signal).__name__}")
        if signal.is_complex():
            raise TypeError(f"signals: expected real numbers for {name}, got {signal.dtype}")
    return given


def extent(options: Options, input, batched: bool) -> tuple[int, int]:
    """Return T and B."""
    if isinstance(input, PackedSequence):
        return len(input.batch_sizes), int(input.batch_sizes[0])
    if not batched:
        return input.shape[0], 1
    return (input.shape[1], input.shape[0]) if options.batch_first else (input.shape[0], input.shape[1])


def initial_state(name: str, state: Tensor | None, shape: tuple[int, ...], x: Tensor, batched: bool) -> Tensor:
    """Check an initial state, or make one of zeros, in the layout of the input."""
    expected = shape if batched else (shape[0], shape[2])
    if state is None:
        return x.new_zeros(expected)
    if not isinstance(state, Tensor):
        raise TypeError(f"hx: expected a tensor for {name}, got {type(state).__name__}")
    if state.shape != expected:
        raise RuntimeError(f"Expected hidden state {name} of size {list(expected)}, got {list(state.shape)}")
    return state


def lay_out(name: str, signal: Tensor, steps: int, batch: int, hidden: int, batch_first: bool, batched: bool) -> Tensor:
    """Return a signal as [T or 1, B or 1, H or 1]."""
    full = (steps, hidden) if not batched else (batch, steps, hidden) if batch_first else (steps, batch, hidden)
    own = (1,) * (len(full) - signal.dim()) + tuple(signal.shape)
    if signal.dim() > len(full) or any(a not in (1, b) for a, b in zip(own, full, strict=True)):
        layout = "[T, H]" if not batched else "[B, T, H]" if batch_first else "[T, B, H]"
        raise ValueError(
            f"signals: expected {name} to be broadcastable to {list(full)}, {layout}, got {list(signal.shape)}"
        )
    signal = signal.reshape(own)
    if not batched:
        return signal.unsqueeze(1)
    return signal.transpose(0, 1) if batch_first else signal


def in_user_order(cell: Cell, output, finals, *states):
    """Put states into the order in which the user declared them."""
    if len(cell.states) == 1 or cell.order == tuple(range(len(cell.order))):
        return (output, finals, *states)
    return (output, *(tuple(each[n] for n in cell.places) for each in (finals, *states)))
