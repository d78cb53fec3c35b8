"""Recurrent layers whose weights are frozen: packed once, for inference on the CPU. `rnnfast.freeze` makes them.

A frozen layer holds its weights once, as panels for this machine's processor. `state_dict`, pickle and copies have
them as tensors that mean the same anywhere: for int8 `weight_ih_l0` [G*H, I] and `weight_ih_l0_scale` [G*H].
"""

from collections.abc import Callable, Sequence
from itertools import chain
from typing import Any, NamedTuple

import torch
from rnnfast_kernels.cells import CELLS
from rnnfast_kernels.cpu.runtime import pool
from torch import Tensor
from torch.autograd.graph import increment_version
from torch.nn.utils.rnn import PackedSequence

from rnnfast import _torch, context, functional, operators, validate
from rnnfast.backends.dispatch import setting
from rnnfast.frozen_ops import kernels, meaning_names
from rnnfast.frozen_weights import FrozenWeights
from rnnfast.layers import through_layers
from rnnfast.modules import CELL_OF_MODE
from rnnfast.spec import Options

# Prepared calls that a layer keeps; forgotten when there are more.
MOST = 64
NONE: tuple[Tensor, ...] = ()
# Settings under which the kernels run a layer.
KERNELS = ("auto", "numba")
HALVES = (torch.bfloat16, torch.float16)


class Shaped(NamedTuple):
    """What checks ask of a weight."""

    shape: torch.Size
    dtype: torch.dtype
    device: torch.device


def key_of(batch_first: bool, threads: int, x: Tensor, states: Sequence[Tensor]) -> tuple:
    """Return all that a prepared call depends on, but addresses."""
    key = batch_first, threads, x.shape, x.stride(), x.dtype, x.is_cpu
    return (*key, *[(each.shape, each.dtype, each.is_cpu) for each in states]) if states else key


@_torch.constant_in_graphs
def asked_for() -> str:
    """Return the backend asked for here. A compiled graph keeps the answer it was traced with."""
    return setting()


def is_followed(tensor: Tensor) -> bool:
    """Say whether a derivative is taken along a tensor, backwards or forwards."""
    if torch.is_grad_enabled() and tensor.requires_grad:
        return True
    if torch.compiler.is_compiling():
        return False
    if torch.is_grad_enabled() and context.requires_grad_below(tensor):
        return True
    if _torch.in_dual_level() and torch.autograd.forward_ad.unpack_dual(tensor).tangent is not None:
        return True
    return _torch.forward_nesting() > 0 and _torch.is_wrapper(tensor)


