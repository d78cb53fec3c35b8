"""`freeze`: pack the weights of a model's recurrent layers once, for inference on the CPU."""

from typing import Any, Literal

import torch
from rnnfast_kernels.cpu.formats import FORMATS, Format
from rnnfast_kernels.warn import warn_user
from torch import Tensor, nn

from rnnfast import modules
from rnnfast.accelerate import COUNTERPARTS, ORIGINAL, REFUSED, Model, is_parametrized, recurrent_layers
from rnnfast.frozen import Frozen
from rnnfast.frozen_cells import FrozenRecurrent
from rnnfast.frozen_weights import FIELDS, weight_shapes
from rnnfast.recurrent import Recurrent
from rnnfast.spec import parameter_name


@torch.no_grad()
def freeze(model: Model, weights: Literal["float32", "bfloat16", "int8"] = "float32") -> Model:
    """Pack the weights of every recurrent layer in `model`, in place: RNN, LSTM, GRU, and those of declared cells.

    A frozen layer stays the object it was, with its hooks, and takes the same calls. It has no parameters any more,
    is in eval mode, and cannot be trained. `state_dict` has its weights in the format chosen. `survey(model)` lists
    what was frozen, and why other layers were not.

    Args:
        model: any module, also a recurrent layer itself, with float32 parameters on the CPU.
        weights: the format.
            "float32": results are bitwise those of the layer before. No call packs weights any more.
            "bfloat16": half the memory. Weights are rounded to bfloat16, sums are float32.
            "int8": a quarter of the memory. Each row of a weight is rounded to 127 steps of its largest magnitude; in
            the call so is each row of the input and of the state. Products are of int8 numbers and sums of int32;
            activation functions and states are float32. A row of the input with infinity gives NaN.

    Returns:
        `model`.

    Raises:
        TypeError: `model` is no torch.nn.Module.
        ValueError: `weights` is none of these, or a weight has NaN or infinity, and is named. Nothing is changed then.
    """
    if weights not in tuple(FORMATS):
        expected = ", ".join(map(repr, FORMATS))
        raise ValueError(f"freeze: expected weights to be one of {expected}, got {weights!r}")
    found = recurrent_layers(model, "freeze")
    found |= {name: each for name, each in model.named_modules() if isinstance(each, Recurrent)}
    reasons = {name: reason_against(layer, weights) for name, layer in found.items()}
    for name, layer in found.items():
        if reasons[name] is None:
            check_finite(name, layer, weights)
    if not found:
        warn_user("freeze: the model has no recurrent layer")
    # All are packed before any is changed.
    packed = {name: frozen_copy(layer, weights) for name, layer in found.items() if reasons[name] is None}
    for name, layer in found.items():
        reason = reasons[name]
        if reason is None:
            layer.__class__, layer.__dict__ = type(packed[name]), packed[name].__dict__
        elif not (isinstance(layer, Frozen) and layer.weights_format == weights):
            layer.__dict__[REFUSED] = reason
            warn_user(f"freeze: {name or 'the model itself'} was not frozen: {reason}")
    return model


def reason_against(layer: nn.Module, weights: str) -> str | None:
    """Say why a layer cannot be frozen, or None where it can."""
    if isinstance(layer, Frozen):
        return f"it is frozen already, in {layer.weights_format}"
    if isinstance(layer, torch.jit.ScriptModule):
        return "a scripted layer cannot change; freeze the model before torch.jit.script"
    if is_parametrized(layer):
        return "it is parametrized; call torch.nn.utils.parametrize.remove_parametrizations first"
    known = (*COUNTERPARTS, *COUNTERPARTS.values(), Recurrent)
    plain = layer.__dict__.get(ORIGINAL, type(layer))
    if plain not in known:
        return f"freezing would lose the methods of its class, {type(layer).__name__}"
    if "forward" in layer.__dict__:
        return "the instance has a forward of its own"
    tensors = named_weights(layer)
    for name, tensor in tensors.items():
        if not isinstance(tensor, Tensor):
            return f"{name} is not a tensor"
        if name not in layer._parameters:
            return (
                f"{name} is no parameter; where a hook makes it, remove that first (remove_weight_norm, prune.remove)"
            )
        if tensor.layout is not torch.strided:
            return f"{name} is sparse"
        if tensor.device.type != "cpu":
            return f"{name} is on {tensor.device}; frozen weights are for the CPU"
        if tensor.dtype != torch.float32:
            return f"{name} is {tensor.dtype}; layers of torch.float32 can be frozen"
        most = FORMATS[weights].most_terms
        if tensor.dim() == 2 and 0 < most < tensor.shape[1]:
            return f"{name} has rows of {tensor.shape[1]} numbers; sums of {weights} products hold {most}"
    if any(tensor.numel() == 0 for tensor in tensors.values()):
        return "a weight is empty"
    return wrong_shape(layer, tensors)


