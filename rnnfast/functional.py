"""RNN, LSTM and GRU on plain tensors: validation, layers, directions, packing, lengths and resets.

`rnn_tanh`, `rnn_relu`, `lstm` and `gru` share one signature. A `Call` is what all of them become: time-major input,
sorted rows, a full set of initial states. It runs layer by layer through `rnnfast.autograd`, or whole through torch.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import torch
from rnnfast_kernels.cells import CELLS
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence
from torch.utils.checkpoint import checkpoint

from rnnfast import _torch, autograd, checks, native, ops, quick, reference
from rnnfast.backends import Layer, measured
from rnnfast.backends.choice import backend_of
from rnnfast.stacking import through_layers

States = tuple[Tensor, ...]


class Options(NamedTuple):
    """The constants of a stack of layers; the meanings are those of torch.nn.LSTM's arguments."""

    cell: str
    num_layers: int = 1
    bidirectional: bool = False
    batch_first: bool = False
    dropout: float = 0.0
    training: bool = False
    recompute: bool = False

    @property
    def directions(self) -> int:
        """Return D."""
        return 2 if self.bidirectional else 1

    @property
    def reverse(self) -> tuple[bool, ...]:
        """Say for each direction whether it runs backwards."""
        return (False, True)[: self.directions]


class Call(NamedTuple):
    """A validated call in the layout of `rnnfast.backends`.

    x: [T, B, I], or [rows, I] when packed. hx: one [layers*D, B, P or H] tensor per state. weights: flat, as in
    `torch.nn.LSTM._flat_weights`.
    """

    options: Options
    x: Tensor
    hx: States
    weights: Sequence[Tensor]
    batch_sizes: Tensor | None = None
    resets: Tensor | None = None
    all_states: bool = False

    def over(self, x: Tensor, hx: States, batch_sizes: Tensor | None, resets: Tensor | None) -> "Call":
        """Return the call with other tensors."""
        return Call(self.options, x, hx, self.weights, batch_sizes, resets, self.all_states)

    def each(self, change: Callable[[Tensor], Tensor]) -> "Call":
        """Return the call with its floating tensors changed. (Dynamo could not always trace `_replace`.)"""
        hx, weights = tuple([change(state) for state in self.hx]), [change(weight) for weight in self.weights]
        return Call(self.options, change(self.x), hx, weights, self.batch_sizes, self.resets, self.all_states)


class Outcome(NamedTuple):
    """output [*L, D*P]; finals, one [layers*D, B, P or H] per state; states of the last layer, one [*L, D*H] each."""

    output: Tensor
    finals: States
    states: States


def recurrent(
    options: Options,
    input: Tensor | PackedSequence,
    weights: Sequence[Tensor],
    hx: Tensor | Sequence[Tensor] | None = None,
    *,
    lengths: Tensor | None = None,
    resets: Tensor | None = None,
    all_states: bool = False,
):
    """Run a stack of recurrent layers; see `lstm`."""
    if isinstance(input, PackedSequence):
        if is_traced():
            return traced(options, input, weights, hx, lengths, resets, all_states)
        return run_packed(options, input, weights, hx, lengths, resets, all_states)
    kind = None
    if lengths is None and resets is None and not all_states and not torch.compiler.is_dynamo_compiling():
        states = () if hx is None else quick.states_of(options, hx)
        kind = None if states is None else quick.kind_of(options, input, states, weights)
        prepared = quick.ready.get(kind)
        if prepared is not None:
            results = prepared(input, states, weights)
            if results is not None:
                return results
    if is_traced():
        return traced(options, input, weights, hx, lengths, resets, all_states)
    batched = checks.input_is_batched(options, input)
    if not batched:
        input = input.unsqueeze(0 if options.batch_first else 1)
    hx = checks.hidden(options, hx, batched)
    x = input.transpose(0, 1) if options.batch_first else input
    checks.sizes(options, x, x.shape[1], hx, weights)
    resets = checks.resets(options, resets, x.shape[0], x.shape[1], batched)
    call = Call(options, x, initial_states(options, hx, x, x.shape[1], weights), weights, None, resets, all_states)
    if lengths is not None:
        checks.lengths(lengths, x.shape[1], batched)
        outcome = run_ragged(call, lengths)
    else:
        outcome = run(call)
    if kind is not None and quick.remember(kind):
        return no_views(options, batched, *present(options, outcome, batched, all_states))
    return present(options, outcome, batched, all_states)


def no_views(options: Options, batched: bool, output: Tensor, finals: Tensor | States):
    """Return results that are views only where those of prepared calls are, to whom comes after these few.

    Torch does not detach a view in place.
    """
    if not (options.batch_first and batched):
        output = output.clone()
    if not batched:
        finals = tuple(s.clone() for s in finals) if isinstance(finals, tuple) else finals.clone()
    return output, finals


def is_traced() -> bool:
    """Say whether torch.jit.trace is at work."""
    return not torch.compiler.is_dynamo_compiling() and _torch.is_jit_traced()


