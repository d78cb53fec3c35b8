"""`RNN`, `LSTM` and `GRU`: drop-in replacements for the modules of the same names in `torch.nn`.

They derive from `torch.nn.RNNBase`, which gives them torch's constructor checks, parameter names, initial values and
`state_dict`, and not from `torch.nn.LSTM` and its siblings, which `torch.compile` refuses to trace.

Weights are read by name at every call, so parametrizations, `torch.func.functional_call`, weight dropout and a plain
tensor set in a parameter's place all work.
"""

from operator import index
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.fx import Proxy
from torch.nn.utils.rnn import PackedSequence
from torch.types import Device

from rnnfast import _torch
from rnnfast.functional import recurrent
from rnnfast.spec import Options

# What torch's forward uses of a layer and ours does not.
CALLED_BY_TORCH = (
    "check_forward_args",
    "check_input",
    "check_hidden_size",
    "get_expected_hidden_size",
    "get_expected_cell_size",
    "permute_hidden",
    "_flat_weights",
    "_init_flat_weights",
    "_update_flat_weights",
    "_weights_have_changed",
)
NO_PROJECTION = "proj_size argument is only supported for LSTM, not RNN or GRU"
CELL_OF_MODE = {"RNN_TANH": "rnn_tanh", "RNN_RELU": "rnn_relu", "LSTM": "lstm", "GRU": "gru"}


# The attribute of an accelerated layer that holds the class it had.
ORIGINAL = "_class_before_accelerate"
# Attributes of a layer that do not go along where it is copied or pickled: the list that stands for its weights, and
# the class that parametrize made for it before `accelerate`.
EXACT = "_exact_class_before_accelerate"
NOT_IN_STATE = ("_kept_weights", EXACT)
# Those that a layer loses with its parameters: what torch keeps of them too.
WITH_PARAMETERS = (*NOT_IN_STATE, ORIGINAL, "_flat_weights", "_flat_weights_names", "_all_weights", "_flat_weight_refs")


def first_overridden(cls: type) -> str | None:
    """Return the first name of CALLED_BY_TORCH that a class overrides."""
    for name in CALLED_BY_TORCH:
        owner = next((base for base in cls.__mro__ if name in vars(base)), nn.RNNBase)
        if owner.__module__ != __name__ and not owner.__module__.startswith("torch.nn.modules."):
            return name
    return None


def unasked(layer: str, name: str) -> str:
    """Say that a method would be ignored."""
    return (
        f"{layer}: {name} is asked by the forward of torch.nn's layers, and not by rnnfast's; "
        "override forward, or derive from torch.nn's layer"
    )


def no_script(module: nn.Module) -> str:
    """Say what to do where torch.jit.script is called."""
    return (
        f"torch.jit.script cannot compile rnnfast.{type(module).__name__}: call rnnfast.restore(model, own=True) "
        "first, which gives torch.nn's layers with the same parameters; or use torch.jit.trace or torch.export"
    )


def leaf(module: nn.Module, input: Proxy, hx, **options: Any):
    """Record a module as one node, as torch.fx does with the modules of torch.nn."""
    args = (input,) if hx is None else (input, hx)
    kwargs = {name: value for name, value in options.items() if value is not None and value is not False}
    tracer: Any = input.tracer
    return tracer.create_proxy("call_module", tracer.path_of_module(module), args, kwargs)


