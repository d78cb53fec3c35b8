"""`RNNCell`, `LSTMCell` and `GRUCell`: one time step, as drop-in replacements for the modules in `torch.nn`.

They are torch's modules with another `forward`: a step is a layer over a sequence of one step, on the same kernels.
Where the choice of a backend falls on torch, it is torch's own step.
"""

from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor, nn
from torch.fx import Proxy
from torch.types import Device

from rnnfast import _torch
from rnnfast.backends.dispatch import steps_by_torch
from rnnfast.functional import is_traced, recurrent, single
from rnnfast.modules import leaf, no_script
from rnnfast.spec import Options
from rnnfast.validate import dense, several_states

if TYPE_CHECKING:
    from rnnfast.signatures import same_as


class RNNCellBase(nn.RNNCellBase):
    """What the three modules share: checks in torch's words, and the call."""

    # The number of state tensors, and what torch calls each of them.
    states: tuple[str, ...] = ("hidden",)

    # The cell's name in the table of equations.
    equations: str

    def is_for_torch(self, input: Tensor) -> bool:
        """Say whether torch is to take the step: by choice, or because it traces, or there is nothing to compute."""
        if not self.hidden_size or not self.input_size or not isinstance(input, Tensor) or is_traced():
            return True
        return steps_by_torch(self.equations, input.device, input.dtype)

    def extra_repr(self) -> str:
        """Show torch's text, and that the cell is rnnfast's."""
        return f"{super().extra_repr()}, rnnfast"

    def __prepare_scriptable__(self):
        raise TypeError(no_script(self))

    def step(self, input: Tensor, hx: tuple[Tensor, ...] | None) -> tuple[Tensor, ...]:
        """Take one step: input [B, I] or [I], states [B, H] or [H], zero if None."""
        self.check_dims(input, hx)
        batched, input, hx = input.dim() == 2, dense(input), hx and tuple([dense(state) for state in hx])
        x = input if batched else input.unsqueeze(0)
        if hx is not None and not batched:
            hx = tuple(state.unsqueeze(0) for state in hx)
        present = [self.weight_ih, self.weight_hh]
        self.check_sizes(x, hx or (), present)
        b_ih, b_hh = self.bias_ih, self.bias_hh
        if b_ih is not None and b_hh is not None:
            present += [b_ih, b_hh]
        elif b_ih is not None:
            present += [b_ih, torch.zeros_like(b_ih)]
        elif b_hh is not None:
            present += [torch.zeros_like(b_hh), b_hh]
        initial = None if hx is None else single(tuple([state.unsqueeze(0) for state in hx]))  # [1, B, H] each
        _, finals = recurrent(Options(self.equations, bias=len(present) > 2), x.unsqueeze(0), present, initial)
        finals = finals if isinstance(finals, tuple) else (finals,)
        if torch.compiler.is_dynamo_compiling() or _torch.innermost_transform() is not None:
            return tuple([state.squeeze(0) if batched else state[0, 0] for state in finals])
        # Not as views, which torch does not detach in place.
        return tuple([state.squeeze_(0) if batched else state.squeeze_(0).squeeze_(0) for state in finals])

    def check_dims(self, input: Tensor, hx: tuple[Tensor, ...] | None) -> None:
        """Refuse, as torch does, tensors of more than two dimensions or none."""
        name = type(self).__name__
        named = () if hx is None else zip(self.states, hx, strict=True)
        for what, tensor in (("input", input), *named):
            if tensor.dim() not in (1, 2):
                raise ValueError(f"{name}: Expected {what} to be 1D or 2D, got {tensor.dim()}D instead")

    def check_sizes(self, x: Tensor, hx: tuple[Tensor, ...], weights: list[Tensor]) -> None:
        """Refuse, as torch does, sizes and dtypes that do not fit together: sizes first."""
        for n, weight in enumerate(weights):
            if not isinstance(weight, Tensor):
                what, got = f"'{('w_ih', 'w_hh')[n]}' (position {3 + n})", type(weight).__name__
                raise TypeError(f"{self.equations}_cell(): argument {what} must be Tensor, not {got}")
        inputs, hidden = weights[0].shape[-1], weights[1].shape[-1]
        if x.shape[1] != inputs:
            raise RuntimeError(f"input has inconsistent input_size: got {x.shape[1]} expected {inputs}")
        shapes = [(*state.shape,) for state in hx] or [(x.shape[0], self.hidden_size)]
        for n, shape in enumerate(shapes):
            if shape[0] != x.shape[0]:
                raise RuntimeError(f"Input batch size {x.shape[0]} doesn't match hidden{n} batch size {shape[0]}")
            if shape[1] != hidden:
                raise RuntimeError(f"hidden{n} has inconsistent hidden_size: got {shape[1]}, expected {hidden}")
        if x.dtype != weights[0].dtype and not _torch.is_any_autocast_enabled():
            raise RuntimeError(f"input and weights must have the same dtype, got {x.dtype} and {weights[0].dtype}")


