"""Every check of a user's arguments, in torch's words where torch makes the same check."""

import numbers
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from rnnfast import _torch
from rnnfast.call import Call
from rnnfast.spec import Options, cell_named

INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)


def module_name(options) -> str:
    """Return the name of torch's module for a cell."""
    return {"lstm": "LSTM", "gru": "GRU"}.get(options.cell, "RNN")


def constants(input_size, hidden_size, num_layers, bias, batch_first, dropout) -> None:
    """Check the arguments of a layer's constructor."""
    if not 0 <= float(dropout) <= 1 or not isinstance(dropout, numbers.Number) or isinstance(dropout, bool):
        raise ValueError(
            "dropout should be a number in range [0, 1] representing the probability of an element being zeroed"
        )
    for name, value, kind in (
        ("bias", bias, bool),
        ("batch_first", batch_first, bool),
        ("input_size", input_size, int),
        ("hidden_size", hidden_size, int),
        ("num_layers", num_layers, int),
    ):
        if not isinstance(value, kind):
            raise TypeError(f"{name} should be of type {kind.__name__}, got: {type(value).__name__}")
        if kind is int and value <= 0:
            raise ValueError(f"{name} must be greater than zero")


def input_is_batched(options, input: Tensor) -> bool:
    """Say whether a plain input has a batch dimension."""
    if input.dim() not in (2, 3):
        name = module_name(options)
        kind = "D tensor" if name == "RNN" else "D"
        raise ValueError(f"{name}: Expected input to be 2D or 3D, got {input.dim()}{kind} instead")
    return input.dim() == 3


def hidden(options, hx, batched: bool | None) -> tuple[Tensor, ...] | None:
    """Return the initial states as a tuple of batched tensors. `batched` is None for a packed input."""
    if hx is None:
        return None
    count = len(cell_named(options.cell).states)
    states = (hx,) if count == 1 else hx
    if batched is not None:
        dims = 3 if batched else 2
        if any(states[n].dim() != dims for n in range(count)):
            raise RuntimeError(wrong_hidden_dims([states[n] for n in range(count)], batched))
    several_states(options.cell, hx, count)
    if batched is None and count > 1:
        are_tensors(states)
    states = tuple([dense(state) for state in states])
    return tuple(s.unsqueeze(1) for s in states) if batched is False else states


def dense(tensor: Tensor) -> Tensor:
    """Return a sparse tensor as a dense one: no kernel takes it, and few of torch's operators do."""
    if torch.compiler.is_compiling() or getattr(tensor, "layout", torch.strided) is torch.strided:
        return tensor
    return tensor.to_dense()


def are_tensors(given: Sequence[object], argument: int = 2) -> None:
    """Refuse, as torch does, what is no tensor in a list of states or weights. Shapes may stand for tensors."""
    for n, each in enumerate(given):
        if not hasattr(each, "dtype"):
            raise TypeError(f"expected Tensor as element {n} in argument {argument}, but got {type(each).__name__}")


def several_states(name: str, hx, count: int) -> None:
    """Refuse, as torch does, one stacked tensor, or a wrong number of tensors, for a cell of several states."""
    if count == 1:
        return
    if not isinstance(hx, (tuple, list)):
        raise TypeError(f"{name}(): argument 'hx' must be tuple of Tensors, not {type(hx).__name__}")
    if len(hx) != count:
        raise RuntimeError(f"{name} expects {'two' if count == 2 else count} hidden states")


def wrong_hidden_dims(states: Sequence[Tensor], batched: bool) -> str:
    """Say, as torch does, that initial states have the wrong number of dimensions."""
    case, dims = ("batched 3-D", "3-D") if batched else ("unbatched 2-D", "2-D")
    if len(states) == 1:
        return f"For {case} input, hx should also be {dims} but got {states[0].dim()}-D tensor"
    got = ", ".join(f"{s.dim()}-D" for s in states)
    return f"For {case} input, hx and cx should also be {dims} but got ({got}) tensors"


