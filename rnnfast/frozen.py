"""Recurrent layers whose weights are frozen: packed once, for inference on the CPU. `rnnfast.freeze` makes them.

A frozen layer holds its weights once, as panels for this machine's processor. `state_dict`, pickle and copies have
them as machine-independent tensors: for int8 `weight_ih_l0` [G, H, I] and `weight_ih_l0_scale` [G*H].
"""

import warnings
from collections.abc import Callable, Sequence
from itertools import chain
from operator import index
from typing import Any, NamedTuple

import torch
from rnnfast_kernels.cpu.runtime import pool
from torch import Tensor
from torch.fx import Proxy
from torch.nn.utils.rnn import PackedSequence

from rnnfast import _torch, context, fast_path, flops, functional, operators, validate
from rnnfast.backends import NoMemoryError
from rnnfast.backends.dispatch import setting
from rnnfast.call import Call, Outcome
from rnnfast.frozen_ops import kernels
from rnnfast.frozen_weights import FrozenWeights, weight_shapes
from rnnfast.layers import through_layers
from rnnfast.modules import leaf
from rnnfast.spec import Options, cell_named

# Prepared calls that a layer keeps; the oldest are forgotten when there are more.
MOST = 64
NONE: tuple[Tensor, ...] = ()
# Settings under which the kernels run a layer.
KERNELS = ("auto", "numba")
HALVES = (torch.bfloat16, torch.float16)


