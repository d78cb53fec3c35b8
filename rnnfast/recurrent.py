"""`Recurrent`: a layer, or several, of a declared cell; and `recurrent`, the same on plain tensors.

Cells of torch's form run as `rnnfast.functional` runs LSTM and GRU. The others (parameters, signals, more than two
states, gates without a recurrent part) run on the Numba kernels for such cells, or on the plain loop.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from rnnfast_kernels.cells import CELLS
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence
from torch.utils.checkpoint import checkpoint

from rnnfast import _torch, cell_ops, checks, functional, ops
from rnnfast.backends import choice
from rnnfast.backends.recurrence import Recurrence, pack_weights, presence
from rnnfast.declare import Cell, found
from rnnfast.functional import Options, in_place, permuted
from rnnfast.stacking import through_layers

States = tuple[Tensor, ...]
Initial = float | Tensor | Callable[[Tensor], Any]


class Recurrent(nn.Module):
    """Layers of a cell that was declared by `rnnfast.cell`.

    Args:
        cell: the cell.
        input_size: width I of the input.
        hidden_size: width H of every state.
        num_layers, bias, batch_first, dropout, bidirectional, device, dtype: as in `torch.nn.LSTM`.
        initial: initial values of parameters of the cell, by name: a number, a tensor [H], or a function that fills a
            tensor, as those of `torch.nn.init` do. Those not named are uniform within 1 / sqrt(H), like all weights.

    Parameters: `weight_ih_l0` [G*H, I], `weight_hh_l0` [R*H, H] for the R gates with a recurrent part, `bias_ih_l0`
    [G*H], `bias_hh_l0` [R*H], and the cell's own, `name_l0` [H]; further layers `_l1`, the reverse direction
    `_l0_reverse`.

    recompute: set it to True to have backward run each layer again rather than keep its gates and states.
    """

    recompute: bool = False

    def __init__(
        self,
        cell: Cell,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        *,
        initial: Mapping[str, Initial] | None = None,
        device=None,
        dtype=None,
    ):
        super().__init__()
        if not isinstance(cell, Cell):
            raise TypeError(f"Recurrent: expected a cell declared by rnnfast.cell, got {type(cell).__name__}")
        if not cell.gates:
            raise ValueError(
                f"Recurrent: the cell {cell.__name__} has no gates, so its layers would not read their input"
            )
        for name, value in (("hidden_size", hidden_size), ("num_layers", num_layers)):
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"{name}: expected a positive integer, got {value!r}")
        if isinstance(dropout, bool) or not 0 <= dropout <= 1:
            raise ValueError(f"dropout: expected a number from 0 to 1, got {dropout!r}")
        unknown = set(initial or ()) - set(cell.parameters)
        if unknown:
            raise ValueError(f"initial: {', '.join(sorted(unknown))} is not a parameter of the cell {cell.__name__}")
        self.cell, self.input_size, self.hidden_size, self.num_layers = cell, input_size, hidden_size, num_layers
        self.bias, self.batch_first, self.dropout, self.bidirectional = bias, batch_first, dropout, bidirectional
        self.initial = dict(initial or {})
        for suffix, inputs in self.places():
            for name, shape in self.shapes(inputs).items():
                weight = nn.Parameter(torch.empty(shape, device=device, dtype=dtype))
                self.register_parameter(f"{name}_{suffix}", weight)
        self.reset_parameters()

    def places(self) -> list[tuple[str, int]]:
        """Return the end of the weights' names and the input width of each layer and direction."""
        directions = 2 if self.bidirectional else 1
        return [
            (f"l{n}{('', '_reverse')[d]}", self.input_size if n == 0 else directions * self.hidden_size)
            for n in range(self.num_layers)
            for d in range(directions)
        ]

    def shapes(self, inputs: int) -> dict[str, tuple[int, ...]]:
        """Return the weights of one layer and direction."""
        cell, hidden = self.cell.kernel, self.hidden_size
        columns, recurrent = cell.gates * hidden, cell.recurrent * hidden
        shapes: dict[str, tuple[int, ...]] = {"weight_ih": (columns, inputs)}
        shapes |= {"weight_hh": (recurrent, hidden)} if recurrent else {}
        if self.bias:
            shapes |= {"bias_ih": (columns,)} | ({"bias_hh": (recurrent,)} if recurrent else {})
        return shapes | dict.fromkeys(cell.parameters, (hidden,))

    def reset_parameters(self) -> None:
        """Give every weight its initial value."""
        bound = self.hidden_size**-0.5
        with torch.no_grad():
            for suffix, inputs in self.places():
                for name in self.shapes(inputs):
                    weight = getattr(self, f"{name}_{suffix}")
                    value = self.initial.get(name)
                    if callable(value):
                        value(weight)
                    elif value is not None:
                        weight.copy_(torch.as_tensor(value))
                    else:
                        nn.init.uniform_(weight, -bound, bound)

    def weights(self) -> list[Tensor]:
        """Return the weights of a call, flat: layer by layer, direction by direction, in the order of `shapes`."""
        return [getattr(self, f"{name}_{suffix}") for suffix, inputs in self.places() for name in self.shapes(inputs)]

    def options(self) -> Options:
        """Return the constants of a call."""
        return Options(
            self.cell.identity,
            self.num_layers,
            self.bidirectional,
            self.batch_first,
            self.dropout,
            self.training,
            self.recompute,
        )

    def forward(self, input, hx=None, *, signals=None, lengths=None, resets=None, all_states=False):
        """Run the layers over `input`.

        Args:
            input: [T, B, I] ([B, T, I] with batch_first), unbatched [T, I], or a PackedSequence.
            hx: initial states, [layers*D, B, H] each: the state itself for a cell of one; else a sequence in the order
                of the cell's states, or a mapping by name. States that are None or absent start from zero.
            signals: the cell's signals by name, each broadcastable to [T, B, H] ([B, T, H] with batch_first, [T, H]
                unbatched); with a PackedSequence to [T, B, H]. They are converted to the input's dtype.
            lengths, resets, all_states: as in `rnnfast.LSTM`.

        Returns:
            output [T, B, D*H] and the final state(s) [layers*D, B, H], as hx is given as a sequence.

        Raises:
            ValueError, RuntimeError, TypeError: what was expected, and what came.
        """
        return recurrent(
            self.options(), input, self.weights(), hx, signals=signals, lengths=lengths, resets=resets,
            all_states=all_states, bias=self.bias,
        )  # fmt: skip

    def extra_repr(self) -> str:
        text = f"{self.cell.__name__}, {self.input_size}, {self.hidden_size}"
        defaults = {"num_layers": 1, "bias": True, "batch_first": False, "dropout": 0.0, "bidirectional": False}
        return text + "".join(f", {n}={getattr(self, n)}" for n, usual in defaults.items() if getattr(self, n) != usual)


