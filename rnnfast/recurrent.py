"""`Recurrent`: a layer, or several, of a declared cell; and `recurrent`, the same on plain tensors.

States and signals are named by the user; `rnnfast.functional` runs all cells alike.
"""

from collections.abc import Callable, Mapping, Sequence
from operator import index
from typing import TYPE_CHECKING, Any, Literal, overload

import torch
from torch import Tensor, nn
from torch.fx import Proxy
from torch.nn.utils.rnn import PackedSequence
from torch.types import Device

from rnnfast import functional, validate
from rnnfast.declare import Cell, found
from rnnfast.modules import leaf
from rnnfast.spec import Options
from rnnfast.states_and_signals import in_loop_layout, in_user_order

if TYPE_CHECKING:
    from rnnfast.signatures import same_as

Initial = float | Tensor | Callable[[Tensor], Any]
InitialStates = Tensor | Sequence[Tensor | None] | Mapping[str, Tensor | None]
FinalStates = Tensor | tuple[Tensor, ...]
AllPacked = tuple[PackedSequence, FinalStates, tuple[PackedSequence, ...]]


class Recurrent(nn.Module):
    """Layers of a cell that was declared by `rnnfast.cell`.

    Args:
        cell: the cell.
        input_size: width I of the input.
        hidden_size: width H of every state.
        num_layers: layers, each over the output of the one before. Default 1.
        bias: whether there are biases. Default True.
        batch_first: whether batched tensors are [B, T, ...] rather than [T, B, ...]. The states stay
            [layers*D, B, H]. Default False.
        dropout: probability of zeroing an element between layers in training. Default 0.
        bidirectional: whether a second direction runs from the end. Default False.
        initial: initial values of parameters of the cell, by name: a number, a tensor [H], or a function that fills a
            tensor, as those of `torch.nn.init` do. Those not named are uniform within 1 / sqrt(H), like all weights.
        device, dtype: of the parameters. Default: torch's.

    Parameters: `weight_ih_l0` [G*H, I], `weight_hh_l0` [R*H, H] for the R gates with a recurrent part, `bias_ih_l0`
    [G*H], `bias_hh_l0` [R*H], and the cell's own, `name_l0` [H]; further layers `_l1`, the reverse direction
    `_l0_reverse`.

    recompute: set it to True to have backward run each layer again rather than keep its gates and states.

    Raises:
        TypeError: `cell` is no declared cell, `initial` no mapping, or a size or flag of another type. ValueError: a
            cell without gates, a size below 1, dropout outside of [0, 1], or a name in `initial` that the cell lacks.
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
        device: Device = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if not isinstance(cell, Cell):
            raise TypeError(f"Recurrent: expected a cell declared by rnnfast.cell, got {type(cell).__name__}")
        if not cell.gates:
            raise ValueError(
                f"Recurrent: the cell {cell.__name__} has no gates, so its layers would not read their input"
            )
        validate.constants(input_size, hidden_size, num_layers, bias, batch_first, dropout)
        if not isinstance(initial, (Mapping, type(None))):
            raise TypeError(f"initial: expected a mapping of values by name, got {type(initial).__name__}")
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
                        weight.copy_(self.fitting(name, value, weight))
                    else:
                        nn.init.uniform_(weight, -bound, bound)

    def fitting(self, name: str, value: float | Tensor, weight: Tensor) -> Tensor:
        """Return the initial value of a parameter as a tensor that fits it."""
        try:
            value = torch.as_tensor(value)
        except (TypeError, ValueError, RuntimeError):
            kind = type(value).__name__
            raise TypeError(f"initial: expected a number, a tensor or a function for {name}, got {kind}") from None
        if value.dim() and value.shape != weight.shape:
            raise ValueError(f"initial: expected a number or {list(weight.shape)} for {name}, got {list(value.shape)}")
        return value

    def weights(self) -> list[Tensor]:
        """Return the weights of a call, flat: layer by layer, direction by direction, in the order of `shapes`."""
        return [getattr(self, f"{name}_{suffix}") for suffix, inputs in self.places() for name in self.shapes(inputs)]

    def options(self) -> Options:
        """Return the constants of a call."""
        return Options(
            self.cell.identity,
            index(self.num_layers),
            self.bidirectional,
            self.batch_first,
            self.dropout,
            self.training,
            self.recompute,
            self.bias,
            sizes=(index(self.input_size), index(self.hidden_size), index(self.hidden_size)),
        )

    @overload
    def forward(
        self, input: Tensor, hx: InitialStates | None = None, *, signals: Mapping[str, Tensor] | None = None,
        lengths: Tensor | None = None, resets: Tensor | None = None, all_states: Literal[False] = False,
    ) -> tuple[Tensor, FinalStates]: ...  # fmt: skip
    @overload
    def forward(
        self, input: Tensor, hx: InitialStates | None = None, *, signals: Mapping[str, Tensor] | None = None,
        lengths: Tensor | None = None, resets: Tensor | None = None, all_states: Literal[True],
    ) -> tuple[Tensor, FinalStates, tuple[Tensor, ...]]: ...  # fmt: skip
    @overload
    def forward(
        self, input: Tensor, hx: InitialStates | None = None, *, signals: Mapping[str, Tensor] | None = None,
        lengths: Tensor | None = None, resets: Tensor | None = None, all_states: bool,
    ) -> tuple[Tensor, FinalStates] | tuple[Tensor, FinalStates, tuple[Tensor, ...]]: ...  # fmt: skip
    @overload
    def forward(
        self, input: PackedSequence, hx: InitialStates | None = None, *, signals: Mapping[str, Tensor] | None = None,
        lengths: None = None, resets: Tensor | None = None, all_states: Literal[False] = False,
    ) -> tuple[PackedSequence, FinalStates]: ...  # fmt: skip
    @overload
    def forward(
        self, input: PackedSequence, hx: InitialStates | None = None, *, signals: Mapping[str, Tensor] | None = None,
        lengths: None = None, resets: Tensor | None = None, all_states: Literal[True],
    ) -> AllPacked: ...  # fmt: skip
    @overload
    def forward(
        self, input: PackedSequence, hx: InitialStates | None = None, *, signals: Mapping[str, Tensor] | None = None,
        lengths: None = None, resets: Tensor | None = None, all_states: bool,
    ) -> tuple[PackedSequence, FinalStates] | AllPacked: ...  # fmt: skip
    def forward(
        self,
        input: Tensor | PackedSequence,
        hx: InitialStates | None = None,
        *,
        signals: Mapping[str, Tensor] | None = None,
        lengths: Tensor | None = None,
        resets: Tensor | None = None,
        all_states: bool = False,
    ) -> Any:
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
        if isinstance(input, Proxy):
            return leaf(self, input, hx, signals=signals, lengths=lengths, resets=resets, all_states=all_states)
        return recurrent(
            self.options(), input, self.weights(), hx, signals=signals, lengths=lengths, resets=resets,
            all_states=all_states,
        )  # fmt: skip

    if TYPE_CHECKING:

        @same_as(forward)
        def __call__(self) -> None: ...

    def __prepare_scriptable__(self):
        raise TypeError(f"torch.jit.script cannot compile layers of declared cells, such as {self}: use torch.export")

    def extra_repr(self) -> str:
        text = f"{self.cell.__name__}, {self.input_size}, {self.hidden_size}"
        defaults = {"num_layers": 1, "bias": True, "batch_first": False, "dropout": 0.0, "bidirectional": False}
        return (
            text
            + "".join(f", {n}={getattr(self, n)}" for n, usual in defaults.items() if getattr(self, n) != usual)
            + ", rnnfast"
        )


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
):
    """Run layers of a declared cell on plain tensors; see `Recurrent.forward`.

    options: `cell` is the cell's identity. weights: flat, in the order of `Recurrent.weights`.
    """
    cell = found(options.cell)
    initial, laid_out = in_loop_layout(cell, options, input, weights, hx, signals)
    result = functional.recurrent(
        options, input, weights, initial, lengths=lengths, resets=resets, all_states=all_states, signals=laid_out
    )
    return in_user_order(cell, *result)
