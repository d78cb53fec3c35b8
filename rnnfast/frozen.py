"""Recurrent layers whose weights are frozen: packed once, for inference on the CPU. `rnnfast.freeze` makes them.

A frozen layer holds its weights once, as panels for this machine's processor. `state_dict`, pickle and copies have
them as tensors that mean the same anywhere: for int8 `weight_ih_l0` [G*H, I] and `weight_ih_l0_scale` [G*H].
"""

from collections.abc import Callable, Iterator, Sequence
from itertools import chain, pairwise, product
from typing import Any, NamedTuple

import torch
from rnnfast_kernels.cells import CELLS
from rnnfast_kernels.cpu.runtime import pool
from torch import Tensor, nn
from torch.autograd.graph import increment_version
from torch.nn.utils.rnn import PackedSequence

from rnnfast import _torch, context, functional, operators, validate
from rnnfast.backends.dispatch import setting
from rnnfast.frozen_ops import kernels, meaning_names
from rnnfast.layers import through_layers
from rnnfast.modules import CELL_OF_MODE
from rnnfast.spec import Options

# Prepared calls that a layer keeps; forgotten when there are more.
MOST = 64
NONE: tuple[Tensor, ...] = ()
# Settings under which the kernels run a layer.
KERNELS = ("auto", "numba")
# Attributes that `hold` makes.
NOT_IN_STATE = ("panels", "_array", "_plain", "_prepared", "_elsewhere", "_forms", "_places", "_processor")
FIELDS = {"w_ih": "weight_ih", "w_hh": "weight_hh", "w_hr": "weight_hr", "b_ih": "bias_ih", "b_hh": "bias_hh"}


class Shaped(NamedTuple):
    """What checks ask of a weight."""

    shape: torch.Size
    dtype: torch.dtype
    device: torch.device


def key_of(threads: int, x: Tensor, states: Sequence[Tensor]) -> tuple:
    """Return all that a prepared call depends on, but addresses."""
    key = threads, x.shape, x.stride(), x.dtype, x.is_cpu
    return (*key, *[(each.shape, each.dtype, each.is_cpu) for each in states]) if states else key


@_torch.constant_in_graphs
def asked_for() -> str:
    """Return the backend asked for here. A compiled graph keeps the answer it was traced with."""
    return setting()


