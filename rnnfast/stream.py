"""`Stream`: one step at a time, with the state, the packed weights and every buffer kept from call to call."""

from collections.abc import Callable

import torch
from torch import Tensor

from rnnfast.backends.choice import backend_of, load
from rnnfast.functional import initial_states, single
from rnnfast.modules import Recurrent


class Stream:
    """Step through time with a module's weights: for decoding, control and sound, where a call has one step.

    The results are bitwise those of calling the module with the carried state. Calls allocate nothing: the returned
    tensor is the stream's own, and the next call overwrites it. No gradients. One stream belongs to one thread.

        stream = rnnfast.Stream(module)
        for x in sound:              # x: [B, I]
            y = stream(x)            # [B, P]

    Args:
        module: an RNN, LSTM or GRU of rnnfast, of one direction.
        batch: rows B of each step. Default 1.

    Raises:
        TypeError: `module` is none of rnnfast's. ValueError: it is bidirectional.
    """

    def __init__(self, module: Recurrent, batch: int = 1):
        if not isinstance(module, Recurrent):
            raise TypeError(f"Stream: expected an rnnfast RNN, LSTM or GRU, got {type(module).__name__}")
        if module.bidirectional:
            raise ValueError("Stream: expected a module of one direction, got a bidirectional one")
        self.module = module
        weights = module._flat_weights
        self.input = weights[0].new_empty(1, batch, module.input_size)
        states = initial_states(module.options(), None, self.input, batch, weights)
        self.states = tuple(s.clone() for s in states)  # [layers, B, P or H] each
        self.refresh()

    @torch.no_grad()
    def refresh(self) -> None:
        """Read the module's weights again, after they have changed. The state stays."""
        options = self.module.options()
        self.weights = [w.detach().contiguous() for w in self.module._flat_weights]
        self.backend = backend_of(options.cell, self.input.device, self.input.dtype, False)
        if self.backend == "numba":
            self.step = self.lay_out(options)
        else:
            self.step = self.call_module

    def lay_out(self, options) -> Callable[[], None]:
        """Have the backend prepare a step, whose final states are written where its initial states are read."""
        backend, x = load("numba"), self.input
        shapes = [w.shape for w in self.weights]
        layers = options.num_layers
        sizes = backend.Sizes(
            options.cell, x.dtype, x.shape, x.stride(), layers, 1, shapes, zero=False, threads=1, repeated=True
        )
        output = x.new_empty(1, x.shape[1], sizes.width)
        self.output = output[0]
        return backend.Stack(sizes).stepper(x, output, self.states, self.states, self.weights)

    def call_module(self) -> None:
        """Step by an ordinary call, on backends and dtypes that have no prepared one."""
        x = self.input.transpose(0, 1) if self.module.batch_first else self.input
        training, self.module.training = self.module.training, False
        try:
            output, finals = self.module(x, single(self.states))
        finally:
            self.module.training = training
        self.output = output.select(1 if self.module.batch_first else 0, 0)
        self.states = finals if isinstance(finals, tuple) else (finals,)

    @torch.no_grad()
    def __call__(self, x: Tensor) -> Tensor:
        """Take one step.

        Args:
            x: [B, I], or [I] where B is 1.

        Returns:
            The output of the last layer, [B, P], which the next call overwrites.

        Raises:
            ValueError: x has another shape.
        """
        if x.shape != self.input.shape[1:] and (
            x.dim() != 1 or x.shape != self.input.shape[2:] or len(self.output) != 1
        ):
            raise ValueError(f"Stream: expected input of shape {list(self.input.shape[1:])}, got {list(x.shape)}")
        self.input.copy_(x)
        self.step()
        return self.output

    @property
    def state(self) -> Tensor | tuple[Tensor, ...]:
        """A copy of the state, as the module returns it: [layers, B, P], for an LSTM (h, c)."""
        return single(tuple(s.clone() for s in self.states))

    @state.setter
    @torch.no_grad()
    def state(self, hx) -> None:
        for own, given in zip(self.states, (hx,) if isinstance(hx, Tensor) else hx, strict=True):
            if own.shape != given.shape:
                raise ValueError(f"Stream: expected a state of shape {list(own.shape)}, got {list(given.shape)}")
            own.copy_(given)

    @torch.no_grad()
    def reset(self, rows: Tensor | None = None) -> None:
        """Zero the state, of the rows that a bool tensor [B] marks or of all."""
        for own in self.states:
            if rows is None:
                own.zero_()
            else:
                own[:, rows] = 0
