"""The typed descriptions that everything below the modules takes: options, a layer's tensors, what describes a call.

Dimensions: T steps, B batch rows, I input width, H hidden units, P projection width (H without one), G gates, R gates
with a recurrent part, S states, N inputs, D directions. Everything is time-major.

Row layouts. The rows of step t are contiguous, and their number never grows with t:
    dense    x is [T, B, I], `batch_sizes` is None: every step has B rows
    padded   x is [T, B, I], `batch_sizes` is an int64 [T]: step t has its first batch_sizes[t] rows. The other rows
             are ignored, even where they are NaN; in the results they are 0
    packed   x is [rows, I], `batch_sizes` is an int64 [T] on the CPU: the steps follow one another without gaps
A reverse direction runs from the last step to the first; a row joins, with its initial state, at its last valid step.

Ensembles. Layers of equal sizes that run over the same steps are one layer: the directions of one member after those of
another. An ensemble of N with inputs of their own: x is [T, B, N*I] or [rows, N*I], member n reads slice n.
"""

import importlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from rnnfast_kernels.cells import CELLS
from rnnfast_kernels.equations.cell import Cell
from torch import Tensor

from rnnfast import _torch

States = tuple[Tensor, ...]


def cell_named(name: str) -> Cell:
    """Return a cell of torch by its name, or a declared one by its identity.

    Raises:
        RuntimeError: it is not declared in this process.
    """
    try:
        return CELLS[name]
    except KeyError:
        importlib.import_module("rnnfast.cells")  # declares the library's
    if name not in CELLS:
        others = [each for each in CELLS if each.startswith(f"{shown(name)}-")]
        but = f"; the cell {shown(name)} that is declared has other equations ({others[0]})" if others else ""
        raise RuntimeError(f"rnnfast: the cell {name} is not declared in this process{but}")
    return CELLS[name]


if torch.__version__ < "2.7":
    # The guards of its graphs cannot look into the table.
    _torch.constant_in_graphs(cell_named)


class Present(NamedTuple):
    """Which fields of `Weights` there are in every direction, and whether there are batch_sizes and resets."""

    w_ih: bool
    w_hh: bool
    b_ih: bool
    b_hh: bool
    w_hr: bool
    parameters: bool
    batch_sizes: bool = False
    resets: bool = False

    @property
    def weights(self) -> tuple[bool, ...]:
        """Return those of the weights."""
        return tuple(self[:-2])

    @property
    def options(self) -> tuple[bool, bool]:
        """Return those of batch_sizes and resets."""
        return self.batch_sizes, self.resets


class Options(NamedTuple):
    """The constants of a stack of layers; the meanings are those of torch.nn.LSTM's arguments.

    bias, projected: whether there are biases, and a projection of the output. sizes: I, H and P, which the weights must
    have; None where the weights decide.

    What a graph takes apart (`reverse`, `Form.arguments`) is a method: the Dynamo of torch 2.6 keeps a property of a
    NamedTuple as one value, which it neither iterates over nor slices by.
    """

    cell: str
    num_layers: int = 1
    bidirectional: bool = False
    batch_first: bool = False
    dropout: float = 0.0
    training: bool = False
    recompute: bool = False
    bias: bool = True
    projected: bool = False
    sizes: tuple[int, int, int] | None = None

    @property
    def directions(self) -> int:
        """Return D."""
        return 2 if self.bidirectional else 1

    def reverse(self) -> tuple[bool, ...]:
        """Say for each direction whether it runs backwards."""
        return (False, True) if self.bidirectional else (False,)

    @property
    def present(self) -> Present:
        """Say which weights there are."""
        cell = cell_named(self.cell)
        recurrent = cell.recurrent > 0
        return Present(True, recurrent, self.bias, self.bias and recurrent, self.projected, bool(cell.parameters))

    @property
    def flat_count(self) -> int:
        """Return the number of tensors of one direction in a flat list of weights, where parameters are [H] each."""
        present = self.present
        return sum(present.weights) - present.parameters + len(cell_named(self.cell).parameters)

    def width(self, weights: Sequence[Tensor]) -> int:
        """Return P, of a flat list of weights."""
        return weights[1].shape[-1] if cell_named(self.cell).recurrent else self.hidden(weights)

    def hidden(self, weights: Sequence[Tensor]) -> int:
        """Return H, of a flat list of weights."""
        cell = cell_named(self.cell)
        return weights[1].shape[0] // cell.recurrent if cell.recurrent else weights[0].shape[0] // cell.gates


