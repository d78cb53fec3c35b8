"""How layers are called, for type checkers: overloads by input, states and `all_states`. Nothing runs this.

`State` are initial and final states, `Steps` and `PackedSteps` every state of every step.
"""

from collections.abc import Callable, Sequence
from typing import Any, Generic, Literal, Protocol, TypeVar, cast, overload

from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

F = TypeVar("F", bound=Callable[..., Any])
State = TypeVar("State")
Steps = TypeVar("Steps", covariant=True)
PackedSteps = TypeVar("PackedSteps", covariant=True)


def same_as(function: F) -> Callable[[Callable[..., Any]], F]:
    """Give the decorated function another's type: `layer(x)` that of `layer.forward(x)`, which torch leaves open."""
    return lambda decorated: cast(F, decorated)


class Layers(Generic[State, Steps, PackedSteps]):
    """RNN, LSTM and GRU."""

    @overload
    def forward(
        self, input: Tensor, hx: State | None = None, *, lengths: Tensor | None = None, resets: Tensor | None = None,
        all_states: Literal[False] = False,
    ) -> tuple[Tensor, State]: ...  # fmt: skip
    @overload
    def forward(
        self, input: Tensor, hx: State | None = None, *, lengths: Tensor | None = None, resets: Tensor | None = None,
        all_states: Literal[True],
    ) -> tuple[Tensor, State, Steps]: ...  # fmt: skip
    @overload
    def forward(
        self, input: Tensor, hx: State | None = None, *, lengths: Tensor | None = None, resets: Tensor | None = None,
        all_states: bool,
    ) -> tuple[Tensor, State] | tuple[Tensor, State, Steps]: ...  # fmt: skip
    @overload
    def forward(
        self, input: PackedSequence, hx: State | None = None, *, lengths: None = None, resets: Tensor | None = None,
        all_states: Literal[False] = False,
    ) -> tuple[PackedSequence, State]: ...  # fmt: skip
    @overload
    def forward(
        self, input: PackedSequence, hx: State | None = None, *, lengths: None = None, resets: Tensor | None = None,
        all_states: Literal[True],
    ) -> tuple[PackedSequence, State, PackedSteps]: ...  # fmt: skip
    @overload
    def forward(
        self, input: PackedSequence, hx: State | None = None, *, lengths: None = None, resets: Tensor | None = None,
        all_states: bool,
    ) -> tuple[PackedSequence, State] | tuple[PackedSequence, State, PackedSteps]: ...  # fmt: skip
    def forward(self, *args: Any, **kwargs: Any) -> Any: ...

    @same_as(forward)
    def __call__(self) -> None: ...


class Function(Protocol[State, Steps, PackedSteps]):
    """The functions of `rnnfast.functional`."""

    @overload
    def __call__(
        self, input: Tensor, weights: Sequence[Tensor], hx: State | None = None, *, num_layers: int = 1,
        bidirectional: bool = False, batch_first: bool = False, dropout: float = 0.0, training: bool = False,
        recompute: bool = False, lengths: Tensor | None = None, resets: Tensor | None = None,
        all_states: Literal[False] = False,
    ) -> tuple[Tensor, State]: ...  # fmt: skip
    @overload
    def __call__(
        self, input: Tensor, weights: Sequence[Tensor], hx: State | None = None, *, num_layers: int = 1,
        bidirectional: bool = False, batch_first: bool = False, dropout: float = 0.0, training: bool = False,
        recompute: bool = False, lengths: Tensor | None = None, resets: Tensor | None = None,
        all_states: Literal[True],
    ) -> tuple[Tensor, State, Steps]: ...  # fmt: skip
    @overload
    def __call__(
        self, input: Tensor, weights: Sequence[Tensor], hx: State | None = None, *, num_layers: int = 1,
        bidirectional: bool = False, batch_first: bool = False, dropout: float = 0.0, training: bool = False,
        recompute: bool = False, lengths: Tensor | None = None, resets: Tensor | None = None,
        all_states: bool,
    ) -> tuple[Tensor, State] | tuple[Tensor, State, Steps]: ...  # fmt: skip
    @overload
    def __call__(
        self, input: PackedSequence, weights: Sequence[Tensor], hx: State | None = None, *, num_layers: int = 1,
        bidirectional: bool = False, batch_first: bool = False, dropout: float = 0.0, training: bool = False,
        recompute: bool = False, lengths: None = None, resets: Tensor | None = None,
        all_states: Literal[False] = False,
    ) -> tuple[PackedSequence, State]: ...  # fmt: skip
    @overload
    def __call__(
        self, input: PackedSequence, weights: Sequence[Tensor], hx: State | None = None, *, num_layers: int = 1,
        bidirectional: bool = False, batch_first: bool = False, dropout: float = 0.0, training: bool = False,
        recompute: bool = False, lengths: None = None, resets: Tensor | None = None,
        all_states: Literal[True],
    ) -> tuple[PackedSequence, State, PackedSteps]: ...  # fmt: skip
    @overload
    def __call__(
        self, input: PackedSequence, weights: Sequence[Tensor], hx: State | None = None, *, num_layers: int = 1,
        bidirectional: bool = False, batch_first: bool = False, dropout: float = 0.0, training: bool = False,
        recompute: bool = False, lengths: None = None, resets: Tensor | None = None,
        all_states: bool,
    ) -> tuple[PackedSequence, State] | tuple[PackedSequence, State, PackedSteps]: ...  # fmt: skip