def traced(options, input, weights, hx, lengths, resets, all_states):
    """Run a call that torch.jit.trace, or the older torch.onnx.export, records: torch's operator, with sizes free."""
    if lengths is not None or resets is not None or all_states or not hasattr(_torch.operators, options.cell):
        raise RuntimeError(
            "rnnfast: torch.jit.trace and torch.onnx.export(dynamo=False) record torch's own operators, which have "
            "neither lengths, resets and all_states nor other cells; use torch.export or torch.onnx.export(dynamo=True)"
        )
    packed = isinstance(input, PackedSequence)
    x, batch_sizes, order, inverse = input if packed else (input, None, None, None)
    batched = packed or x.dim() == 3
    if not batched:
        x = x.unsqueeze(0 if options.batch_first else 1)
    x = x.transpose(0, 1) if options.batch_first and not packed else x
    if hx is None:
        batch = x.shape[1] if batch_sizes is None else batch_sizes[0]
        hx = initial_states(options, None, x, batch, weights)
    else:
        hx = tuple(hx) if n_states(options) > 1 else (hx,)
        hx = permuted(hx if batched else tuple(s.unsqueeze(1) for s in hx), order)
    outcome = Outcome(*native.run(Call(options, x, hx, weights, batch_sizes)), ())
    if packed:
        return PackedSequence(outcome.output, batch_sizes, order, inverse), single(permuted(outcome.finals, inverse))
    return present(options, outcome, batched, False)


def run_packed(options, packed, weights, hx, lengths, resets, all_states):
    """Run a PackedSequence; its rows are already in the order of falling length."""
    checks.packed(packed, lengths)
    data, batch_sizes, order, inverse = packed
    batch = int(batch_sizes[0])
    hx = checks.hidden(options, hx, None)
    checks.sizes(options, data, batch, hx, weights)
    resets = checks.resets(options, resets, len(batch_sizes), batch)
    hx = permuted(initial_states(options, hx, data, batch, weights), order)
    if resets is not None and order is not None:
        resets = resets.index_select(1, order)
    outcome = run(Call(options, data, hx, weights, batch_sizes, resets, all_states))
    finals = single(permuted(outcome.finals, inverse))
    repack = partial(PackedSequence, batch_sizes=batch_sizes, sorted_indices=order, unsorted_indices=inverse)
    if all_states:
        return repack(outcome.output), finals, tuple(repack(s) for s in outcome.states)
    return repack(outcome.output), finals


def run_ragged(call: Call, lengths: Tensor) -> Outcome:
    """Run rows of different lengths, in any order: sort them, run the padded layout, and put them back."""
    batch_sizes, order, inverse = ops.sort_rows(lengths.to(call.x.device), call.x.shape[0])
    if in_place(order):
        return run(call.over(call.x, call.hx, batch_sizes, call.resets))
    resets = None if call.resets is None else call.resets.index_select(1, order)
    outcome = run(call.over(call.x.index_select(1, order), permuted(call.hx, order), batch_sizes, resets))
    return Outcome(
        outcome.output.index_select(1, inverse), permuted(outcome.finals, inverse), permuted(outcome.states, inverse)
    )


def in_place(order: Tensor) -> bool:
    """Say whether rows are sorted already, where looking is cheap: on the CPU, outside of graphs and transforms."""
    if torch.compiler.is_compiling() or not order.is_cpu or not autograd.is_plain((order,)):
        return False
    return torch.equal(order, torch.arange(len(order), device=order.device))


def run(call: Call) -> Outcome:
    """Choose a backend and run every layer on it."""
    call = checks.cast_for_autocast(dense(call))
    needs_ours = call.resets is not None or call.all_states
    sizes = measured.sizes_of_call(call)
    backend = backend_of(call.options.cell, call.x.device, call.x.dtype, needs_ours, sizes)
    if backend == "torch":
        return Outcome(*native.run(call), ())
    if 0 in (call.x.shape[-1], *call.weights[1].shape):
        backend = "reference"  # there is nothing to compute, and kernels divide their work
    output, finals, states = through_layers(
        call.options, call.x, call.hx, call.weights, partial(run_layer, call, backend)
    )
    if not call.all_states:
        return Outcome(output, finals, ())
    # The output is the first state of every step: two results, of which each is the caller's own.
    return Outcome(output, finals, (output.clone(), *(s.flatten(-2) for s in states[1:])))


def dense(call: Call) -> Call:
    """Return the call with sparse tensors made dense: no kernel, and few of torch's, take them."""
    if torch.compiler.is_compiling() or all(t.layout is torch.strided for t in (call.x, *call.hx, *call.weights)):
        return call
    x, *tensors = (t if t.layout is torch.strided else t.to_dense() for t in (call.x, *call.hx, *call.weights))
    count = len(call.hx)
    return call._replace(x=x, hx=tuple(tensors[:count]), weights=tensors[count:])