class Weights(NamedTuple):
    """The parameters of one direction, in torch's shapes and gate order; or their gradients, tangents or shapes."""

    w_ih: Any  # [G*H, I]
    w_hh: Any = None  # [R*H, P]
    b_ih: Any = None  # [G*H]
    b_hh: Any = None  # [R*H]
    w_hr: Any = None  # [P, H], with a projection
    parameters: Any = None  # [number of the cell's parameters, H]


def shown(cell: str) -> str:
    """Return what users call a cell: of a declared one the name without the digest of its equations."""
    return cell.rpartition("-")[0] or cell


def parameter_name(name: str) -> str:
    """Name a parameter of a cell among the fields of `Weights`, which its own name may be one of."""
    return f"p.{name}"


@dataclass(slots=True)
class Layer:
    """One call of a layer, as backends receive it.

    x: the input, or N inputs side by side, each for its own D / N successive directions.
    hx: the initial states, one [D, B, P or H] tensor per state of the cell, the one that the product takes first.
    weights: of each direction.
    reverse: the direction of each of the D independent recurrences.
    resets: bool [T, B] or None; where it is true, the state that enters that step is zeroed first.
    signals: the cell's further inputs, [T or 1, B or 1, H or 1] each, by step and row whatever the layout of x.
    """

    cell: str
    x: Tensor
    hx: States
    weights: tuple[Weights, ...]
    reverse: tuple[bool, ...]
    batch_sizes: Tensor | None = None
    resets: Tensor | None = None
    signals: States = ()

    @property
    def definition(self) -> Cell:
        """Return the cell."""
        return cell_named(self.cell)

    @property
    def steps(self) -> int:
        """Return T."""
        return self.x.shape[0] if self.batch_sizes is None or self.x.dim() == 3 else len(self.batch_sizes)

    @property
    def hidden(self) -> int:
        """Return H."""
        return self.weights[0].w_ih.shape[0] // self.definition.gates

    @property
    def inputs(self) -> int:
        """Return the number of inputs, N."""
        width = self.weights[0].w_ih.shape[1]
        return self.x.shape[-1] // width if width else 1

    def input_of(self, d: int, x: Tensor) -> Tensor:
        """Take what direction `d` reads from x, or from something of x's shape."""
        inputs = self.inputs
        return x if inputs == 1 else x.chunk(inputs, -1)[d * inputs // len(self.reverse)]


class Form(NamedTuple):
    """A layer without its tensors."""

    cell: str
    reverse: tuple[bool, ...]
    present: Present

    @property
    def states(self) -> int:
        """Return S."""
        return len(cell_named(self.cell).states)

    @property
    def signals(self) -> int:
        """Return the number of signals."""
        return len(cell_named(self.cell).signals)

    def arguments(self) -> tuple[str, list[bool], list[bool]]:
        """Return what operators take; compilers keep no graphs on disk that hold types of ours."""
        return self.cell, list(self.reverse), list(self.present)

    @property
    def differentiable(self) -> int:
        """Return the number of tensors but batch_sizes and resets."""
        return 1 + self.states + self.signals + sum(self.present.weights) * len(self.reverse)

    @property
    def total(self) -> int:
        """Return the number of tensors."""
        return self.differentiable + sum(self.present.options)

    def needs(self, wanted: Sequence[bool]) -> "Needs":
        """Sum up which of the differentiable tensors need a gradient."""
        signals = 1 + self.states
        weights = signals + self.signals
        return Needs(
            wanted[0], any(wanted[1:signals]), any(wanted[weights : self.differentiable]), any(wanted[signals:weights])
        )

    def asked(self, needs: "Needs") -> tuple[bool, ...]:
        """Undo `needs`: say for each of the differentiable tensors whether its gradient is computed."""
        count = self.differentiable - 1 - self.states - self.signals
        hx, signals, weights = (needs.hx,) * self.states, (needs.signals,) * self.signals, (needs.weights,) * count
        return (needs.x, *hx, *signals, *weights)


def form_of(cell: str, reverse: Sequence[bool], present: Sequence[bool]) -> Form:
    """Return the form that operators get in parts."""
    return Form(cell, tuple(reverse), Present(*present))


def flatten(layer: Layer) -> tuple[Form, list[Tensor]]:
    """List a layer's tensors: x, hx, signals, the weights direction by direction, batch_sizes, resets."""
    options = (layer.batch_sizes, layer.resets)
    present = Present(*(each is not None for each in (*layer.weights[0], *options)))
    weights = (each for direction in layer.weights for each in direction)
    tensors = (layer.x, *layer.hx, *layer.signals, *weights, *options)
    return Form(layer.cell, tuple(layer.reverse), present), [each for each in tensors if each is not None]


def restore(form: Form, tensors: Sequence) -> Layer:
    """Undo `flatten`. The tensors may be a layer's gradients or tangents, None for those that there are not."""
    given = iter(tensors)
    x = next(given)
    hx = tuple([next(given) for _ in range(form.states)])
    signals = tuple([next(given) for _ in range(form.signals)])
    weights = tuple([named(form.present.weights, given) for _ in form.reverse])
    batch_sizes, resets = [next(given, None) if there else None for there in form.present.options]
    return Layer(form.cell, x, hx, weights, form.reverse, batch_sizes, resets, signals)


def named(present: Sequence[bool], given) -> Weights:
    """Name the next of one direction's weights."""
    return Weights(*(next(given) if there else None for there in present))


def group(options: Options, weights: Sequence[Tensor]) -> tuple[Weights, ...]:
    """Name a flat list of one layer's weights, which has the parameters of a cell one by one, [H] each."""
    own = len(cell_named(options.cell).parameters)
    given, found = iter(weights), []
    for _ in range(options.directions):
        fields = [next(given) if there else None for there in options.present.weights[:-1]]
        fields.append(torch.stack([next(given) for _ in range(own)]) if own else None)
        found.append(Weights(*fields))
    return tuple(found)


class Signature(NamedTuple):
    """Everything that one call of a layer depends on but values and addresses.

    x_shape, x_strides: those of x, in elements; the last stride is 1. batch, hidden, width, inputs: B, H, P and N.
    zero: whether the initial states are zero, and not given. signals: strides of each signal in bytes, by step, row
    and unit. cuts: bounds of slices of the batch with about as many valid rows each, for rows of different lengths.
    repeated: whether the call runs again and again with the same weights.
    """

    form: Form
    dtype: torch.dtype
    x_shape: tuple[int, ...]
    x_strides: tuple[int, ...]
    steps: int
    batch: int
    hidden: int
    width: int
    inputs: int
    zero: bool
    threads: int
    signals: tuple[tuple[int, ...], ...] = ()
    cuts: tuple[int, ...] | None = None
    repeated: bool = False

    @property
    def cell(self) -> Cell:
        """Return the cell."""
        return cell_named(self.form.cell)

    @property
    def widths(self) -> list[int]:
        """Return P or H for each state."""
        return [self.width] + [self.hidden] * (self.form.states - 1)

    @property
    def lead(self) -> tuple[int, ...]:
        """Return the leading dimensions of whatever has a row for every step: those of x, and D."""
        return (*self.x_shape[:-1], len(self.form.reverse))

    @property
    def padded(self) -> bool:
        """Say whether rows end at different steps, and their padding is there."""
        return self.form.present.batch_sizes and len(self.x_shape) == 3

    @property
    def weights(self) -> Weights:
        """Return the shapes of one direction's weights."""
        cell, hidden = self.cell, self.hidden
        columns, recurrent = cell.gates * hidden, cell.recurrent * hidden
        shapes = (
            (columns, self.x_shape[-1] // self.inputs),
            (recurrent, self.width),
            (columns,),
            (recurrent,),
            (self.width, hidden),
            (len(cell.parameters), hidden),
        )
        return Weights(
            *(shape if there else None for shape, there in zip(shapes, self.form.present.weights, strict=True))
        )


class Result(NamedTuple):
    """What `forward` returns: tensors that share no memory with one another or with the inputs.

    The leading dimensions L are those of x: (T, B) or (rows,).

    states: one [*L, D, P or H] tensor per state: its value after every step. Those beyond the first are empty
        tensors, shape [0], unless they were asked for.
    finals: one [D, B, P or H] tensor per state, each row after its own last step.
    saved: whatever this backend's `backward` wants beside the states, each tensor with leading dimensions L, and behind
        them D where the backend takes ensembles; empty unless asked for.
    """

    states: States
    finals: States
    saved: States


class Gradients(NamedTuple):
    """What `backward` returns, in the shapes of `Layer`. Entries that were not asked for are None."""

    x: Tensor | None
    hx: tuple[Tensor | None, ...]
    weights: tuple[Weights, ...]
    signals: tuple[Tensor | None, ...] = ()


class Tangents(NamedTuple):
    """Tangents of x, hx and the weights, in the shapes of these; None for 0."""

    x: Tensor | None
    hx: Sequence[Tensor | None]
    weights: Sequence[Weights]


class OutputTangents(NamedTuple):
    """The tangent of every state after every step, [*L, D, P or H], and of the final states, [D, B, P or H]."""

    states: States
    finals: States


class Needs(NamedTuple):
    """Which gradients `backward` must compute; the weights' flag holds for all of them in every direction."""

    x: bool
    hx: bool
    weights: bool
    signals: bool = False
