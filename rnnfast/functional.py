"""RNN, LSTM and GRU on plain tensors: validation, layers, directions, packing, lengths and resets.

`rnn_tanh`, `rnn_relu`, `lstm` and `gru` share one signature. A `Call` is what all of them become: time-major input,
sorted rows, a full set of initial states. It runs layer by layer through `rnnfast.autograd`, or whole through torch.
Calls of sizes that were seen before take the fast path (`rnnfast.fast_path`).
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from rnnfast import _torch, autograd, context, fast_path, native, operators, reference, validate
from rnnfast.backends import measured
from rnnfast.backends.dispatch import backend_of
from rnnfast.call import Call, Outcome, permuted
from rnnfast.layers import through_layers
from rnnfast.spec import Layer, Options, States, cell_named, group

if TYPE_CHECKING:
    from rnnfast.signatures import Function

__all__ = ["gru", "lstm", "rnn_relu", "rnn_tanh"]


def __dir__() -> list[str]:
    """List the public names alone."""
    return list(__all__)


def recurrent(
    options: Options,
    input: Tensor | PackedSequence,
    weights: Sequence[Tensor],
    hx: Tensor | Sequence[Tensor] | None = None,
    *,
    lengths: Tensor | None = None,
    resets: Tensor | None = None,
    all_states: bool = False,
    signals: States = (),
):
    """Run a stack of recurrent layers; see `lstm`. signals: [T or 1, B or 1, H or 1] each."""
    if isinstance(input, PackedSequence):
        if is_traced():
            return traced(options, input, weights, hx, lengths, resets, all_states)
        return run_packed(options, input, weights, hx, lengths, resets, all_states, signals, run)
    key, states, recorded = None, None, None
    plain = lengths is None and resets is None and not all_states and len(signals) == 0
    if plain and not torch.compiler.is_dynamo_compiling():
        states = () if hx is None else fast_path.states_of(options, hx)
        key = None if states is None else fast_path.key_of(options, input, states, weights)
        recorded = fast_path.recorded.get(key)
        if recorded is not None:
            results = recorded(input, states, weights)
            if results is not None:
                return results
    if is_traced():
        return traced(options, input, weights, hx, lengths, resets, all_states)
    call, batched = checked(options, input, weights, hx, resets, all_states, signals)
    if key is not None and states is not None and recorded is None:
        validate.one_kind(call)
        sizes = measured.sizes_of_call(call)
        recorded = fast_path.record(key, input, states, weights, sizes)
        results = None if recorded is None else recorded(input, states, weights)
        if results is not None:
            return results
    return present(options, run_rows(call, lengths, batched, run), batched, all_states)


def checked(
    options: Options,
    input: Tensor,
    weights: Sequence[Tensor],
    hx,
    resets: Tensor | None,
    all_states: bool,
    signals: States,
) -> tuple[Call, bool]:
    """Check a call over a dense input, and return it with whether the input has a batch dimension."""
    batched = validate.input_is_batched(options, input)
    hx, input = validate.hidden(options, hx, batched), validate.dense(input)
    x = input if batched else input.unsqueeze(0 if options.batch_first else 1)
    x = x.transpose(0, 1) if options.batch_first else x
    steps, batch = x.shape[:2]
    validate.sizes(options, x, batch, hx, weights)
    resets = validate.resets(options, resets, steps, batch, batched)
    hx = initial_states(options, hx, x, batch, weights)
    return Call(options, x, hx, weights, None, resets, all_states, signals), batched


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


def run_packed(options, packed, weights, hx, lengths, resets, all_states, signals, run):
    """Run a PackedSequence; its rows are already in the order of falling length. run: runs a call, as `run` does."""
    validate.packed(packed, lengths)
    data, batch_sizes, order, inverse = packed
    data = validate.dense(data)
    batch = int(batch_sizes[0])
    hx = validate.hidden(options, hx, None)
    validate.are_tensors(weights, 3)
    validate.sizes(options, data, batch, hx, weights)
    resets = validate.resets(options, resets, len(batch_sizes), batch)
    hx = initial_states(options, hx, data, batch, weights)
    call = Call(options, data, hx, weights, None, resets, all_states, signals)
    outcome = run(call.over(data, batch_sizes, order))
    finals = single(permuted(outcome.finals, inverse))
    repack = partial(PackedSequence, batch_sizes=batch_sizes, sorted_indices=order, unsorted_indices=inverse)
    if all_states:
        return repack(outcome.output), finals, tuple(repack(s) for s in outcome.states)
    return repack(outcome.output), finals


def run_rows(call: Call, lengths: Tensor | None, batched: bool, run: Callable[[Call], Outcome]) -> Outcome:
    """Run rows of different lengths, in any order: sort them, run the padded layout, and put them back.

    run: runs a call, as `run` does.
    """
    if lengths is None:
        return run(call)
    validate.lengths(lengths, call.x.shape[1], batched)
    batch_sizes, order, inverse = operators.sort_rows(lengths.to(call.x.device), call.x.shape[0])
    if in_place(order):
        return run(call.over(call.x, batch_sizes, None))
    outcome = run(call.over(call.x.index_select(1, order), batch_sizes, order))
    return Outcome(
        outcome.output.index_select(1, inverse), permuted(outcome.finals, inverse), permuted(outcome.states, inverse)
    )


def in_place(order: Tensor) -> bool:
    """Say whether rows are sorted already, where looking is cheap: on the CPU, outside of graphs and transforms."""
    if torch.compiler.is_compiling() or not order.is_cpu or not context.is_plain((order,)):
        return False
    return torch.equal(order, torch.arange(len(order), device=order.device))


def run(call: Call) -> Outcome:
    """Choose a backend and run every layer on it."""
    if not torch.compiler.is_compiling() and any(weight.layout is not torch.strided for weight in call.weights):
        call = call._replace(weights=[*map(validate.dense, call.weights)])
    call = validate.cast_for_autocast(call)
    options = call.options
    needs_ours = call.resets is not None or call.all_states or len(call.signals) > 0
    sizes = measured.sizes_of_call(call)
    backend = backend_of(options.cell, call.x.device, call.x.dtype, needs_ours, sizes)
    if backend == "torch":
        return Outcome(*native.run(call), ())
    if 0 in (call.x.shape[-1], options.hidden(call.weights), options.width(call.weights)):
        backend = "reference"  # there is nothing to compute, and kernels divide their work
    run_one = partial(run_layer, call, backend)
    output, finals, states = through_layers(options, call.x, call.hx, call.weights, run_one)
    if not call.all_states:
        return Outcome(output, finals, ())
    # The output is one of the states of every step: two results, of which each is the caller's own.
    shown = cell_named(options.cell).output
    return Outcome(output, finals, tuple(output.clone() if n == shown else s.flatten(-2) for n, s in enumerate(states)))


def run_layer(call: Call, backend: str, n: int, x: Tensor, hx, weights) -> tuple[Tensor, States, States]:
    """Run layer number n in all its directions: its output [*L, D*P], its final states, and its states."""
    options, cell = call.options, cell_named(call.options.cell)
    named = group(options, weights)
    layer = Layer(options.cell, x, tuple(hx), named, options.reverse(), call.batch_sizes, call.resets, call.signals)
    if backend == "reference":
        states, finals = reference.run(layer)
    else:
        args = (layer, backend, cell.output > 0 or (call.all_states and n == options.num_layers - 1))
        if options.recompute and torch.is_grad_enabled() and not _torch.has_transforms():
            from torch.utils.checkpoint import checkpoint  # imports sympy with torch 2.6

            states, finals = checkpoint(autograd.layer, *args, use_reentrant=False, preserve_rng_state=False)
        else:
            states, finals = autograd.layer(*args)
    h = states[cell.output]  # [*L, D, P]
    return h.flatten(-2) if options.bidirectional else h.squeeze(-2), finals, states


def initial_states(options: Options, hx: States | None, x: Tensor, batch: int, weights: Sequence[Tensor]) -> States:
    """Return the initial states, zero where none were given."""
    if hx is not None:
        return hx
    rows = options.num_layers * options.directions
    h = x.new_zeros(rows, batch, options.width(weights))
    hidden = options.hidden(weights)
    return (h, *[x.new_zeros(rows, batch, hidden) for _ in range(n_states(options) - 1)])


def n_states(options: Options) -> int:
    """Return S, the number of state tensors of the cell."""
    return len(cell_named(options.cell).states)


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


def _public(cell: str, name: str, equation: str) -> Any:
    def function(
        input: Tensor | PackedSequence,
        weights: Sequence[Tensor],
        hx: Tensor | tuple[Tensor, Tensor] | None = None,
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
    ) -> Any:
        present = validate.weights_present(cell, weights, num_layers * (1 + bidirectional))
        options = Options(cell, num_layers, bidirectional, batch_first, dropout, training, recompute, *present)
        return recurrent(options, input, weights, hx, lengths=lengths, resets=resets, all_states=all_states)

    function.__name__ = function.__qualname__ = cell
    function.__doc__ = f"""Run {name} over a sequence: {equation}.

    Args:
        input: [T, B, I] ([B, T, I] with batch_first), unbatched [T, I], or a PackedSequence.
        weights: flat list in the order of `torch.nn.LSTM._flat_weights`: per layer and direction w_ih [G*H, I],
            w_hh [G*H, P], then b_ih and b_hh [G*H] or neither, then w_hr [P, H] with a projection (LSTM only).
        hx: the initial state [layers*D, B, P], for an LSTM the pair with the cell state [layers*D, B, H]; zero if None.
        num_layers: layers, each over the output of the one before. Default 1.
        bidirectional: whether a second direction runs from the end. Default False.
        batch_first: whether batched tensors are [B, T, ...] rather than [T, B, ...]. Default False.
        dropout: probability of zeroing an element between layers where `training` is true. Default 0.
        training: whether dropout is applied. Default False.
        recompute: whether backward runs each layer again rather than keep its gates and states: a fraction of the
            memory, for one more forward pass. Default False.
        lengths: int tensor [B], any order, zeros allowed. Padding past a row's end is ignored, even NaN; the output
            there is 0, the final state is that of the last valid step, the reverse direction starts there.
            Default None: all steps are valid.
        resets: bool tensor [T, B] ([B, T] with batch_first); where true, the state entering the step is zeroed first.
            Default None: nowhere.
        all_states: also return, as a third result, every state of every step of the last layer. Default False.

    Returns:
        The output [T, B, D*P], the final state(s), and with `all_states` a tuple of [T, B, D*P] for h and
        [T, B, D*H] for c.

    Raises:
        ValueError, RuntimeError: as torch does for the same mistake; ValueError or TypeError for lengths and resets.
    """
    return function


rnn_tanh: "Function[Tensor, tuple[Tensor], tuple[PackedSequence]]" = _public(
    "rnn_tanh", "an Elman network with tanh", "h' = tanh(W_ih x + b_ih + W_hh h + b_hh)"
)
rnn_relu: "Function[Tensor, tuple[Tensor], tuple[PackedSequence]]" = _public(
    "rnn_relu", "an Elman network with a rectifier", "h' = relu(W_ih x + b_ih + W_hh h + b_hh)"
)
lstm: "Function[tuple[Tensor, Tensor], tuple[Tensor, Tensor], tuple[PackedSequence, PackedSequence]]" = _public(
    "lstm", "a long short-term memory", "c' = f * c + i * g, h' = o * tanh(c')"
)
gru: "Function[Tensor, tuple[Tensor], tuple[PackedSequence]]" = _public(
    "gru", "a gated recurrent unit", "h' = (1 - z) * n + z * h"
)
