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

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any, NamedTuple, TypeVar

import torch
from torch import nn

from rnnfast import _torch, cell_modules, modules
from rnnfast.frozen import Frozen
from rnnfast.modules import EXACT, ORIGINAL
from rnnfast.recurrent import Recurrent

Model = TypeVar("Model", bound=nn.Module)
COUNTERPARTS = {nn.RNN: modules.RNN, nn.LSTM: modules.LSTM, nn.GRU: modules.GRU}
LAYER_NAMES = ("RNN", "LSTM", "GRU")
CELL_NAMES = ("RNNCell", "LSTMCell", "GRUCell")
# What ours become where torch's are wanted instead.
TORCHS = {ours: theirs for theirs, ours in COUNTERPARTS.items()} | {
    cell_modules.RNNCell: nn.RNNCell,
    cell_modules.LSTMCell: nn.LSTMCell,
    cell_modules.GRUCell: nn.GRUCell,
}
# The attribute of a layer that says why `freeze` left it alone.
REFUSED = "_reason_against_freeze"


class Finding(NamedTuple):
    """What `survey` says of one recurrent layer. `reason` tells why it is not accelerated, empty where it is.

    frozen: the format of frozen weights, empty where they are not. not_frozen: why `freeze` left the layer alone.
    """

    name: str
    type: str
    accelerated: bool
    reason: str
    frozen: str = ""
    not_frozen: str = ""

    def __str__(self) -> str:
        told = f"frozen, {self.frozen}" if self.frozen else self.reason or "accelerated"
        told += f"; not frozen: {self.not_frozen}" if self.not_frozen else ""
        return f"{self.name or 'the model itself'}: {self.type}, {told}"


def accelerate(model: Model, *, keep_types: bool = False) -> Model:
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
            exact = type(layer)
            change_class(layer, accelerated_class(original, keep_types))
            if listed is not None and is_assigned(layer, listed):
                layer._flat_weights = listed
            object.__setattr__(layer, ORIGINAL, original)
            if exact is not original:
                object.__setattr__(layer, EXACT, exact)
    return model


def restore(model: Model, *, own: bool = False) -> Model:
    """Undo `accelerate`: give every accelerated layer in `model` the exact class it had. Returns `model`.

    Args:
        model: any module, also a recurrent layer itself.
        own: also make torch's layers and cells of those that were made as rnnfast's. Parameters stay the same objects.
            Default False: they stay rnnfast's.

    Raises:
        TypeError: `model` is no torch.nn.Module; or, with `own`, has a layer of a class derived from rnnfast's.
    """
    for layer in recurrent_layers(model, "restore").values():
        if ORIGINAL in layer.__dict__:
            back_to_torch(layer, layer.__dict__.pop(ORIGINAL), layer.__dict__.pop(EXACT, None))
    named: list[tuple[str, nn.Module]] = [*model.named_modules()] if own else []
    for name, module in named:
        if isinstance(module, tuple(TORCHS)):
            theirs = TORCHS.get(plain_class(module))
            if theirs is None:
                place = name or "the model itself"
                raise TypeError(
                    f"restore: {place} is a {type(module).__name__}, derived from rnnfast's; torch has none"
                )
            back_to_torch(module, theirs)
    return model


def is_assigned(layer, listed: Sequence) -> bool:
    """Say whether a layer's list of weights has others than its parameters. What is computed anew does not count."""
    own = layer._parameters
    pairs = zip(layer._flat_weights_names, listed, strict=False)
    return any(name in own and weight is not own[name] for name, weight in pairs)


def back_to_torch(layer: nn.Module, plain: type, exact: type | None = None) -> None:
    """Give a layer or cell the class `plain` of torch's; `exact`, if given, while it is parametrized."""
    if exact is None or not is_parametrized(layer):
        change_class(layer, plain)
    else:
        take_properties(exact, type(layer))
        layer.__class__ = exact
    if isinstance(layer, nn.RNNBase):
        kept = layer.__dict__.pop("_kept_weights", None)
        _torch.init_weight_list(layer)
        if kept is not None:
            layer._flat_weights = kept[0]


def take_properties(to: type, of: type) -> None:
    """Give a class that parametrize made the properties that another has: parametrizations may have come and gone."""
    old, new = ({k: v for k, v in vars(each).items() if isinstance(v, property)} for each in (to, of))
    for name in old.keys() - new.keys():
        delattr(to, name)
    for name, value in new.items():
        setattr(to, name, value)


def survey(model: nn.Module) -> list[Finding]:
    """List the recurrent layers and cells of a model: which are accelerated, and why the others are not.

    Args:
        model: any module, also a recurrent layer itself.

    Raises:
        TypeError: `model` is no torch.nn.Module.
    """
    found = []
    for name, layer in recurrent_layers(model, "survey", is_listed).items():
        ours = isinstance(layer, (modules.RNNBase, Frozen, cell_modules.RNNCellBase, Recurrent))
        reason = "" if ours else reason_against(layer) or "accelerate() was not called"
        frozen = layer.weights_format if isinstance(layer, Frozen) else ""
        kind = layer.type_name() if frozen else type(layer).__name__
        found.append(Finding(name, kind, ours, reason, frozen, layer.__dict__.get(REFUSED, "")))
    return found


def is_recurrent(module: nn.Module) -> bool:
    """Say whether a module is a recurrent layer, scripted ones among them."""
    if isinstance(module, torch.jit.ScriptModule):
        return getattr(module, "original_name", "") in LAYER_NAMES
    return isinstance(module, (nn.RNNBase, Frozen))


def is_listed(module: nn.Module) -> bool:
    """Say whether `survey` lists a module: recurrent layers, those of declared cells, and modules of one step."""
    if isinstance(module, torch.jit.ScriptModule):
        return getattr(module, "original_name", "") in LAYER_NAMES + CELL_NAMES
    return is_recurrent(module) or isinstance(module, (nn.RNNCellBase, Recurrent))


def recurrent_layers(
    model: nn.Module, caller: str = "accelerate", wanted: Callable[[nn.Module], bool] = is_recurrent
) -> dict[str, Any]:
    """Return a model's recurrent layers by name, each once."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"{caller}: expected a torch.nn.Module, got {type(model).__name__}")
    return {name: module for name, module in model.named_modules() if wanted(module)}


def reason_against(layer: nn.Module) -> str | None:
    """Say why a layer must be left alone, or None where it may be accelerated."""
    if isinstance(layer, Frozen):
        return "it is frozen"
    if isinstance(layer, modules.RNNBase):
        return "it is rnnfast's already"
    if isinstance(layer, torch.jit.ScriptModule):
        return "a scripted layer cannot change; accelerate the model before torch.jit.script"
    if isinstance(layer, nn.RNNCellBase):
        return f"accelerate leaves modules of one step alone; rnnfast has {', '.join(CELL_NAMES)}"
    if not isinstance(layer, nn.RNNBase):
        return "its cell is a declared one, rnnfast's already"
    if not isinstance(layer, tuple(COUNTERPARTS)):
        return "a subclass of RNNBase with a cell that rnnfast does not know"
    names = (name for name in modules.CALLED_BY_TORCH if name in layer.__dict__ and name != "_flat_weights")
    name = next(names, None) or modules.first_overridden(type(layer))
    if name is not None:
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
