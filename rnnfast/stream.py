"""`Stream`: one step at a time, with the state, the packed weights and every buffer kept from call to call."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from rnnfast import fast_path, validate
from rnnfast.backends.dispatch import backend_of, load, records
from rnnfast.call import Call
from rnnfast.frozen import Frozen
from rnnfast.functional import initial_states, recurrent, single
from rnnfast.modules import RNNBase
from rnnfast.recurrent import Recurrent


class Stream:
    """Step through time with a module's weights: for decoding, control and sound, where a call has one step.

    In float32 and float64 the results are bitwise those of calling the module once over all steps. In float16 and
    bfloat16 they are bitwise those of calling it step by step: the state is rounded to that dtype after every step,
    where one call keeps it in float32 from its first step to its last.

    Steps allocate nothing: the returned tensor is the stream's own, and the next step overwrites it, which autograd
    sees as it sees any operation in place. No gradients. One stream belongs to one thread.

    Weights are copied when the stream is made, and by `refresh`; what happens to the module's in between changes
    nothing. `copy.copy`, `copy.deepcopy` and `pickle` give a stream of its own state and buffers, which reads the
    weights of its module again: of the same module with `copy.copy`, else of a copy.

        stream = rnnfast.Stream(module)
        for x in sound:              # x: [B, I]
            y = stream(x)            # [B, P]

    Args:
        module: an RNN, LSTM or GRU of rnnfast, of one direction; also a frozen one, or an `rnnfast.Recurrent` whose
            cell has no signals.
        batch: rows B of each step. Default 1.

    Raises:
        TypeError: `module` is none of rnnfast's.
        ValueError: it is bidirectional, or its cell has signals; or `batch` is no positive integer.
    """

    def __init__(self, module: RNNBase | Frozen | Recurrent, batch: int = 1) -> None:
        if not isinstance(module, (RNNBase, Frozen, Recurrent)):
            raise TypeError(f"Stream: expected an rnnfast RNN, LSTM or GRU, got {type(module).__name__}")
        # Places of the states in the order of the cell's declaration.
        self.places: tuple[int, ...] | None = None
        if isinstance(module, Recurrent):
            if module.cell.signals:
                raise ValueError(f"Stream: expected a cell without signals, got {module.cell.__name__}")
            self.places = module.cell.places
        if not isinstance(batch, int) or batch < 1:
            raise ValueError(f"Stream: expected batch to be a positive integer, got {batch!r}")
        self.module, self.batch = module, batch
        self.states: tuple[Tensor, ...] = ()  # [layers, B, P or H] each
        self.refresh()

    def __getstate__(self) -> dict[str, Any]:
        return {"module": self.module, "batch": self.batch, "states": self.states, "output": self.output}

    def __setstate__(self, kept: dict[str, Any]) -> None:
        self.__init__(kept["module"], kept["batch"])  # type: ignore[misc]
        self.states = kept["states"]
        self.refresh()
        with torch.no_grad():
            if self.output.shape == kept["output"].shape:
                self.output.copy_(kept["output"])

    def refresh(self) -> None:
        """Read the module's weights again, after they have changed.

        The state stays. It is converted where the module has another dtype or device, and zero where its shape is
        another one.

        Raises:
            ValueError: the module is bidirectional. RuntimeError: its weights do not fit together.
        """
        if self.module.bidirectional:
            raise ValueError("Stream: expected a module of one direction, got a bidirectional one")
        # What is kept must serve inside of inference mode and outside, wherever the stream is made.
        with torch.inference_mode(False), torch.no_grad():
            options = self.module.options()._replace(batch_first=False, training=False)
            frozen = self.module if isinstance(self.module, Frozen) else None
            weights = frozen.like_weights() if frozen else self.module.weights()
            validate.are_tensors(weights)
            weights = weights if frozen else [as_own(weight) for weight in weights]
            like = weights[0]
            x = torch.zeros(1, self.batch, like.shape[-1], dtype=like.dtype, device=like.device)
            validate.sizes(options, x, self.batch, None, weights)
            fresh = initial_states(options, None, x, self.batch, weights)
            validate.one_kind(Call(options, x, fresh, weights))
            states = tuple(own.clone() for own in fresh)
            if [own.shape for own in states] == [old.shape for old in self.states]:
                for own, old in zip(states, self.states, strict=True):
                    own.copy_(old)
            self.options, self.weights, self.input, self.states = options, weights, x, states
            self.expected = x.shape[1:], x.dtype, x.device
            self.output = x.new_zeros(self.batch, options.width(weights))
            if frozen and frozen.reason_for_plain(x) is None:
                self.backend, self.step = "numba", frozen.stepper(x, self.output, self.states)
                return
            if frozen:
                self.weights = frozen.dequantised()
            self.backend = backend_of(options.cell, x.device, x.dtype, False)
            recorded = records(self.backend) and fast_path.can_stack(options)
            self.step = self.lay_out(options) if recorded else self.call_layers

    def lay_out(self, options) -> Callable[[], None]:
        """Have the backend prepare a step, whose final states are written where its initial states are read."""
        x, output = self.input, self.output
        signatures = fast_path.signatures_of(options, x, self.weights, zero=False, threads=1)
        stack = load(self.backend).stack(tuple(each._replace(repeated=True) for each in signatures))
        weights = fast_path.stacked_weights(options, self.weights)
        return stack.repeat((x, *self.states, *weights), (output[None], *self.states))

    def call_layers(self) -> None:
        """Step by an ordinary call, on backends and dtypes that have no prepared one."""
        with torch.inference_mode(False), torch.no_grad():
            output, finals = recurrent(self.options, self.input, self.weights, single(self.states))
            self.output.copy_(output[0])
            for own, final in zip(self.states, finals if isinstance(finals, tuple) else (finals,), strict=True):
                own.copy_(final)

    @torch.no_grad()
    def __call__(self, x: Tensor) -> Tensor:
        """Take one step.

        Args:
            x: [B, I], or [I] where B is 1, in the dtype of the weights; inside `torch.autocast` in any floating dtype.

        Returns:
            The output of the last layer, [B, P], which the next call overwrites.

        Raises:
            TypeError: x is no tensor. ValueError: it has another shape, dtype or device.
        """
        if not isinstance(x, Tensor):
            raise TypeError(f"Stream: expected an input of type Tensor, got {type(x).__name__}")
        shape, dtype, device = self.expected
        if x.shape != shape and (x.shape != shape[1:] or len(self.output) != 1):
            raise ValueError(f"Stream: expected input of shape {list(shape)}, got {list(x.shape)}")
        if (x.dtype != dtype and not self.is_converted(x)) or x.device != device:
            raise ValueError(f"Stream: expected input of {dtype} on {device}, got {x.dtype} on {x.device}")
        try:
            self.input.copy_(x)
        except RuntimeError:
            if x.layout is torch.strided:
                raise
            self.input.copy_(x.to_dense())
        self.step()
        increment_version(self.output)  # kernels write where autograd does not see it
        return self.output

    def is_converted(self, x: Tensor) -> bool:
        """Say whether an input of another dtype is taken: where autocast would convert it."""
        return validate.is_cast(x.dtype) and validate.is_autocast_on(x.device.type)

    @property
    def in_order(self) -> tuple[Tensor, ...]:
        """The states themselves, in the order of the module's."""
        return self.states if self.places is None else tuple(self.states[n] for n in self.places)

    @property
    def state(self) -> Tensor | tuple[Tensor, ...]:
        """A copy of the state, as the module returns it: [layers, B, P], for an LSTM (h, c). Assigning to it sets it.

        Raises:
            TypeError: not tensors. ValueError: another number, shape, dtype or device than the stream's. Nothing is
                changed then.
        """
        return single(tuple(s.clone() for s in self.in_order))

    @state.setter
    @torch.no_grad()
    def state(self, hx: Tensor | tuple[Tensor, ...]) -> None:
        if not isinstance(hx, (Tensor, tuple, list)):
            raise TypeError(f"Stream: expected a state of type Tensor, got {type(hx).__name__}")
        given = tuple(hx) if isinstance(hx, (tuple, list)) else (hx,)
        if len(given) != len(self.states):
            raise ValueError(f"Stream: expected {len(self.states)} state tensor(s), got {len(given)}")
        for own, new in zip(self.in_order, given, strict=True):
            if not isinstance(new, Tensor):
                raise TypeError(f"Stream: expected a state of type Tensor, got {type(new).__name__}")
            if own.shape != new.shape:
                raise ValueError(f"Stream: expected a state of shape {list(own.shape)}, got {list(new.shape)}")
            if own.dtype != new.dtype or own.device != new.device:
                raise ValueError(
                    f"Stream: expected a state of {own.dtype} on {own.device}, got {new.dtype} on {new.device}"
                )
        for own, new in zip(self.in_order, given, strict=True):
            own.copy_(new)

    @torch.no_grad()
    def reset(self, rows: Tensor | None = None) -> None:
        """Zero the state.

        Args:
            rows: bool tensor [B], the rows to zero. Default: all.

        Raises:
            TypeError, ValueError: `rows` is something else, or has another shape.
        """
        if rows is not None:
            if not isinstance(rows, Tensor) or rows.dtype != torch.bool:
                got = f"dtype {rows.dtype}" if isinstance(rows, Tensor) else type(rows).__name__
                raise TypeError(f"Stream: expected rows to be a bool tensor, got {got}")
            if rows.shape != (self.batch,):
                raise ValueError(f"Stream: expected rows of shape [{self.batch}], got {list(rows.shape)}")
        for own in self.states:
            own[:, rows] = 0  # None stands for all


def as_own(weight: Tensor) -> Tensor:
    """Return a dense, contiguous copy of a weight."""
    dense = weight.detach() if weight.layout == torch.strided else weight.detach().to_dense()
    return dense.clone(memory_format=torch.contiguous_format).resolve_neg()
