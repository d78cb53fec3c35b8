"""The weights of frozen layers: panels for this machine's processor, and tensors that mean the same anywhere."""

from collections.abc import Iterator
from itertools import pairwise, product
from typing import Any

import torch
from torch import Tensor, nn

from rnnfast import _torch
from rnnfast.frozen_ops import kernels, meaning_names
from rnnfast.modules import CELL_OF_MODE

# Attributes that `hold` makes.
NOT_IN_STATE = ("panels", "_array", "_plain", "_prepared", "_elsewhere", "_forms", "_places", "_processor")
FIELDS = {"w_ih": "weight_ih", "w_hh": "weight_hh", "w_hr": "weight_hr", "b_ih": "bias_ih", "b_hh": "bias_hh"}


class FrozenWeights(nn.Module):
    """The weights of a frozen layer: packed for this machine, and as tensors that mean the same anywhere."""

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
        """Pack weights, given for each layer and direction by the names of `meaning_names`."""
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
            object.__setattr__(self, "_places", tuple(pairwise(kernels().offsets(form))))
            object.__setattr__(self, "_processor", kernels().processor_of(form))

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
        return kernels().Form(
            CELL_OF_MODE[self.mode],
            self.weights_format,
            self.num_layers,
            2 if self.bidirectional else 1,
            self.input_size,
            self.hidden_size,
            width,
            self.proj_size > 0,
            bool(self.bias),
        )

    def meaning(self) -> list[dict[str, Tensor]]:
        """Return the weights of each layer and direction, as `hold` was given them."""
        if self.__dict__.get("_plain") is not None:
            return self._plain
        return kernels().unpack(self.form(), self._array)

    def names(self) -> Iterator[tuple[int, str, str]]:
        """Yield, for each tensor of `state_dict`, its place in `meaning`, its name there and its full name."""
        directions = 2 if self.bidirectional else 1
        own = meaning_names(self.weights_format, self.proj_size > 0, bool(self.bias))
        for layer, direction in product(range(self.num_layers), range(directions)):
            for name in own:
                field, scale = name.removesuffix("_scale"), "_scale" if name.endswith("_scale") else ""
                full = f"{FIELDS[field]}_l{layer}{'_reverse' * direction}{scale}"
                yield layer * directions + direction, name, full

    def tensors(self) -> dict[str, Tensor]:
        """Return copies of all tensors of `state_dict`. They refuse to be changed in place."""
        meaning = self.meaning()
        with torch.inference_mode():
            return {full: meaning[place][name].clone() for place, name, full in self.names()}

    def __getattr__(self, name: str) -> Any:
        if name.startswith(("weight_", "bias_")) and "weights_format" in self.__dict__:
            tensors = self.tensors()
            if name in tensors:
                return tensors[name]
        return super().__getattr__(name)

    def __setattr__(self, name: str, value: Any) -> None:
        if name.startswith(("weight_", "bias_")) or name == "weights_format":
            raise RuntimeError(f"{self.type_name()}: {name} is frozen; change the layer before rnnfast.freeze")
        super().__setattr__(name, value)

    def _save_to_state_dict(self, destination, prefix, keep_vars) -> None:
        _torch.save_registered(self, destination, prefix, keep_vars)
        meaning = self.meaning()
        for place, name, full in self.names():
            destination[prefix + full] = meaning[place][name].clone()

    def _load_from_state_dict(
        self, state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
    ) -> None:
        weights = [dict(named) for named in self.meaning()]
        known, errors = set(), len(error_msgs)
        for place, name, full in self.names():
            known.add(prefix + full)
            given, own = state_dict.get(prefix + full), weights[place][name]
            if given is None:
                missing_keys.append(prefix + full)
            elif given.shape != own.shape or given.dtype != own.dtype:
                error_msgs.append(
                    f"{prefix}{full}: expected {own.dtype} of shape {list(own.shape)}, for weights frozen in "
                    f"{self.weights_format}, got {given.dtype} of shape {list(given.shape)}"
                )
            elif given.is_floating_point() and not given.isfinite().all():
                error_msgs.append(f"{prefix}{full}: expected finite numbers, got NaN or infinity")
            elif given.dtype == torch.int8 and (given == -128).any():
                error_msgs.append(f"{prefix}{full}: expected integers from -127 to 127, got -128")
            else:
                weights[place][name] = given.detach().cpu()
        for name, buffer in self.named_buffers(recurse=False):
            known.add(prefix + name)
            if prefix + name in state_dict:
                buffer.copy_(state_dict[prefix + name])
        mine = [key for key in state_dict if key.startswith(prefix) and "." not in key[len(prefix) :]]
        unexpected_keys += [key for key in mine if strict and key not in known]
        if len(error_msgs) == errors:
            self.hold(weights)

    def __getstate__(self) -> dict[str, Any]:
        state = self.__dict__.copy()
        for name in NOT_IN_STATE:
            state.pop(name, None)
        state["_meaning"] = [{name: each.clone() for name, each in named.items()} for named in self.meaning()]
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        weights = state.pop("_meaning")
        super().__setstate__(state)
        self.hold(weights)

    def flatten_parameters(self) -> None:
        """Do nothing, for callers of torch's modules."""

    def dequantised(self) -> list[Tensor]:
        """Return float32 weights in the order of `torch.nn.LSTM._flat_weights`."""
        found = []
        for named in self.meaning():
            for name in ("w_ih", "w_hh", "b_ih", "b_hh", "w_hr"):
                if name in named:
                    scale = named.get(f"{name}_scale")
                    found.append(named[name].float() * (1.0 if scale is None else scale[:, None]))
        return found