class Frozen(FrozenWeights):
    """A frozen RNN, LSTM or GRU: `forward` is that of `rnnfast.LSTM`, for inference in float32.

    It has no parameters and no buffers. Reading a weight by its name gives a copy. Moved to another device it runs on
    weights made float32 again.
    """

    def forward(self, input, hx=None, *, lengths=None, resets=None, all_states=False):
        """Run the layers over `input`; arguments and results are those of `rnnfast.LSTM.forward`.

        Raises:
            RuntimeError: in training mode, or where a gradient would be taken. ValueError, RuntimeError, TypeError: as
                by a layer that is not frozen.
        """
        if self.training:
            raise RuntimeError(f"{self.type_name()}: frozen weights are for inference; call eval()")
        if lengths is None and resets is None and not all_states and not torch.compiler.is_compiling():
            results = self.run_prepared(input, hx)
            if results is not None:
                return results
        return self.run(input, hx, lengths, resets, all_states)

    def run_prepared(self, x, hx):
        """Run a call of sizes that were seen before, or return None."""
        states: tuple[Tensor, ...] | None
        if torch.compiler.is_dynamo_compiling():  # after a break in the graph
            return None
        if hx is None:
            states = NONE
        elif self.mode == "LSTM":
            states = tuple(hx) if isinstance(hx, tuple | list) else None
        else:
            states = (hx,)
        if states is None:
            return None
        tensors = (x, *states) if states else (x,)
        if not context.is_free(tensors) or _torch.in_dual_level() or setting() not in KERNELS:
            return None
        threads = torch.get_num_threads()
        if threads > pool.known_cores:
            threads = pool.usable(threads)
        prepared = self._prepared.get(key_of(self.batch_first, threads, x, states))
        if prepared is None or not context.are_as_stored(tensors) or context.is_differentiated(tensors):
            return None
        if states and not all(map(Tensor.is_contiguous, states)):
            return None
        return prepared(x, states)

    def remember(self, x: Tensor, states: Sequence[Tensor]) -> None:
        """Prepare the calls that look like one that went well."""
        tensors = (x, *states)
        if x.stride(-1) != 1 or 0 in x.shape or not context.is_free(tensors):
            return
        threads = pool.usable(torch.get_num_threads())
        if len(self._prepared) >= MOST:
            self._prepared.clear()
        self._prepared[key_of(self.batch_first, threads, x, states)] = PreparedCall(self, x, not states, threads)

    def run(self, input, hx, lengths, resets, all_states):
        """Check a call and run it."""
        packed = isinstance(input, PackedSequence)
        data = input.data if packed else input
        self.refuse_gradient((data, *(hx if isinstance(hx, tuple | list) else () if hx is None else (hx,))))
        options = self.options()
        if data.layout is not torch.strided or (_torch.is_any_autocast_enabled() and data.dtype in HALVES):
            data = (data if data.layout is torch.strided else data.to_dense()).float()
            input = input._replace(data=data) if packed else data
        if hx is not None and _torch.is_any_autocast_enabled():
            hx = hx.float() if isinstance(hx, Tensor) else tuple(each.float() for each in hx)
        reason = self.reason_for_plain(data)
        if reason is not None:
            return self.run_plain(options, input, hx, lengths, resets, all_states)
        if packed:
            return self.run_packed(options, input, hx, lengths, resets, all_states)
        return self.run_dense(options, input, hx, lengths, resets, all_states)

    def refuse_gradient(self, tensors) -> None:
        """Raise RuntimeError where a gradient would be taken through the layer."""
        if any(isinstance(each, Tensor) and is_followed(each) for each in tensors):
            raise RuntimeError(
                f"{self.type_name()}: no gradient can be taken through frozen weights; call it under torch.no_grad() "
                "or detach its input, or train the layer before rnnfast.freeze"
            )

    def options(self) -> Options:
        """Return the constants of a call."""
        return Options(
            CELL_OF_MODE[self.mode], self.num_layers, self.bidirectional, self.batch_first,
            bias=bool(self.bias), projected=self.proj_size > 0,
        )  # fmt: skip

    def like_weights(self) -> list[Any]:
        """Return what checks ask of the weights, in the order of `torch.nn.LSTM._flat_weights`."""
        gates = CELLS[CELL_OF_MODE[self.mode]].gates * self.hidden_size
        width, device = self.proj_size or self.hidden_size, torch.device("cpu")
        directions = 2 if self.bidirectional else 1
        found = []
        for layer in range(self.num_layers):
            inputs = self.input_size if layer == 0 else directions * width
            shapes = [(gates, inputs), (gates, width), *[(gates,)] * (2 if self.bias else 0)]
            shapes += [(width, self.hidden_size)] * (self.proj_size > 0)
            found += [Shaped(torch.Size(shape), torch.float32, device) for shape in shapes] * directions
        return found

    def reason_for_plain(self, data: Tensor) -> str | None:
        """Say why a call runs on dequantised weights, or None where the kernels run it."""
        if data.device.type != "cpu":
            return f"frozen weights are packed for the CPU, not for {data.device.type}"
        if asked_for() not in KERNELS:
            return f"the backend {asked_for()!r} was asked for by name"
        if self.__dict__.get("_plain") is not None:
            return self.obstacle() or "there was no kernel when the layer was frozen"
        return None

    def stepper(self, x: Tensor, output: Tensor, states: Sequence[Tensor]) -> Callable[[], None]:
        """Return a function that takes a step over these tensors: x [1, B, I], output [B, P], states in place."""
        prepared = kernels().Prepared(self.form(), 1, x.shape[1], x.stride(), False, 1)
        step = prepared.stepper(x, output, states, states, self.panels)

        def run() -> None:
            step()
            increment_version(output)  # the kernel writes where autograd does not see it

        return run

    def run_plain(self, options, input, hx, lengths, resets, all_states):
        """Run on float32 weights, as a layer that is not frozen."""
        data = input.data if isinstance(input, PackedSequence) else input
        if data.device not in self._elsewhere:
            self._elsewhere[data.device] = [each.to(data.device) for each in self.dequantised()]
        with torch.no_grad():
            return functional.recurrent(
                options, input, self._elsewhere[data.device], hx, lengths=lengths, resets=resets, all_states=all_states
            )

    def run_dense(self, options, input, hx, lengths, resets, all_states):
        batched = validate.input_is_batched(options, input)
        x = input if batched else input.unsqueeze(0 if options.batch_first else 1)
        given = hx
        hx = validate.hidden(options, hx, batched)
        x = x.transpose(0, 1) if options.batch_first else x
        steps, batch = x.shape[:2]
        validate.sizes(options, x, batch, hx, self.like_weights())
        resets = validate.resets(options, resets, steps, batch, batched)
        initial = functional.initial_states(options, hx, x, batch, self.like_weights())
        plain = lengths is None and resets is None and not all_states
        order = inverse = batch_sizes = None
        if lengths is not None:
            validate.lengths(lengths, batch, batched)
            batch_sizes, order, inverse = operators.sort_rows(lengths, steps)
            x, initial = x.index_select(1, order), functional.permuted(initial, order)
            resets = None if resets is None else resets.index_select(1, order)
        outcome = self.run_layers(options, x, initial, batch_sizes, resets, all_states)
        if inverse is not None:
            outcome = functional.Outcome(
                outcome.output.index_select(1, inverse),
                functional.permuted(outcome.finals, inverse),
                functional.permuted(outcome.states, inverse),
            )
        if plain and not torch.compiler.is_compiling():
            self.remember(input, () if given is None else tuple(given) if self.mode == "LSTM" else (given,))
        return functional.present(options, outcome, batched, all_states)

    def run_packed(self, options, packed, hx, lengths, resets, all_states):
        validate.packed(packed, lengths)
        data, batch_sizes, order, inverse = packed
        batch = int(batch_sizes[0])
        hx = validate.hidden(options, hx, None)
        validate.sizes(options, data, batch, hx, self.like_weights())
        resets = validate.resets(options, resets, len(batch_sizes), batch)
        initial = functional.initial_states(options, hx, data, batch, self.like_weights())
        initial = functional.permuted(initial, order)
        if resets is not None and order is not None:
            resets = resets.index_select(1, order)
        outcome = self.run_layers(options, data, initial, batch_sizes, resets, all_states)
        finals = functional.single(functional.permuted(outcome.finals, inverse))
        output = PackedSequence(outcome.output, batch_sizes, order, inverse)
        if all_states:
            states = tuple(PackedSequence(each, batch_sizes, order, inverse) for each in outcome.states)
            return output, finals, states
        return output, finals

    def run_layers(self, options, x, initial, batch_sizes, resets, all_states) -> functional.Outcome:
        """Call the operator for each layer."""
        forms, (held, processor) = self._forms, self.held()

        def run(n, x, hx, _):
            form = forms[n]
            wanted = all_states and n == len(forms) - 1
            output, aux, *finals = torch.ops.rnnfast.frozen_layer(
                form.cell,
                form.weights,
                form.inputs,
                form.hidden,
                form.width,
                form.projected,
                form.biased,
                options.reverse,
                wanted,
                processor,
                x,
                list(hx),
                held[n],
                batch_sizes,
                resets,
            )
            return output.flatten(-2), finals, (output, aux)[: len(hx)]

        output, finals, states = through_layers(options, x, initial, (), run)
        states = (output.clone(), *(each.flatten(-2) for each in states[1:])) if all_states else ()
        return functional.Outcome(output, finals, states)

    def held(self) -> tuple[list[list[Tensor]], str]:
        """Return what the operator takes of each layer: panels and their processor, or in an export the weights."""
        if torch.compiler.is_exporting() and not torch.compiler.is_dynamo_compiling():
            directions = 2 if self.bidirectional else 1
            names = meaning_names(self.weights_format, self.proj_size > 0, bool(self.bias))
            # Constants of the program.
            flat = [
                [torch.ops.aten.lift_fresh(torch.from_numpy(named[name])) for name in names]
                for named in kernels().unpacked(self.form(), self._array)
            ]
            return [list(chain.from_iterable(flat[n : n + directions])) for n in range(0, len(flat), directions)], ""
        return [[self.panels[a:b]] for a, b in self._places], self._processor  # type: ignore[index]


class PreparedCall:
    """A call of known sizes in the layout of the caller."""

    def __init__(self, module: Frozen, x: Tensor, zero: bool, threads: int):
        batched = x.dim() == 3
        shape: tuple[int, ...] = x.shape
        strides = x.stride()
        if not batched:
            shape, strides = (shape[0], 1, shape[1]), (strides[0], shape[1], 1)
        elif module.batch_first:
            shape, strides = (shape[1], shape[0], shape[2]), (strides[1], strides[0], 1)
        self.stack = kernels().Prepared(module.form(), shape[0], shape[1], strides, zero, threads)
        self.transposed = batched and module.batch_first
        self.panels = module.panels
        self.place = module.panels.data_ptr()  # type: ignore[union-attr]
        if not batched:
            steps, _, columns = self.stack.output
            self.stack.output = (steps, columns)
            self.stack.finals = [(rows, width) for rows, _, width in self.stack.finals]

    def __call__(self, x: Tensor, states: Sequence[Tensor]):
        output, finals = self.stack(x, states, self.place)
        return output.transpose(0, 1) if self.transposed else output, finals if len(finals) > 1 else finals[0]
