"""`accelerate` and `restore`: make the recurrent layers of an existing model fast, in place, and undo it.

A layer stays the object it was, with its parameters, hooks and buffers; only its class changes:

    nn.LSTM                     becomes rnnfast.LSTM. `isinstance(layer, nn.LSTM)` is then false, and `torch.compile`
                                takes the layer into its graph: Dynamo refuses every nn.RNN, nn.LSTM and nn.GRU. Hence
                                this is the default
    nn.LSTM, keep_types=True    becomes a class that is both. `isinstance` stays true, and Dynamo breaks its graph there
    a subclass of nn.LSTM       becomes a class that is both, always: its own methods come first and find rnnfast's
                                `forward` where they call `super().forward`
    a parametrized layer        has a class of its own made by torch, which is made anew over the accelerated one

A layer with a `forward` of its own in the instance is left alone: that is what runs, and it means what it meant.
"""

from functools import cache
from typing import Any, NamedTuple

import torch
from torch import nn

from rnnfast import _torch, modules

COUNTERPARTS = {nn.RNN: modules.RNN, nn.LSTM: modules.LSTM, nn.GRU: modules.GRU}
# The attribute of an accelerated layer that holds the class it had.
ORIGINAL = "_class_before_accelerate"

# What the forward of torch's layers asks of the module, and ours does not.
ASKED_BY_TORCH = (
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


class Finding(NamedTuple):
    """What `survey` says of one recurrent layer. `reason` tells why it is not accelerated, empty where it is."""

    name: str
    type: str
    accelerated: bool
    reason: str

    def __str__(self) -> str:
        return f"{self.name or 'the model itself'}: {self.type}, {self.reason or 'accelerated'}"


def accelerate(model: nn.Module, *, keep_types: bool = False) -> nn.Module:
    """Make every nn.RNN, nn.LSTM and nn.GRU in `model` run on rnnfast's kernels, in place.

    The Parameter objects, the state_dict, hooks and shared layers stay as they are, so an optimizer that holds the
    parameters keeps working. The layers take `lengths`, `resets` and `all_states` from then on. Calling it again
    changes nothing; `survey(model)` lists what was left alone, and why.

    Args:
        model: any module, also a recurrent layer itself.
        keep_types: keep `isinstance(layer, nn.LSTM)` true, at the price of a graph break in `torch.compile`, which
            refuses such layers. Subclasses of torch's layers keep their types in any case. Default False.

    Returns:
        `model`.

    Raises:
        TypeError: `model` is no torch.nn.Module.
    """
    for layer in recurrent_layers(model).values():
        if reason_against(layer) is None:
            original = plain_class(layer)
            _torch.update_weight_list(layer)
            listed = layer.__dict__.pop("_flat_weights", None)
            change_class(layer, accelerated_class(original, keep_types))
            if listed is not None and any(a is not b for a, b in zip(listed, layer.weights(), strict=False)):
                layer._flat_weights = listed
            object.__setattr__(layer, ORIGINAL, original)
    return model


def restore(model: nn.Module) -> nn.Module:
    """Undo `accelerate`: give every accelerated layer in `model` the exact class it had. Returns `model`.

    Layers that were made as rnnfast's stay so.

    Raises:
        TypeError: `model` is no torch.nn.Module.
    """
    for layer in recurrent_layers(model).values():
        if ORIGINAL in layer.__dict__:
            change_class(layer, layer.__dict__.pop(ORIGINAL))
            kept = layer.__dict__.pop("_kept_weights", None)
            _torch.init_weight_list(layer)
            if kept is not None:
                layer._flat_weights = kept[0]
    return model


def survey(model: nn.Module) -> list[Finding]:
    """List the recurrent layers of a model: which are accelerated, and why the others are not.

    Raises:
        TypeError: `model` is no torch.nn.Module.
    """
    found = []
    for name, layer in recurrent_layers(model).items():
        ours = isinstance(layer, modules.Recurrent)
        reason = "" if ours else reason_against(layer) or "accelerate() was not called"
        found.append(Finding(name, type(layer).__name__, ours, reason))
    return found


def recurrent_layers(model: nn.Module) -> dict[str, Any]:
    """Return a model's recurrent layers by name, each once."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"accelerate: expected a torch.nn.Module, got {type(model).__name__}")
    return {name: module for name, module in model.named_modules() if is_recurrent(module)}


def is_recurrent(module: nn.Module) -> bool:
    """Say whether a module is a recurrent layer, scripted ones among them."""
    if isinstance(module, torch.jit.ScriptModule):
        return getattr(module, "original_name", "") in ("RNN", "LSTM", "GRU")
    return isinstance(module, nn.RNNBase)


def reason_against(layer: nn.Module) -> str | None:
    """Say why a layer must be left alone, or None where it may be accelerated."""
    if isinstance(layer, modules.Recurrent):
        return "it is rnnfast's already"
    if isinstance(layer, torch.jit.ScriptModule):
        return "a scripted layer cannot change; accelerate the model before torch.jit.script"
    if not isinstance(layer, tuple(COUNTERPARTS)):
        return "a subclass of RNNBase with a cell that rnnfast does not know"
    for name in ASKED_BY_TORCH:
        owner = next((base for base in type(layer).__mro__ if name in vars(base)), nn.RNNBase)
        instance = name in layer.__dict__ and name != "_flat_weights"
        if instance or not owner.__module__.startswith("torch.nn.modules."):
            return f"it overrides {name}, which torch's forward uses and rnnfast's does not"
    if "forward" in layer.__dict__:
        return "the instance has a forward of its own"
    if any(base.__name__ == "FSDPModule" for base in type(layer).__mro__):
        return "it is sharded already; accelerate the model before fully_shard"
    return None


def accelerated_class(original: type, keep_types: bool) -> type:
    """Return the class that a layer of class `original` gets."""
    if original in COUNTERPARTS and not keep_types:
        return COUNTERPARTS[original]
    return both(original)


@cache
def both(original: type) -> type:
    """Derive a class from torch's layer or a subclass of it: rnnfast's methods come after its own, before torch's."""
    theirs = next(base for base in COUNTERPARTS if issubclass(original, base))
    fast = type(original.__name__, (COUNTERPARTS[theirs], theirs), {"__reduce_ex__": reduce_both})
    return fast if original is theirs else type(original.__name__, (original, fast), {"__reduce_ex__": reduce_both})


def reduce_both(layer: nn.Module, protocol):
    """Pickle or copy a layer whose class is made at run time: by the class that it is made from."""
    if is_parametrized(layer):
        return object.__reduce_ex__(layer, protocol)
    return new_both, (layer.__dict__[ORIGINAL],), layer.__getstate__()


def new_both(original: type) -> nn.Module:
    """Make an empty layer for unpickling."""
    return nn.Module.__new__(both(original))


def is_parametrized(layer: nn.Module) -> bool:
    """Say whether torch.nn.utils.parametrize has given the layer a class of its own."""
    return torch.nn.utils.parametrize.is_parametrized(layer)


def plain_class(layer: nn.Module) -> type:
    """Return the class of a layer, without the one that parametrize made for it."""
    return type(layer).__bases__[0] if is_parametrized(layer) else type(layer)


def change_class(layer: nn.Module, plain: type) -> None:
    """Give a layer another class; one that parametrize made, with its properties, is made anew over it."""
    if is_parametrized(layer):
        members = {k: v for k, v in vars(type(layer)).items() if k not in ("__dict__", "__weakref__", "__doc__")}
        plain = type(type(layer).__name__, (plain,), members)
    layer.__class__ = plain