def sizes(options, x: Tensor, batch: int, hx: tuple[Tensor, ...] | None, weights: Sequence[Tensor]) -> None:
    """Check the dtype and width of a time-major input and the shapes of the initial states against the weights."""
    if len(weights) == 0:
        raise ValueError("num_layers must be greater than zero")
    w_ih = weights[0]
    if x.dtype != w_ih.dtype and not _torch.is_any_autocast_enabled():
        raise ValueError(
            f"RNN input dtype ({x.dtype}) does not match weight dtype ({w_ih.dtype}). "
            f"Convert input: input.to({w_ih.dtype}), or convert model: model.to({x.dtype})"
        )
    inputs = w_ih.shape[-1] if options.sizes is None else options.sizes[0]
    if x.shape[-1] != inputs:
        raise RuntimeError(f"input.size(-1) must be equal to input_size. Expected {inputs}, got {x.shape[-1]}")
    are_tensors(weights)
    rows = options.num_layers * options.directions
    _, hidden, width = options.sizes or (inputs, options.hidden(weights), options.width(weights))
    widths = (width, hidden)
    states = hx or ()
    for n, state in enumerate(states):
        expected = (rows, batch, widths[min(n, 1)])
        if state.size() != expected:
            what = f"hidden[{n}]" if len(states) > 1 else "hidden"
            raise RuntimeError(f"Expected {what} size {expected}, got {list(state.shape)}")
        if state.dtype != x.dtype and not _torch.is_any_autocast_enabled():
            raise RuntimeError(f"Input and hidden tensors are not the same dtype, got {x.dtype} and {state.dtype}")
        if state.device != x.device:
            raise RuntimeError(
                f"Input and hidden tensors are not at the same device, found input tensor at {x.device} "
                f"and hidden tensor at {state.device}"
            )
    if w_ih.device != x.device:
        raise RuntimeError(
            f"Input and parameter tensors are not at the same device, found input tensor at {x.device} "
            f"and parameter tensor at {w_ih.device}"
        )
    weight_shapes(options, weights, inputs, hidden, width)


def weights_present(cell: str, weights: Sequence[Tensor], places: int) -> tuple[bool, bool]:
    """Say whether a flat list of weights has biases, and a projection. places: layers times directions."""
    if not hasattr(weights, "__len__") or isinstance(weights, Mapping):
        raise TypeError(f"weights: expected a list of tensors, got {type(weights).__name__}")
    if not isinstance(places, int):
        raise TypeError("num_layers should be of type int")
    if places < 1:
        raise ValueError("num_layers must be greater than zero")
    count = len(weights)
    if count and not isinstance(weights[0], Tensor):
        are_tensors(weights)
    each = count // places
    if each * places != count or each not in ((2, 3, 4, 5) if cell == "lstm" else (2, 4)):
        expected = "2 to 5" if cell == "lstm" else "2 or 4"
        raise RuntimeError(f"weights: expected {expected} tensors for each of {places} layers, got {count} in all")
    return each > 3, each % 2 == 1


def weight_shapes(options: Options, weights: Sequence[Tensor], inputs: int, hidden: int, width: int) -> None:
    """Check the number and the shapes of the weights."""
    cell, directions = cell_named(options.cell), len(options.reverse())
    places = options.num_layers * directions
    if len(weights) != options.flat_count * places:
        raise RuntimeError(f"weights: expected {options.flat_count * places} tensors, got {len(weights)}")
    shapes = [weight.shape for weight in weights]
    width = width if options.projected else hidden
    columns, recurrent = (cell.gates * hidden,), (cell.recurrent * hidden,)
    inner = ((*recurrent, width), columns, recurrent, (width, hidden))
    own: list[tuple[int, ...]] = [
        shape for shape, there in zip(inner, options.present.weights[1:-1], strict=True) if there
    ]
    own += [(hidden,)] * len(cell.parameters)
    expected = [(*columns, inputs), *own] * directions
    expected += [(*columns, directions * width), *own] * (places - directions)
    if shapes != expected:
        n = next(n for n in range(len(shapes)) if shapes[n] != expected[n])
        raise RuntimeError(f"weights[{n}]: expected shape {list(expected[n])}, got {list(shapes[n])}")


def packed(sequence: PackedSequence, lengths: Tensor | None) -> None:
    """Check what may not go with a PackedSequence."""
    if lengths is not None:
        raise ValueError("lengths: expected None with a PackedSequence, which carries its own, got a tensor")
    if sequence.data.dim() != 2:
        raise RuntimeError(f"input must have 2 dimensions, got {sequence.data.dim()}")
    sizes = sequence.batch_sizes
    falling = bool((sizes[1:] <= sizes[:-1]).all()) and int(sizes[-1]) >= 0
    if sizes.dtype != torch.int64 or not falling or int(sizes.sum()) != len(sequence.data):
        raise RuntimeError(
            f"batch_sizes: expected int64 numbers that never grow and add up to the {len(sequence.data)} rows of data, "
            f"got {sizes.tolist()}"
        )