class RNNBase(nn.RNNBase):
    """What the three modules share: the call, and weights that are read when they are used.

    recompute: set it to True to have backward run each layer again rather than keep its gates and states. That keeps
        the layer's input alone, for the time of one more forward pass. Default False.
    """

    recompute: bool = False

    # The name of the cell in the table of equations.
    equations: str

    __jit_unused_properties__: ClassVar[list[str]] = ["all_weights", "_flat_weights", "equations"]  # type: ignore[misc]

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        name = first_overridden(cls)
        if name is not None:
            raise TypeError(unasked(cls.__name__, name))

    def forward(
        self,
        input: Tensor | PackedSequence,
        hx: Tensor | tuple[Tensor, Tensor] | None = None,
        *,
        lengths: Tensor | None = None,
        resets: Tensor | None = None,
        all_states: bool = False,
    ) -> Any:
        """Run the layers over `input`, as the torch module of the same name does.

        Args:
            input: [T, B, I] ([B, T, I] with batch_first), unbatched [T, I], or a PackedSequence.
            hx: initial state [layers*D, B, P]; for an LSTM the pair (h, c), c being [layers*D, B, H]. Zero if None.
            lengths: int tensor [B], any order, zeros allowed, any device: the valid steps of each row. What stands past
                a row's end, NaN included, reaches no output and no gradient; the output there is 0; the final state is
                that of the last valid step (the initial state for length 0); the reverse direction starts there.
            resets: bool tensor [T, B] ([B, T] with batch_first): where true, the state that enters the step is zeroed
                first, and its gradient with it. One direction only.
            all_states: return a third result, the value of each state of the last layer after every step: (h,) or
                (h, c), of shapes [T, B, D*P] and [T, B, D*H]. Default False.

        Returns:
            output [T, B, D*P] and the final state(s) [layers*D, B, P or H], in the layout of the input.

        Raises:
            ValueError, RuntimeError: what torch raises for the same mistake. ValueError or TypeError for lengths and
                resets: what was expected and what came. RuntimeError if a backend asked for by name cannot run this.
        """
        if isinstance(input, Proxy):
            return leaf(self, input, hx, lengths=lengths, resets=resets, all_states=all_states)
        return recurrent(
            self.options(), input, self.weights(), hx, lengths=lengths, resets=resets, all_states=all_states
        )

    def options(self) -> Options:
        """Return the constants of a call."""
        width = self.proj_size or self.hidden_size
        values = (
            self.equations,
            self.num_layers,
            self.bidirectional,
            self.batch_first,
            self.dropout,
            self.training,
            self.recompute,
            self.bias,
            self.proj_size > 0,
            (self.input_size, self.hidden_size, width),
        )
        if not torch.compiler.is_dynamo_compiling():
            return tuple.__new__(Options, values)  # what Options(*values) does, in half the time
        # Dynamo may hold integers as symbols; `index` makes constants of them.
        sizes = (index(self.input_size), index(self.hidden_size), index(width))
        return Options(values[0], index(self.num_layers), *values[2:8], index(self.proj_size) > 0, sizes)

    _flat_weights_names = _torch.WeightNames()

    # The list that stands for the weights since it was read or assigned, and the weights that the module had then.
    _kept_weights = None

    def weights(self) -> list:
        """Return the weights of a call: those of the module, or the list set by way of `_flat_weights`."""
        names = self._flat_weights_names
        try:
            current = [*map(self._parameters.__getitem__, names)]
        except KeyError:  # parametrized, or a plain tensor
            current = [getattr(self, name, None) for name in names]
        if self._kept_weights is None:
            return current
        kept, seen = self._kept_weights
        if all(now is None or now is then for now, then in zip(current, seen, strict=True)):
            return kept
        self._kept_weights = None  # as torch does once a weight is another tensor
        return current

    @property
    def _flat_weights(self):
        weights = self.weights()
        if self._kept_weights is None:
            object.__setattr__(self, "_kept_weights", (weights, list(weights)))
        return weights

    @_flat_weights.setter
    def _flat_weights(self, weights) -> None:
        """Run on `weights` until a weight of the module becomes another tensor, as torch's layers do.

        Raises:
            TypeError: something else than a list.
        """
        if weights is not None and not isinstance(weights, (list, tuple)):
            raise TypeError(f"_flat_weights: expected a list of tensors, got {type(weights).__name__}")
        object.__setattr__(self, "_kept_weights", None)
        object.__setattr__(self, "_kept_weights", (weights, self.weights()))

    def __setattr__(self, name, value) -> None:
        if name in CALLED_BY_TORCH and name != "_flat_weights":
            raise TypeError(unasked(type(self).__name__, name))
        if name in self.__dict__.get("_flat_weights_names", ()):
            self._kept_weights = None
        super(nn.RNNBase, self).__setattr__(name, value)

    def _init_flat_weights(self) -> None:
        self._kept_weights = None
        self._flat_weight_refs = []

    def _update_flat_weights(self) -> None:
        """Forget an assigned list if a weight is another tensor by now."""
        self.weights()

    def __getstate__(self):
        return {name: value for name, value in super().__getstate__().items() if name not in NOT_IN_STATE}

    def __setstate__(self, state) -> None:
        super().__setstate__(state)
        self._init_flat_weights()

    def extra_repr(self) -> str:
        """Show torch's text, and that the layer is rnnfast's."""
        form = ", accelerated" if ORIGINAL in self.__dict__ else ""
        return f"{super().extra_repr()}, rnnfast{form}{', recompute=True' if self.recompute else ''}"

    def __prepare_scriptable__(self):
        raise TypeError(no_script(self))

    def flatten_parameters(self) -> None:
        """Do nothing, for callers of torch's modules: the kernels take each parameter where it is."""


if TYPE_CHECKING:
    from rnnfast.signatures import Layers

    class OneState(Layers[Tensor, tuple[Tensor], tuple[PackedSequence]], RNNBase):  # type: ignore[misc]
        """What type checkers see of RNN and GRU."""

    class TwoStates(  # type: ignore[misc]
        Layers[tuple[Tensor, Tensor], tuple[Tensor, Tensor], tuple[PackedSequence, PackedSequence]], RNNBase
    ):
        """What type checkers see of LSTM."""