class Call(NamedTuple):
    """A validated call. x: [T, B, I], or [rows, I] when packed. hx: [layers*D, B, H] for each state, as loops take
    them. signals: [T or 1, B or 1, H or 1] each."""

    options: Options
    bias: bool
    backend: str
    x: Tensor
    hx: States
    weights: Sequence[Tensor]
    signals: States
    batch_sizes: Tensor | None
    resets: Tensor | None
    all_states: bool


def recurrent(
    options: Options,
    input: Tensor | PackedSequence,
    weights: Sequence[Tensor],
    hx=None,
    *,
    signals: Mapping[str, Tensor] | None = None,
    lengths: Tensor | None = None,
    resets: Tensor | None = None,
    all_states: bool = False,
    bias: bool = True,
):
    """Run layers of a declared cell on plain tensors; see `Recurrent.forward`.

    options: `cell` is the cell's identity. weights: flat, in the order of `Recurrent.weights`.
    """
    cell = found(options.cell)
    if torch.compiler.is_compiling() and ops.in_onnx_export():
        raise RuntimeError(f"rnnfast: layers of declared cells, such as {cell.__name__}, cannot be exported to ONNX")
    packed = isinstance(input, PackedSequence)
    data: Tensor = input.data if packed else input  # type: ignore[assignment]
    batched = True if packed else checks.input_is_batched(options, data)
    signals = named_signals(cell, signals)
    states = named_states(cell, hx)
    if cell.runs_as_torch_form(data):
        found_ = run_as_torch_form(cell, options, input, weights, states, lengths, resets, all_states)
        return in_user_order(cell, *found_)
    steps, batch = extent(options, input, batched)
    rows = (options.num_layers * options.directions, batch, weights[0].shape[0] // cell.kernel.gates)
    initial = tuple(initial_state(name, states.get(name), rows, data, batched or packed) for name in cell.states)
    laid_out = tuple(
        lay_out(name, signals[name], steps, batch, rows[2], options.batch_first and not packed, batched).to(data.dtype)
        for name in cell.signals
    )
    call = Call(
        options, bias, backend_for(cell, data), data, tuple(initial[n] for n in cell.order), weights, laid_out, None,
        None, all_states,
    )  # fmt: skip
    check_weights(call)
    if isinstance(input, PackedSequence):
        return run_packed(cell, call, input, lengths, resets)
    if not batched:
        call = call._replace(x=data.unsqueeze(0 if options.batch_first else 1))
    x = call.x.transpose(0, 1) if options.batch_first else call.x
    call = call._replace(x=x, resets=checks.resets(options, resets, steps, batch, batched))
    if lengths is not None:
        checks.lengths(lengths, batch, batched)
        output, finals, each = run_ragged(call, lengths)
    else:
        output, finals, each = run(call)
    result = functional.present(options, functional.Outcome(output, finals, each), batched, all_states)
    return in_user_order(cell, *result)


def backend_for(cell: Cell, x: Tensor) -> str:
    """Return what runs a cell that torch's form does not fit: "numba" or "reference"."""
    return choose(cell.identity, x.device, x.dtype).backend


@_torch.constant_in_graphs
def choose(identity: str, device: torch.device, dtype: torch.dtype) -> choice.Choice:
    """Choose between the Numba kernels and the plain loop.

    Raises:
        RuntimeError: the backend that was asked for by name cannot run the cell.
    """
    asked = choice.setting()
    if asked == "reference":
        return choice.Choice("reference", "asked for by name")
    if asked in ("torch", "triton"):
        lacks = (
            f"torch.nn lacks the cell {identity}" if asked == "torch" else "it has no kernels for cells of this form"
        )
        raise RuntimeError(f"the {asked!r} backend cannot run this: {lacks}")
    problem = kernels_problem(identity, device, dtype)
    if problem is None:
        return choice.Choice("numba", "fused kernel for cpu tensors")
    if asked == "numba":
        raise RuntimeError(f"the 'numba' backend cannot run this: {problem}")
    return choice.Choice("reference", f"numba cannot run this: {problem}; torch.nn lacks the cell")


def kernels_problem(identity: str, device: torch.device, dtype: torch.dtype) -> str | None:
    """Say what keeps the Numba kernels from running a cell, or None."""
    try:
        module = choice.load("numba cells")
    except Exception as error:  # whatever a library raises that cannot be loaded
        return f"the numba backend cannot be imported ({type(error).__name__}: {error})"
    problem = module.unsupported(identity, device, dtype)
    return choice.load("numba").obtain(identity, dtype) if problem is None else problem


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
    if len(hx) != len(cell.states):
        raise RuntimeError(f"hx: expected {len(cell.states)} states ({', '.join(cell.states)}), got {len(hx)}")
    return {name: state for name, state in zip(cell.states, hx, strict=True) if state is not None}


def named_signals(cell: Cell, signals: Mapping[str, Tensor] | None) -> dict[str, Tensor]:
    """Check which signals there are."""
    given = dict(signals or {})
    missing, unknown = [n for n in cell.signals if n not in given], sorted(set(given) - set(cell.signals))
    if missing or unknown:
        wanted = ", ".join(cell.signals) or "none"
        raise ValueError(f"signals: {cell.__name__} expects {wanted}, got {', '.join(given) or 'none'}")
    for name, signal in given.items():
        if not isinstance(signal, Tensor):
            raise TypeError(f"signals: expected a tensor for {name}, got {type(signal).__name__}")
    return given


def extent(options: Options, input, batched: bool) -> tuple[int, int]:
    """Return T and B."""
    if isinstance(input, PackedSequence):
        return len(input.batch_sizes), int(input.batch_sizes[0])
    if not batched:
        return input.shape[0], 1
    return (input.shape[1], input.shape[0]) if options.batch_first else (input.shape[0], input.shape[1])


def initial_state(name: str, state: Tensor | None, shape: tuple[int, ...], x: Tensor, batched: bool) -> Tensor:
    """Check an initial state, or make one of zeros."""
    if state is None:
        return x.new_zeros(shape)
    expected = shape if batched else (shape[0], shape[2])
    if state.shape != expected:
        raise RuntimeError(f"Expected hidden state {name} of size {list(expected)}, got {list(state.shape)}")
    return state if batched else state.unsqueeze(1)


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


def check_weights(call: Call) -> None:
    """Check the number and the shapes of the weights, and that all tensors are of one kind."""
    options, cell, weights = call.options, CELLS[call.options.cell], call.weights
    count = sum(presence(cell, call.bias)) - bool(cell.parameters) + len(cell.parameters)
    places = options.num_layers * options.directions
    if len(weights) != count * places:
        raise RuntimeError(f"weights: expected {count * places} tensors, got {len(weights)}")
    x, inputs = call.x, weights[0].shape[-1]
    if x.shape[-1] != inputs:
        raise RuntimeError(f"input.size(-1) must be equal to input_size. Expected {inputs}, got {x.shape[-1]}")
    if _torch.is_any_autocast_enabled():
        return
    for tensor in (*call.hx, *weights):
        if tensor.dtype != x.dtype or tensor.device != x.device:
            raise ValueError(
                f"input, hidden states and weights must have the same dtype and device, got {x.dtype} on {x.device} "
                f"and {tensor.dtype} on {tensor.device}"
            )


def run_as_torch_form(cell: Cell, options: Options, input, weights, states, lengths, resets, all_states):
    """Run a cell of torch's form as `rnnfast.functional` runs those of torch."""
    hx: Any = None
    if states:
        hx = [states.get(cell.states[n]) for n in cell.order]
        like = next(each for each in hx if each is not None)
        hx = tuple(torch.zeros_like(like) if each is None else each for each in hx)
        hx = hx if len(hx) > 1 else hx[0]
    return functional.recurrent(options, input, weights, hx, lengths=lengths, resets=resets, all_states=all_states)


def in_user_order(cell: Cell, output, finals, *states):
    """Put states into the order in which the user declared them."""
    if len(cell.states) == 1 or cell.order == tuple(range(len(cell.order))):
        return (output, finals, *states)
    back = [cell.order.index(n) for n in range(len(cell.order))]
    return (output, *(tuple(each[n] for n in back) for each in (finals, *states)))


def run_packed(cell: Cell, call: Call, packed: PackedSequence, lengths, resets):
    """Run a PackedSequence."""
    checks.packed(packed, lengths)
    _, batch_sizes, order, inverse = packed
    resets = checks.resets(call.options, resets, len(batch_sizes), call.hx[0].shape[1])
    call = reordered(call._replace(batch_sizes=batch_sizes, resets=resets), order)
    output, finals, states = run(call)
    repack = partial(PackedSequence, batch_sizes=batch_sizes, sorted_indices=order, unsorted_indices=inverse)
    rest = (tuple(map(repack, states)),) if call.all_states else ()
    return in_user_order(cell, repack(output), functional.single(permuted(finals, inverse)), *rest)


def reordered(call: Call, order: Tensor | None) -> Call:
    """Reorder the batch in everything but x."""
    if order is None:
        return call
    signals = tuple(s if s.shape[1] == 1 else s.index_select(1, order) for s in call.signals)
    resets = None if call.resets is None else call.resets.index_select(1, order)
    return call._replace(hx=permuted(call.hx, order), signals=signals, resets=resets)


def run_ragged(call: Call, lengths: Tensor):
    """Run rows of different lengths: sort them, run the padded layout, and put them back."""
    batch_sizes, order, inverse = ops.sort_rows(lengths.to(call.x.device), call.x.shape[0])
    call = call._replace(batch_sizes=batch_sizes)
    if in_place(order):
        return run(call)
    output, finals, states = run(reordered(call._replace(x=call.x.index_select(1, order)), order))
    return output.index_select(1, inverse), permuted(finals, inverse), permuted(states, inverse)


def run(call: Call) -> tuple[Tensor, States, States]:
    """Run every layer: output [*L, D*H], final states, and with `all_states` those of every step of the last layer."""
    call = cast_for_autocast(call)
    options = call.options
    output, finals, states = through_layers(options, call.x, call.hx, call.weights, partial(run_layer, call))
    return output, finals, tuple(s.flatten(-2) for s in states) if call.all_states else ()


def run_layer(call: Call, n: int, x: Tensor, hx, weights) -> tuple[Tensor, States, States]:
    """Run layer number n in all its directions."""
    options, cell = call.options, CELLS[call.options.cell]
    count, own = sum(presence(cell, call.bias)) - bool(cell.parameters), len(cell.parameters)
    flat: list[Tensor] = []
    for d in range(options.directions):
        given = weights[d * (count + own) : (d + 1) * (count + own)]
        flat += [*given[:count], *([torch.stack(tuple(given[count:]))] if own else [])]
    h, *others = hx
    layer = Recurrence(
        options.cell,
        x,
        h,
        torch.stack(others) if others else h.new_empty(0, *h.shape),
        pack_weights(cell, flat, call.bias, options.directions),
        call.signals,
        options.reverse,
        call.batch_sizes,
        call.resets,
    )
    all_states = cell.output > 0 or (call.all_states and n == options.num_layers - 1)
    if options.recompute and torch.is_grad_enabled():
        outcome = checkpoint(
            cell_ops.run, layer, call.backend, all_states, use_reentrant=False, preserve_rng_state=False
        )
    else:
        outcome = cell_ops.run(layer, call.backend, all_states)
    states = (outcome.h, *outcome.extra) if all_states else (outcome.h,)
    output = states[cell.output]
    return output.flatten(-2), (outcome.h_final, *outcome.extra_final), states


def cast_for_autocast(call: Call) -> Call:
    """Inside `torch.autocast`, bring all tensors to its dtype."""
    device = call.x.device.type
    if not (_torch.is_any_autocast_enabled() and checks.is_autocast_on(device)):
        return call
    dtype = torch.get_autocast_dtype(device)

    def cast(tensor: Tensor) -> Tensor:
        return tensor.to(dtype) if tensor.dtype != torch.float64 else tensor

    call = call._replace(x=cast(call.x), weights=[cast(w) for w in call.weights])
    call = call._replace(hx=tuple(map(cast, call.hx)), signals=tuple(map(cast, call.signals)))
    return call._replace(backend=choose(call.options.cell, call.x.device, call.x.dtype).backend)