def lengths(given: Tensor, batch: int, batched: bool) -> None:
    """Check `lengths`, except for its values, which `operators.sort_lengths` sees."""
    if not isinstance(given, Tensor) or given.dtype not in INTEGERS:
        got = f"dtype {given.dtype}" if isinstance(given, Tensor) else type(given).__name__
        raise TypeError(f"lengths: expected an integer tensor of shape [{batch}], got {got}")
    if not batched:
        raise ValueError("lengths: expected None with an unbatched input, got a tensor")
    if given.shape != (batch,):
        raise ValueError(f"lengths: expected shape [{batch}], one per batch row, got {list(given.shape)}")


def resets(options, given: Tensor | None, steps: int, batch: int, batched: bool = True) -> Tensor | None:
    """Check `resets` and return it time-major, [T, B]."""
    if given is None:
        return None
    if not isinstance(given, Tensor) or given.dtype != torch.bool:
        got = f"dtype {given.dtype}" if isinstance(given, Tensor) else type(given).__name__
        raise TypeError(f"resets: expected a bool tensor, got {got}")
    if options.bidirectional:
        raise ValueError("resets: expected None for a bidirectional module, got a tensor; resets have one direction")
    batch_first = options.batch_first and batched
    expected = ((batch, steps) if batch_first else (steps, batch)) if batched else (steps,)
    if given.shape != expected:
        layout = "[B, T]" if batch_first else "[T, B]" if batched else "[T]"
        raise ValueError(f"resets: expected shape {list(expected)}, {layout}, got {list(given.shape)}")
    if not batched:
        return given.unsqueeze(1)
    return given.transpose(0, 1) if batch_first else given


def cast_for_autocast(call: Call) -> Call:
    """Inside `torch.autocast`, bring input, states and weights to its dtype, as torch's own layers do.

    Raises RuntimeError where they are of several dtypes or devices, inside or outside.
    """
    dtype = autocast_dtype(call.options.cell, call.x.device.type, call.hx[0].dtype)
    if dtype is not None:

        def cast(tensor: Tensor) -> Tensor:
            return tensor.to(dtype) if is_cast(tensor.dtype) else tensor

        call = call.each(cast)
    one_kind(call)
    return call


def autocast_dtype(cell: str, device: str, state: torch.dtype) -> torch.dtype | None:
    """Return the dtype that `torch.autocast` computes in; None where it is not at work. state: of the initial state."""
    if not (_torch.is_any_autocast_enabled() and is_autocast_on(device)):
        return None
    dtype = torch.get_autocast_dtype(device)
    if device == "cpu" and cell == "gru" and is_cast(state):
        # torch's GRU there is made of operators: autocast reaches its products, and not its state.
        return torch.promote_types(dtype, state)
    return dtype


def is_cast(dtype: torch.dtype) -> bool:
    """Say whether autocast changes tensors of a dtype: neither float64 nor what has no floating point numbers."""
    return dtype.is_floating_point and dtype != torch.float64


def is_autocast_on(device: str) -> bool:
    """Say whether `torch.autocast` is at work for a type of device."""
    return has_autocast(device) and torch.is_autocast_enabled(device)


@_torch.constant_in_graphs
def has_autocast(device: str) -> bool:
    """Say whether there is autocast for a type of device; Dynamo could not always trace the question."""
    return torch.amp.is_autocast_available(device)


def one_kind(call: Call) -> None:
    """Refuse tensors of several dtypes or devices."""
    tensors = (call.x, *call.hx, *call.weights, *call.signals)
    dtypes = {tensor.dtype for tensor in tensors}
    if len(dtypes) > 1:
        found = " and ".join(sorted(map(str, dtypes)))
        raise RuntimeError(f"input, hidden states and weights must have the same dtype, got {found}")
    devices = {tensor.device for tensor in (tensors if call.resets is None else (*tensors, call.resets))}
    if len(devices) > 1:
        found = " and ".join(sorted(map(str, devices)))
        raise RuntimeError(f"input, hidden states, weights and resets must be at the same device, got {found}")
