"""The weights of frozen layers: panels for this machine's processor, and machine-independent tensors."""

from collections.abc import Iterator
from itertools import pairwise, product
from typing import Any

import torch
from rnnfast_kernels.cpu.formats import FORMATS
from torch import Tensor, nn

from rnnfast import _torch
from rnnfast.frozen_ops import kernels, weight_names
from rnnfast.modules import CELL_OF_MODE
from rnnfast.spec import cell_named, parameter_name

# Attributes that `hold` makes.
NOT_IN_STATE = ("panels", "_array", "_plain", "_prepared", "_elsewhere", "_forms", "_offsets", "_panel_layout")
# Attributes that panels depend on.
FIXED = (
    "bias", "bidirectional", "cell", "hidden_size", "input_size", "mode", "num_layers", "proj_size", "weights_format",
)  # fmt: skip
PARAMETER = parameter_name("")
FIELDS = {"w_ih": "weight_ih", "w_hh": "weight_hh", "w_hr": "weight_hr", "b_ih": "bias_ih", "b_hh": "bias_hh"}


class FrozenWeights(nn.Module):
    """The weights of a frozen layer: packed for this machine, and as machine-independent tensors."""

    mode: str
    input_size: int
    hidden_size: int
    num_layers: int
    bias: bool
    batch_first: bool
    dropout: float
    bidirectional: bool
    proj_size: int
    weights_format: str
    panels: Tensor | None

    def extra_repr(self) -> str:
        told = nn.RNNBase.extra_repr(self)  # type: ignore[arg-type]
        return f"{told}, weights={self.weights_format}"

    def type_name(self) -> str:
        """Return what the layer is called."""
        return f"Frozen{self.mode.split('_')[0]}"

    def _get_name(self) -> str:
        return self.type_name()

    def hold(self, weights: list[dict[str, Tensor]]) -> None:
        """Pack weights, given for each layer and direction by the names of `weight_names`."""
        object.__setattr__(self, "_prepared", {})
        object.__setattr__(self, "_elsewhere", {})
        problem = self.obstacle()
        own = [{name: each.clone() for name, each in named.items()} for named in weights] if problem else None
        object.__setattr__(self, "_plain", own)
        panels = None if problem else kernels().pack(self.form(), weights)
        object.__setattr__(self, "_array", None if panels is None else panels.numpy())
        # No buffer: it stays on the CPU, in uint8, whatever the model is moved to, and out of exported programs.
        object.__setattr__(self, "panels", panels)
        if panels is not None:
            form = self.form()
            object.__setattr__(self, "_forms", tuple(form.each()))
            object.__setattr__(self, "_offsets", tuple(pairwise(kernels().offsets(form))))
            object.__setattr__(self, "_panel_layout", kernels().panel_layout_name(form))

    @property
    def cell_name(self) -> str:
        """Return the name of the cell."""
        return CELL_OF_MODE[self.mode]

    def obstacle(self) -> str | None:
        """Say why there are no kernels for this layer, or None where there are."""
        try:
            kernels().kernel_of(self.form())
        except Exception as error:  # whatever a library raises that cannot be loaded
            return f"the kernel cannot be compiled or loaded ({type(error).__name__}: {error})"
        return None

    def form(self):
        """Describe the layers to the backend."""
        width = self.proj_size or self.hidden_size
        return kernels().FrozenStack(
            self.cell_name,
            self.weights_format,
            self.num_layers,
            2 if self.bidirectional else 1,
            self.input_size,
            self.hidden_size,
            width,
            self.proj_size > 0,
            bool(self.bias),
        )

    def portable_weights(self) -> list[dict[str, Tensor]]:
        """Return the weights of each layer and direction, as `hold` was given them."""
        if self.__dict__.get("_plain") is not None:
            return self._plain
        return kernels().unpack(self.form(), self._array)

    def names(self) -> Iterator[tuple[int, str, str]]:
        """Yield, for each tensor of `state_dict`, its place in `portable_weights`, its name there and its full name."""
        directions = 2 if self.bidirectional else 1
        for layer, direction in product(range(self.num_layers), range(directions)):
            for name in self.weight_names():
                own = name.startswith(PARAMETER)
                field, scale = (name, "") if own else (name.removesuffix("_scale"), "_scale" * name.endswith("_scale"))
                known = field.removeprefix(PARAMETER) if own else FIELDS[field]
                yield layer * directions + direction, name, f"{known}_l{layer}{'_reverse' * direction}{scale}"

    def weight_names(self) -> tuple[str, ...]:
        """Name the tensors of each layer and direction."""
        return weight_names(self.cell_name, self.weights_format, self.proj_size > 0, bool(self.bias))

    def is_weight(self, name: str) -> bool:
        """Say whether an attribute is named like a weight."""
        return name.startswith(("weight_", "bias_"))

    def tensors(self) -> dict[str, Tensor]:
        """Return copies of all tensors of `state_dict`. They refuse to be changed in place."""
        portable = self.portable_weights()
        with torch.inference_mode():
            return {full: portable[place][name].clone() for place, name, full in self.names()}

    def __getattr__(self, name: str) -> Any:
        if "weights_format" in self.__dict__ and self.is_weight(name):
            weight = self.weight_named(name)
            if weight is not None:
                return weight
        return super().__getattr__(name)

    @_torch.constant_in_graphs
    def weight_named(self, name: str) -> Tensor | None:
        """Return a copy of one weight, or None if there is none of the name. Graphs keep it as a constant."""
        return self.tensors().get(name)

    def __setattr__(self, name: str, value: Any) -> None:
        self.refuse_change(name)
        super().__setattr__(name, value)

    def __delattr__(self, name: str) -> None:
        self.refuse_change(name)
        super().__delattr__(name)

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        self.refuse_change(name)
        super().register_parameter(name, param)

    def refuse_change(self, name: str) -> None:
        """Raise RuntimeError where an attribute is one that panels depend on, or a weight."""
        if name in FIXED or name in NOT_IN_STATE or self.is_weight(name):
            raise RuntimeError(f"{self.type_name()}: {name} is frozen; change the layer before rnnfast.freeze")

    def __prepare_scriptable__(self):
        raise TypeError(f"torch.jit.script cannot compile {self.type_name()}: use torch.jit.trace or torch.export")

    def _save_to_state_dict(self, destination, prefix, keep_vars) -> None:
        _torch.save_registered(self, destination, prefix, keep_vars)
        portable = self.portable_weights()
        for place, name, full in self.names():
            destination[prefix + full] = self.stored(name, portable[place][name]).clone()

    def stored(self, name: str, weight: Tensor) -> Tensor:
        """Return a weight as `state_dict` has it: integers as [G, H, I], so that layers of floats refuse them."""
        if weight.is_floating_point():
            return weight
        cell = cell_named(self.cell_name)
        return weight.unflatten(0, ({"w_ih": cell.gates, "w_hh": cell.recurrent}.get(name, 1), -1))

    def _load_from_state_dict(
        self, state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
    ) -> None:
        weights = [dict(named) for named in self.portable_weights()]
        known, errors, halves, largest = set(), len(error_msgs), [], FORMATS[self.weights_format].largest
        for place, name, full in self.names():
            known.add(prefix + full)
            given, own = state_dict.get(prefix + full), self.stored(name, weights[place][name])
            if given is None:
                missing_keys.append(prefix + full)
                other = f"{full}_scale" if not own.is_floating_point() else full.removesuffix("_scale")
                if other != full and prefix + other in state_dict:
                    halves.append(f"{prefix}{full}: expected it beside {prefix}{other}, got that alone")
            elif given.shape != own.shape or given.dtype != own.dtype:
                error_msgs.append(
                    f"{prefix}{full}: expected {own.dtype} of shape {list(own.shape)}, for weights frozen in "
                    f"{self.weights_format}, got {given.dtype} of shape {list(given.shape)}"
                )
            elif given.is_floating_point() and not given.isfinite().all():
                error_msgs.append(f"{prefix}{full}: expected finite numbers, got NaN or infinity")
            elif not given.is_floating_point() and (given < -largest).any():
                error_msgs.append(
                    f"{prefix}{full}: expected integers from -{largest} to {largest}, got {given.min().item()}"
                )
            else:
                weights[place][name] = given.detach().cpu().reshape(weights[place][name].shape)
        for name, buffer in self.named_buffers(recurse=False):
            known.add(prefix + name)
            if prefix + name in state_dict:
                buffer.copy_(state_dict[prefix + name])
        mine = [key for key in state_dict if key.startswith(prefix) and "." not in key[len(prefix) :]]
        unexpected_keys += [key for key in mine if strict and key not in known]
        if len(error_msgs) == errors:
            error_msgs += halves
        if len(error_msgs) == errors:
            self.hold(weights)

    def __getstate__(self) -> dict[str, Any]:
        state = self.__dict__.copy()
        for name in NOT_IN_STATE:
            state.pop(name, None)
        state["_meaning"] = [{name: each.clone() for name, each in named.items()} for named in self.portable_weights()]
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        weights = state.pop("_meaning")
        super().__setstate__(state)
        self.hold(weights)

    def flatten_parameters(self) -> None:
        """Do nothing, for callers of torch's modules."""

    def constants(self, wide: bool = False) -> list[dict[str, Tensor]]:
        """Return what `portable_weights` does as constants of a program that is being exported.

        bfloat16 is int16 there, or float32 if `wide`. Every call of the program gets the same tensors, which torch
        would copy if they were lifted.
        """
        if self.__dict__.get("_plain") is not None:
            return self._plain
        arrays = kernels().unpacked(self.form(), self._array)
        widened = kernels().widened if wide else lambda array: array
        return [{name: torch.from_dlpack(widened(each)) for name, each in named.items()} for named in arrays]

    def dequantised(self, portable: list[dict[str, Tensor]] | None = None) -> list[Tensor]:
        """Return float32 weights in the order of `torch.nn.LSTM._flat_weights`, or of `rnnfast.Recurrent.weights`."""
        found = []
        parameters = [name for name in self.weight_names() if name.startswith(PARAMETER)]
        for named in self.portable_weights() if portable is None else portable:
            for name in ("w_ih", "w_hh", "b_ih", "b_hh", "w_hr", *parameters):
                if name in named:
                    scale, weight = named.get(f"{name}_scale"), named[name]
                    found.append(weight.float() if scale is None else weight.float() * scale[:, None])
        return found


def weight_shapes(layer: Any) -> list[dict[str, tuple[int, ...]]]:
    """Name the weights of an RNN, LSTM or GRU, and their shapes, for each layer and direction."""
    width, directions = layer.proj_size or layer.hidden_size, 2 if layer.bidirectional else 1
    columns = cell_named(CELL_OF_MODE[layer.mode]).gates * layer.hidden_size
    found = []
    for n, suffix in product(range(layer.num_layers), ("", "_reverse")[:directions]):
        inputs = layer.input_size if n == 0 else directions * width
        shapes: dict[str, tuple[int, ...]] = {"weight_ih": (columns, inputs), "weight_hh": (columns, width)}
        if layer.bias:
            shapes.update({"bias_ih": (columns,), "bias_hh": (columns,)})
        if layer.proj_size:
            shapes.update({"weight_hr": (width, layer.hidden_size)})
        found.append({f"{name}_l{n}{suffix}": shape for name, shape in shapes.items()})
    return found