def run_layer(call: Call, backend: str, n: int, x: Tensor, hx, weights) -> tuple[Tensor, States, States]:
    """Run layer number n in all its directions: its output [*L, D*P], its final states, and its states."""
    cell, reverse = call.options.cell, call.options.reverse
    if backend == "reference":
        named = ops.pack_weights(weights, len(reverse))
        states, finals = reference.run(Layer(cell, x, tuple(hx), named, reverse, call.batch_sizes, call.resets))
    else:
        spec = autograd.Spec(cell, backend, reverse, call.all_states and n == call.options.num_layers - 1)
        args = (spec, x, hx, weights, call.batch_sizes, call.resets)
        if call.options.recompute and torch.is_grad_enabled() and not _torch.has_transforms():
            states, finals = checkpoint(autograd.layer, *args, use_reentrant=False, preserve_rng_state=False)
        else:
            states, finals = autograd.layer(*args)
    h = states[0]  # [*L, D, P]
    return h.flatten(-2) if call.options.bidirectional else h.squeeze(-2), finals, states


def initial_states(options: Options, hx: States | None, x: Tensor, batch: int, weights: Sequence[Tensor]) -> States:
    """Return the initial states, zero where none were given."""
    if hx is not None:
        return hx
    rows = options.num_layers * options.directions
    h = x.new_zeros(rows, batch, weights[1].shape[1])
    if n_states(options) == 1:
        return (h,)
    hidden = weights[1].shape[0] // CELLS[options.cell].gates
    return (h, *(x.new_zeros(rows, batch, hidden) for _ in range(n_states(options) - 1)))


def n_states(options: Options) -> int:
    """Return S, the number of state tensors of the cell."""
    return len(CELLS[options.cell].states)


def permuted(states: States, order: Tensor | None) -> States:
    """Reorder the batch dimension of each [*, B, *] tensor."""
    return states if order is None else tuple(s.index_select(1, order) for s in states)


def single(states: States) -> Tensor | States:
    """Return states the way torch does: a tuple for an LSTM, the tensor alone for a cell with one state."""
    return states if len(states) > 1 else states[0]


def present(options: Options, outcome: Outcome, batched: bool, all_states: bool):
    """Return results in the layout of the input."""

    def sequence(tensor: Tensor) -> Tensor:
        if not batched:
            return tensor.squeeze(1)
        return tensor.transpose(0, 1) if options.batch_first else tensor

    finals = single(outcome.finals if batched else tuple(s.squeeze(1) for s in outcome.finals))
    if all_states:
        return sequence(outcome.output), finals, tuple(sequence(s) for s in outcome.states)
    return sequence(outcome.output), finals


def _public(cell: str, name: str, equation: str):
    def function(
        input: Tensor | PackedSequence,
        weights: Sequence[Tensor],
        hx: Tensor | Sequence[Tensor] | None = None,
        *,
        num_layers: int = 1,
        bidirectional: bool = False,
        batch_first: bool = False,
        dropout: float = 0.0,
        training: bool = False,
        recompute: bool = False,
        lengths: Tensor | None = None,
        resets: Tensor | None = None,
        all_states: bool = False,
    ):
        options = Options(cell, num_layers, bidirectional, batch_first, dropout, training, recompute)
        return recurrent(options, input, weights, hx, lengths=lengths, resets=resets, all_states=all_states)

    function.__name__ = function.__qualname__ = cell
    function.__doc__ = f"""Run {name} over a sequence: {equation}.

    Args:
        input: [T, B, I] ([B, T, I] with batch_first), unbatched [T, I], or a PackedSequence.
        weights: flat list in the order of `torch.nn.LSTM._flat_weights`: per layer and direction w_ih [G*H, I],
            w_hh [G*H, P], then b_ih and b_hh [G*H] or neither, then w_hr [P, H] with a projection (LSTM only).
        hx: the initial state [layers*D, B, P], for an LSTM the pair with the cell state [layers*D, B, H]; zero if None.
        num_layers, bidirectional, batch_first, dropout, training: as in `torch.nn.LSTM`.
        recompute: whether backward runs each layer again rather than keep its gates and states: a fraction of the
            memory, for one more forward pass.
        lengths: int tensor [B], any order, zeros allowed. What stands past a row's end reaches nothing; the output
            there is 0, the final state is that of the last valid step, the reverse direction starts there.
        resets: bool tensor [T, B] ([B, T] with batch_first); where true, the state entering the step is zeroed first.
        all_states: also return, as a third result, every state of every step of the last layer.

    Returns:
        The output [T, B, D*P], the final state(s), and with `all_states` a tuple of [T, B, D*H] tensors.

    Raises:
        ValueError, RuntimeError: as torch does for the same mistake; ValueError or TypeError for lengths and resets.
    """
    return function


rnn_tanh = _public("rnn_tanh", "an Elman network with tanh", "h' = tanh(W_ih x + b_ih + W_hh h + b_hh)")
rnn_relu = _public("rnn_relu", "an Elman network with a rectifier", "h' = relu(W_ih x + b_ih + W_hh h + b_hh)")
lstm = _public("lstm", "a long short-term memory", "c' = f * c + i * g, h' = o * tanh(c')")
gru = _public("gru", "a gated recurrent unit", "h' = (1 - z) * n + z * h")