class Shaped(NamedTuple):
    """What checks ask of a weight."""

    shape: tuple[int, ...]
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
        if isinstance(input, Proxy):
            return leaf(self, input, hx, lengths=lengths, resets=resets, all_states=all_states)
        if lengths is None and resets is None and not all_states:
            results = self.run_prepared(input, hx)
            if results is not None:
                return results
        return self.run(input, hx, lengths, resets, all_states)

    def states_of(self, hx) -> tuple[Tensor, ...] | None:
        """Return given initial states as a tuple, or None where they do not have the form that the cell takes."""
        if self.mode == "LSTM":
            return tuple(hx) if isinstance(hx, (tuple, list)) and hx else None
        return (hx,)

    def run_prepared(self, x, hx):
        """Run a call of sizes that were seen before, or return None."""
        if (
            torch.compiler.is_dynamo_compiling()
            or self.training
            or type(x) not in context.PLAIN
            or x.layout is not torch.strided
            or not context.is_undisturbed()
            or _torch.in_dual_level()
            or setting() not in KERNELS
        ):
            return None
        states = NONE if hx is None else self.states_of(hx)
        if states is None or not context.PLAIN.issuperset(map(type, states)):
            return None
        threads = torch.get_num_threads()
        if threads > pool.known_cores:
            threads = pool.usable(threads)
        prepared = self._prepared.get(key_of(self.batch_first, threads, x, states))
        if prepared is None or x.is_neg() or (x.requires_grad and torch.is_grad_enabled()):
            return None
        if states and (
            True in map(Tensor.is_neg, states)
            or not fast_path.are_contiguous(states)
            or context.is_differentiated(states)
        ):
            return None
        try:
            return prepared(x, states)
        except NoMemoryError:
            return None

    def remember(self, x: Tensor, states: Sequence[Tensor]) -> None:
        """Prepare the calls that look like one that went well."""
        tensors = (x, *states)
        if x.stride(-1) != 1 or 0 in x.shape or not context.is_free(tensors):
            return
        threads = pool.usable(torch.get_num_threads())
        key = key_of(self.batch_first, threads, x, states)
        if key in self._prepared:  # the call went the other way for what is not in the key
            return
        prepared = kernels().Prepared(self.form(), self.panels, x, self.batch_first, not states, threads)
        fast_path.keep(self._prepared, key, prepared, MOST)

    def run(self, input, hx, lengths, resets, all_states, signals=()):
        """Check a call and run it. Initial states and signals are in the order and layout of loops."""
        if self.training:
            raise RuntimeError(f"{self.type_name()}: frozen weights are for inference; call eval()")
        packed = isinstance(input, PackedSequence)
        data = input.data if packed else input
        states = tuple(hx) if isinstance(hx, (tuple, list)) else () if hx is None else (hx,)
        self.refuse_gradient((data, *states, *signals))
        options = self.options()
        data = validate.dense(data)
        if _torch.is_any_autocast_enabled():
            data, *others = map(in_float32, (data, *states, *signals))
            hx = hx if hx is None else others[0] if isinstance(hx, Tensor) else tuple(others[: len(states)])
            signals = tuple(others[len(states) :])
        elif data.dtype != torch.float32:
            raise ValueError(
                f"{self.type_name()}: expected an input of torch.float32, as frozen weights, got {data.dtype}; "
                "convert it by input.float()"
            )
        input = input._replace(data=data) if packed else data
        if not torch.compiler.is_compiling() and _torch.count_dispatch_modes() > 0:
            flops.register()
        if self.reason_for_plain(data) is not None:
            return self.run_plain(options, input, hx, lengths, resets, all_states, signals)
        weights = self.like_weights()
        if packed:
            return functional.run_packed(
                options, input, weights, hx, lengths, resets, all_states, signals, self.run_layers
            )
        call, batched = functional.checked(options, input, weights, hx, resets, all_states, signals)
        outcome = functional.run_rows(call, lengths, batched, self.run_layers)
        plain = lengths is None and resets is None and not all_states
        if plain and not torch.compiler.is_compiling() and self.form().stacks:
            self.remember(input, (() if hx is None else self.states_of(hx)) or ())
        return functional.present(options, outcome, batched, all_states)

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
            self.cell_name, index(self.num_layers), self.bidirectional, self.batch_first,
            bias=bool(self.bias), projected=index(self.proj_size) > 0,
        )  # fmt: skip

    def like_weights(self) -> list[Any]:
        """Return what checks ask of the weights, in the order of `torch.nn.LSTM._flat_weights`."""
        shapes = (shape for each in weight_shapes(self) for shape in each.values())
        return [Shaped(shape, torch.float32, torch.device("cpu")) for shape in shapes]

    def reason_for_plain(self, data: Tensor) -> str | None:
        """Say why a call runs on dequantised weights, or None where the kernels run it."""
        if torch.compiler.is_compiling():
            if operators.in_onnx_export():
                return "ONNX has operators over float32 weights"
        elif functional.is_traced():
            return "torch.jit.trace records torch's operators"
        if data.device.type != "cpu":
            return f"frozen weights are packed for the CPU, not for {data.device.type}"
        if asked_for() not in KERNELS:
            return f"the backend {asked_for()!r} was asked for by name"
        if self.__dict__.get("_plain") is not None:
            return self.obstacle() or "there was no kernel when the layer was frozen"
        return None

    def stepper(self, x: Tensor, output: Tensor, states: Sequence[Tensor]) -> Callable[[], None]:
        """Return a function that takes a step over these tensors: x [1, B, I], output [B, P], states in place."""
        prepared = kernels().Prepared(self.form(), self.panels, x, False, False, 1)
        return prepared.stepper(x, output, states, states)

    def run_plain(self, options, input, hx, lengths, resets, all_states, signals=()):
        """Run on float32 weights, as a layer that is not frozen."""
        data = input.data if isinstance(input, PackedSequence) else input
        if _torch.is_exporting():
            weights = self.dequantised(self.constants(wide=True))
        elif functional.is_traced():
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", torch.jit.TracerWarning)  # that they are constants of the trace
                weights = self.dequantised()
        else:
            if data.device not in self._elsewhere:
                self._elsewhere[data.device] = [each.to(data.device) for each in self.dequantised()]
            weights = self._elsewhere[data.device]
        with torch.no_grad():
            return functional.recurrent(
                options, input, weights, hx, lengths=lengths, resets=resets, all_states=all_states, signals=signals
            )

    def run_layers(self, call: Call) -> Outcome:
        """Call the operator for each layer."""
        if _torch.is_any_autocast_enabled():
            validate.one_kind(call)
        options, all_states, signals = call.options, call.all_states, list(call.signals)
        forms, (held, processor), shown = self._forms, self.held(), cell_named(options.cell).output

        def run(n, x, hx, _):
            form = forms[n]
            wanted = shown > 0 or (all_states and n == len(forms) - 1)
            results = torch.ops.rnnfast.frozen_layer(
                form.cell,
                form.weights,
                form.inputs,
                form.hidden,
                form.width,
                form.projected,
                form.biased,
                options.reverse(),
                wanted,
                processor,
                x,
                list(hx),
                held[n],
                call.batch_sizes,
                call.resets,
                signals,
            )
            states, finals = results[: len(hx)], results[len(hx) :]
            return states[shown].flatten(-2), finals, states

        output, finals, states = through_layers(options, call.x, call.hx, (), run)
        if not all_states:
            return Outcome(output, finals, ())
        flat = (output.clone() if n == shown else each.flatten(-2) for n, each in enumerate(states))
        return Outcome(output, finals, tuple(flat))

    def held(self) -> tuple[list[list[Tensor]], str]:
        """Return what the operator takes of each layer: panels and their layout's name, or in an export the weights."""
        if _torch.is_exporting() and not torch.compiler.is_dynamo_compiling():
            directions, names = 2 if self.bidirectional else 1, self.weight_names()
            flat = [[named[name] for name in names] for named in self.constants()]
            return [list(chain.from_iterable(flat[n : n + directions])) for n in range(0, len(flat), directions)], ""
        return [[self.panels[a:b]] for a, b in self._offsets], self._panel_layout  # type: ignore[index]


def in_float32(tensor: Tensor) -> Tensor:
    """Make a tensor of half precision float32: what autocast gives."""
    return tensor.float() if tensor.dtype in HALVES else tensor