def wrong_shape(layer: Any, tensors: dict[str, Tensor]) -> str | None:
    """Say which weight has another shape than the layer's sizes ask for, or None."""
    for shapes in shapes_of(layer):
        for name, expected in shapes.items():
            if tensors[name].shape != expected:
                return f"{name}: expected shape {list(expected)}, got {list(tensors[name].shape)}"
    return None


def named_weights(layer: Any) -> dict[str, Any]:
    """Return a layer's weights by name."""
    return {name: getattr(layer, name, None) for shapes in shapes_of(layer) for name in shapes}


def shapes_of(layer: Any) -> list[dict[str, tuple[int, ...]]]:
    """Name the weights, and their shapes, of each layer and direction."""
    if not isinstance(layer, Recurrent):
        return weight_shapes(layer)
    return [
        {f"{name}_{suffix}": shape for name, shape in layer.shapes(inputs).items()} for suffix, inputs in layer.places()
    ]


def check_finite(place: str, layer: nn.Module, weights: str) -> None:
    """Raise ValueError where a weight has NaN or infinity, or would have in its format."""
    chosen = FORMATS[weights]
    for name, tensor in named_weights(layer).items():
        full = f"{place}.{name}" if place else name
        if not tensor.isfinite().all():
            raise ValueError(f"freeze: expected finite weights, got NaN or infinity in {full}")
        if not chosen.scaled and not tensor.to(dtype_of(chosen)).isfinite().all():
            raise ValueError(f"freeze: expected weights that {weights} holds, got {tensor.abs().max():.4g} in {full}")


def dtype_of(chosen: Format) -> torch.dtype:
    """Return the dtype of a format's numbers."""
    return getattr(torch, chosen.dtype)


def quantised(weight: Tensor, chosen: Format) -> tuple[Tensor, Tensor]:
    """Round each row of a weight to integers times a scale of its own, and return both."""
    most = chosen.largest
    # The largest integer times a scale is finite.
    largest_scale = torch.finfo(torch.float32).max / most * (1 - 2.0**-20)
    scale = (weight.abs().amax(1).clamp(min=2.0**-100) / most).clamp(max=largest_scale)
    return (weight / scale[:, None]).round().clamp(-most, most).to(dtype_of(chosen)), scale


def frozen_copy(layer: Any, weights: str) -> Frozen:
    """Return a frozen layer with all that a layer has, but packed weights in place of its parameters."""
    shorts, chosen = {long: short for short, long in FIELDS.items()}, FORMATS[weights]
    own = layer.cell.parameters if isinstance(layer, Recurrent) else ()
    held = []
    for names in shapes_of(layer):
        named: dict[str, Tensor] = {}
        for name in names:
            stem = name.removesuffix("_reverse").rpartition("_")[0]
            short = parameter_name(stem) if stem in own else shorts[stem]
            tensor = getattr(layer, name).detach().resolve_neg()
            if tensor.dim() == 1:
                named[short] = tensor.clone()
            elif chosen.scaled:
                named[short], named[f"{short}_scale"] = quantised(tensor, chosen)
            else:
                named[short] = tensor.to(dtype_of(chosen))
        held.append(named)
    parameters = named_weights(layer)
    kind = FrozenRecurrent if isinstance(layer, Recurrent) else Frozen
    made = kind.__new__(kind)
    gone = {*parameters, *modules.WITH_PARAMETERS, REFUSED}
    made.__dict__.update({name: value for name, value in layer.__dict__.items() if name not in gone})
    others = {name: each for name, each in layer._parameters.items() if name not in parameters}
    made.__dict__.update(_parameters=others, weights_format=weights, training=False)
    made.hold(held)
    return made