else:
    OneState = TwoStates = RNNBase


class RNN(OneState):
    """Elman network, h' = tanh(W_ih x + b_ih + W_hh h + b_hh); takes the arguments of `torch.nn.RNN`.

    Args:
        input_size: width I of the input.
        hidden_size: width H of the state.
        num_layers: layers, each over the output of the one before. Default 1.
        nonlinearity: "tanh" or "relu". Default "tanh".
        bias: whether there are biases. Default True.
        batch_first: whether batched tensors are [B, T, ...] rather than [T, B, ...]. The states stay
            [layers*D, B, H]. Default False.
        dropout: probability of zeroing an element between layers in training. Default 0.
        bidirectional: whether a second direction runs from the end. Default False.
        proj_size: none; anything given raises ValueError, as in torch.
        device, dtype: of the parameters. Default: torch's.

    Raises:
        TypeError, ValueError: what torch raises for the same mistake.
    """

    nonlinearity: str

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        nonlinearity: Literal["tanh", "relu"] = "tanh",
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        proj_size: None = None,
        device: Device = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        if proj_size is not None:
            raise ValueError(NO_PROJECTION)
        if nonlinearity not in ("tanh", "relu"):
            raise ValueError(f"Unknown nonlinearity '{nonlinearity}'. Select from 'tanh' or 'relu'.")
        mode = f"RNN_{nonlinearity.upper()}"
        super().__init__(
            mode, input_size, hidden_size, num_layers, bias, batch_first, dropout, bidirectional,
            device=device, dtype=dtype,
        )  # fmt: skip
        self.nonlinearity = nonlinearity

    @property
    def equations(self) -> str:  # type: ignore[override]
        """Return the name that goes with the mode, which torch asks in every call."""
        if self.mode not in ("RNN_TANH", "RNN_RELU"):
            raise AssertionError(f"mode must be RNN_TANH or RNN_RELU, got {self.mode}")
        return CELL_OF_MODE[self.mode]


class LSTM(TwoStates):
    """Long short-term memory (Hochreiter and Schmidhuber, 1997); takes the arguments of `torch.nn.LSTM`.

        i, f, o = sigmoid(...), g = tanh(...), each of W_ih x + b_ih + W_hh h + b_hh
        c' = f * c + i * g,  h' = o * tanh(c')

    Args:
        input_size: width I of the input.
        hidden_size: width H of the states h and c.
        num_layers: layers, each over the output of the one before. Default 1.
        bias: whether there are biases. Default True.
        batch_first: whether batched tensors are [B, T, ...] rather than [T, B, ...]. The states stay
            [layers*D, B, H]. Default False.
        dropout: probability of zeroing an element between layers in training. Default 0.
        bidirectional: whether a second direction runs from the end. Default False.
        proj_size: width P of a projection h' = W_hr (o * tanh(c')) (Sak et al., 2014). Default 0, none.
        device, dtype: of the parameters. Default: torch's.

    Raises:
        TypeError, ValueError: what torch raises for the same mistake.
    """

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        proj_size: int = 0,
        device: Device = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(
            "LSTM", input_size, hidden_size, num_layers, bias, batch_first, dropout, bidirectional, proj_size, device,
            dtype,
        )  # fmt: skip

    equations = "lstm"
    get_expected_cell_size = nn.LSTM.get_expected_cell_size
    check_forward_args = nn.LSTM.check_forward_args  # type: ignore[assignment]
    permute_hidden = nn.LSTM.permute_hidden  # type: ignore[assignment]


class GRU(OneState):
    """Gated recurrent unit (Cho et al., 2014), in the form of cuDNN and torch; takes the arguments of `torch.nn.GRU`.

        r, z = sigmoid(W_ih x + b_ih + W_hh h + b_hh)
        n = tanh(W_in x + b_in + r * (W_hn h + b_hn)),  h' = (1 - z) * n + z * h

    Args:
        input_size: width I of the input.
        hidden_size: width H of the state.
        num_layers: layers, each over the output of the one before. Default 1.
        bias: whether there are biases. Default True.
        batch_first: whether batched tensors are [B, T, ...] rather than [T, B, ...]. The states stay
            [layers*D, B, H]. Default False.
        dropout: probability of zeroing an element between layers in training. Default 0.
        bidirectional: whether a second direction runs from the end. Default False.
        proj_size: none; anything given raises ValueError, as in torch.
        device, dtype: of the parameters. Default: torch's.

    Raises:
        TypeError, ValueError: what torch raises for the same mistake.
    """

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        proj_size: None = None,
        device: Device = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        if proj_size is not None:
            raise ValueError(NO_PROJECTION)
        super().__init__(
            "GRU", input_size, hidden_size, num_layers, bias, batch_first, dropout, bidirectional,
            device=device, dtype=dtype,
        )  # fmt: skip

    equations = "gru"