class Frozen(nn.Module):
    """A frozen RNN, LSTM or GRU: `forward` is that of `rnnfast.LSTM`, for inference in float32.

    It has no parameters and no buffers. Reading a weight by its name gives a copy. Moved to another device it runs on
    weights made float32 again.
    """

    mode: str
    input_size: int
    hidden_size: int
    num_layers: int
    bias: bool
    batch_first: bool
    dropout: float
    bidirectional: bool
    proj_size: int
    weights_format: str
    panels: Tensor | None

    def extra_repr(self) -> str:
        told = nn.RNNBase.extra_repr(self)  # type: ignore[arg-type]
        return f"{told}, weights={self.weights_format}"

    def type_name(self) -> str:
        """Return what the layer is called."""
        return f"Frozen{self.mode.split('_')[0]}"

    def _get_name(self) -> str:
        return self.type_name()

    def hold(self, weights: list[dict[str, Tensor]]) -> None:
        """Pack weights, given for each layer and direction by the names of `meaning_names`."""
        object.__setattr__(self, "_prepared", {})
        object.__setattr__(self, "_elsewhere", {})
        problem = self.obstacle()
        object.__setattr__(self, "_plain", weights if problem else None)
        panels = None if problem else kernels().pack(self.form(), weights)
        object.__setattr__(self, "_array", None if panels is None else panels.numpy())
        # No buffer: it stays on the CPU, in uint8, whatever the model is moved to, and out of exported programs.
        object.__setattr__(self, "panels", panels)
        if panels is not None:
            form = self.form()
            object.__setattr__(self, "_forms", tuple(form.each()))
            object.__setattr__(self, "_places", tuple(pairwise(kernels().offsets(form))))
            object.__setattr__(self, "_processor", kernels().processor_of(form))

    def obstacle(self) -> str | None:
        """Say why there are no kernels for this layer, or None where there are."""
        try:
            kernels().kernel_of(self.form())
        except Exception as error:  # whatever a library raises that cannot be loaded
            return f"the kernel cannot be compiled or loaded ({type(error).__name__}: {error})"
        return None

    def form(self):
        """Describe the layers to the backend."""
        width = self.proj_size or self.hidden_size
        return kernels().Form(
            CELL_OF_MODE[self.mode],
            self.weights_format,
            self.num_layers,
            2 if self.bidirectional else 1,
            self.input_size,
            self.hidden_size,
            width,
            self.proj_size > 0,
            bool(self.bias),
        )

    def meaning(self) -> list[dict[str, Tensor]]:
        """Return the weights of each layer and direction, as `hold` was given them."""
        if self.__dict__.get("_plain") is not None:
            return self._plain
        return kernels().unpack(self.form(), self._array)

    def names(self) -> Iterator[tuple[int, str, str]]:
        """Yield, for each tensor of `state_dict`, its place in `meaning`, its name there and its full name."""
        directions = 2 if self.bidirectional else 1
        own = meaning_names(self.weights_format, self.proj_size > 0, bool(self.bias))
        for layer, direction in product(range(self.num_layers), range(directions)):
            for name in own:
                field, scale = name.removesuffix("_scale"), "_scale" if name.endswith("_scale") else ""
                full = f"{FIELDS[field]}_l{layer}{'_reverse' * direction}{scale}"
                yield layer * directions + direction, name, full

    def tensors(self) -> dict[str, Tensor]:
        """Return copies of all tensors of `state_dict`. They refuse to be changed in place."""
        meaning = self.meaning()
        with torch.inference_mode():
            return {full: meaning[place][name].clone() for place, name, full in self.names()}

    def __getattr__(self, name: str) -> Any:
        if name.startswith(("weight_", "bias_")) and "weights_format" in self.__dict__:
            tensors = self.tensors()
            if name in tensors:
                return tensors[name]
        return super().__getattr__(name)

    def __setattr__(self, name: str, value: Any) -> None:
        if name.startswith(("weight_", "bias_")) or name == "weights_format":
            raise RuntimeError(f"{self.type_name()}: {name} is frozen; change the layer before rnnfast.freeze")
        super().__setattr__(name, value)

    def _save_to_state_dict(self, destination, prefix, keep_vars) -> None:
        _torch.save_registered(self, destination, prefix, keep_vars)
        meaning = self.meaning()
        for place, name, full in self.names():
            destination[prefix + full] = meaning[place][name]

    def _load_from_state_dict(
        self, state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
    ) -> None:
        weights = [dict(named) for named in self.meaning()]
        known, errors = set(), len(error_msgs)
        for place, name, full in self.names():
            known.add(prefix + full)
            given, own = state_dict.get(prefix + full), weights[place][name]
            if given is None:
                missing_keys.append(prefix + full)
            elif given.shape != own.shape or given.dtype != own.dtype:
                error_msgs.append(
                    f"{prefix}{full}: expected {own.dtype} of shape {list(own.shape)}, for weights frozen in "
                    f"{self.weights_format}, got {given.dtype} of shape {list(given.shape)}"
                )
            elif given.is_floating_point() and not given.isfinite().all():
                error_msgs.append(f"{prefix}{full}: expected finite numbers, got NaN or infinity")
            else:
                weights[place][name] = given.detach().cpu()
        for name, buffer in self.named_buffers(recurse=False):
            known.add(prefix + name)
            if prefix + name in state_dict:
                buffer.copy_(state_dict[prefix + name])
        mine = [key for key in state_dict if key.startswith(prefix) and "." not in key[len(prefix) :]]
        unexpected_keys += [key for key in mine if strict and key not in known]
        if len(error_msgs) == errors:
            self.hold(weights)

    def __getstate__(self) -> dict[str, Any]:
        state = self.__dict__.copy()
        for name in NOT_IN_STATE:
            state.pop(name, None)
        state["_meaning"] = [{name: each.clone() for name, each in named.items()} for named in self.meaning()]
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        weights = state.pop("_meaning")
        super().__setstate__(state)
        self.hold(weights)

    def flatten_parameters(self) -> None:
        """Do nothing, for callers of torch's modules."""

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
        states = NONE if hx is None else tuple(hx) if self.mode == "LSTM" else (hx,)
        tensors = (x, *states) if states else (x,)
        if not context.is_free(tensors) or setting() not in KERNELS:
            return None
        threads = torch.get_num_threads()
        if threads > pool.known_cores:
            threads = pool.usable(threads)
        prepared = self._prepared.get(key_of(threads, x, states))
        if prepared is None or x.is_neg() or (x.requires_grad and torch.is_grad_enabled()):
            return None
        for each in states:
            if each.is_neg() or not each.is_contiguous() or (each.requires_grad and torch.is_grad_enabled()):
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
        self._prepared[key_of(threads, x, states)] = PreparedCall(self, x, not states, threads)

    def run(self, input, hx, lengths, resets, all_states):
        """Check a call and run it."""
        packed = isinstance(input, PackedSequence)
        data = input.data if packed else input
        self.refuse_gradient((data, *(hx if isinstance(hx, tuple | list) else () if hx is None else (hx,))))
        options = self.options()
        if _torch.is_any_autocast_enabled() and data.dtype in (torch.bfloat16, torch.float16):
            data = data.float()
            input = input._replace(data=data) if packed else data
        reason = self.reason_for_plain(data)
        if reason is not None:
            return self.run_plain(options, input, hx, lengths, resets, all_states)
        if packed:
            return self.run_packed(options, input, hx, lengths, resets, all_states)
        return self.run_dense(options, input, hx, lengths, resets, all_states)

    def refuse_gradient(self, tensors) -> None:
        """Raise RuntimeError where a gradient would be taken through the layer."""
        if torch.is_grad_enabled() and any(isinstance(each, Tensor) and each.requires_grad for each in tensors):
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

    def dequantised(self) -> list[Tensor]:
        """Return float32 weights in the order of `torch.nn.LSTM._flat_weights`."""
        found = []
        for named in self.meaning():
            for name in ("w_ih", "w_hh", "b_ih", "b_hh", "w_hr"):
                if name in named:
                    scale = named.get(f"{name}_scale")
                    found.append(named[name].float() * (1.0 if scale is None else scale[:, None]))
        return found

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