class RNNCell(RNNCellBase, nn.RNNCell):
    """One step of an Elman network, h' = tanh(W_ih x + b_ih + W_hh h + b_hh); takes the arguments of nn.RNNCell.

    Args:
        input_size: width I of the input.
        hidden_size: width H of the state.
        bias: whether there are biases. Default True.
        nonlinearity: "tanh" or "relu". Default "tanh".
        device, dtype: of the parameters. Default: torch's.
    """

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        bias: bool = True,
        nonlinearity: Literal["tanh", "relu"] = "tanh",
        device: Device = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(input_size, hidden_size, bias, nonlinearity, device, dtype)

    @property
    def equations(self) -> str:  # type: ignore[override]
        """Return the name that goes with the nonlinearity."""
        return f"rnn_{self.nonlinearity}"

    def forward(self, input: Tensor, hx: Tensor | None = None) -> Tensor:
        """Take one step.

        Args:
            input: [B, I], or [I].
            hx: the state [B, H], or [H]. Zero if None.

        Returns:
            The new state, [B, H] or [H].

        Raises:
            ValueError, RuntimeError: what torch raises for the same mistake.
        """
        if isinstance(input, Proxy):
            return leaf(self, input, hx)
        if self.nonlinearity not in ("tanh", "relu"):
            raise RuntimeError(f"Unknown nonlinearity: {self.nonlinearity}")
        if self.is_for_torch(input):
            return super().forward(input, hx)
        return self.step(input, None if hx is None else (hx,))[0]

    if TYPE_CHECKING:

        @same_as(forward)
        def __call__(self) -> None: ...


class LSTMCell(RNNCellBase, nn.LSTMCell):
    """One step of a long short-term memory, see `rnnfast.LSTM`; takes the arguments of nn.LSTMCell.

    Args:
        input_size: width I of the input.
        hidden_size: width H of the states h and c.
        bias: whether there are biases. Default True.
        device, dtype: of the parameters. Default: torch's.
    """

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        bias: bool = True,
        device: Device = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(input_size, hidden_size, bias, device, dtype)

    equations = "lstm"
    states = ("hx[0]", "hx[1]")

    def forward(self, input: Tensor, hx: tuple[Tensor, Tensor] | None = None) -> tuple[Tensor, Tensor]:
        """Take one step.

        Args:
            input: [B, I], or [I].
            hx: the states (h, c), each [B, H], or [H]. Zero if None.

        Returns:
            The new states (h, c), each [B, H], or [H].

        Raises:
            ValueError, RuntimeError: what torch raises for the same mistake.
        """
        if isinstance(input, Proxy):
            return leaf(self, input, hx)
        if self.is_for_torch(input) or not (hx is None or isinstance(hx, (tuple, list))):
            return super().forward(input, hx)
        if hx is not None:
            several_states("lstm_cell", hx, 2)
            hx = tuple(hx)  # type: ignore[assignment]
        h, c = self.step(input, hx)
        return h, c

    if TYPE_CHECKING:

        @same_as(forward)
        def __call__(self) -> None: ...


class GRUCell(RNNCellBase, nn.GRUCell):
    """One step of a gated recurrent unit, see `rnnfast.GRU`; takes the arguments of nn.GRUCell.

    Args:
        input_size: width I of the input.
        hidden_size: width H of the state.
        bias: whether there are biases. Default True.
        device, dtype: of the parameters. Default: torch's.
    """

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        bias: bool = True,
        device: Device = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(input_size, hidden_size, bias, device, dtype)

    equations = "gru"

    def forward(self, input: Tensor, hx: Tensor | None = None) -> Tensor:
        """Take one step.

        Args:
            input: [B, I], or [I].
            hx: the state [B, H], or [H]. Zero if None.

        Returns:
            The new state, [B, H] or [H].

        Raises:
            ValueError, RuntimeError: what torch raises for the same mistake.
        """
        if isinstance(input, Proxy):
            return leaf(self, input, hx)
        if self.is_for_torch(input):
            return super().forward(input, hx)
        return self.step(input, None if hx is None else (hx,))[0]

    if TYPE_CHECKING:

        @same_as(forward)
        def __call__(self) -> None: ...
