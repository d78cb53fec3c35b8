"""What the names in a cell's derived functions mean for torch tensors."""

import builtins
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional


def like(number: Tensor | float, tensor: Tensor) -> Tensor:
    """Return a number as a tensor of the kind of another."""
    return number if isinstance(number, Tensor) else tensor.new_full((), number)


def select(relation: Callable[[Tensor, Tensor], Tensor]) -> Callable[..., Tensor]:
    """Return a selection between two values, any of which may be a number."""

    def function(a, b, yes, no):
        tensor = next(each for each in (a, b, yes, no) if isinstance(each, Tensor))
        return torch.where(relation(like(a, tensor), like(b, tensor)), like(yes, tensor), like(no, tensor))

    return function


def with_numbers(function: Callable[[Tensor, Tensor], Tensor]) -> Callable[..., Tensor]:
    """Return a function of two tensors as one that takes numbers, too."""

    def extended(a, b):
        tensor = a if isinstance(a, Tensor) else b
        return function(like(a, tensor), like(b, tensor))

    return extended


class Surrogate(torch.autograd.Function):
    """A step at 0 with a derivative that is given."""

    generate_vmap_rule = True

    @staticmethod
    def forward(value, derivative):
        return (value > 0).to(value.dtype) + torch.zeros_like(derivative)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.shapes = inputs[0].shape, inputs[1].shape
        ctx.save_for_backward(inputs[1])
        ctx.save_for_forward(inputs[1])

    @staticmethod
    def backward(ctx, grad):
        (derivative,) = ctx.saved_tensors
        return (grad * derivative).sum_to_size(ctx.shapes[0]), None

    @staticmethod
    def jvp(ctx, change, _):
        (derivative,) = ctx.saved_tensors
        return change * derivative


def surrogate(value: Tensor, derivative: "Tensor | float") -> Tensor:
    return Surrogate.apply(value, like(derivative, value))


# Tracers look the builtins up in the globals of the code they trace.
FORWARD = {
    "__builtins__": builtins,
    "where_greater": select(torch.gt),
    "where_at_most": select(torch.le),
    "where_equal": select(torch.eq),
    **{
        name: getattr(torch, name)
        for name in (
            "sigmoid", "tanh", "relu", "exp", "expm1", "log", "log1p", "sqrt", "rsqrt", "abs", "sign", "sin", "cos",
            "erf",
        )
    },
    "softplus": functional.softplus,
    "logsigmoid": functional.logsigmoid,
    "maximum": with_numbers(torch.maximum),
    "minimum": with_numbers(torch.minimum),
    "clamp_low": lambda x, low: torch.clamp(x, min=low),
    "clamp_high": lambda x, high: torch.clamp(x, max=high),
    "bounded": functional.hardtanh,
    "detach": torch.Tensor.detach,
    "surrogate": surrogate,
}  # fmt: skip

# A part of the Jacobian that is zero for every input is None here.
BACKWARD = {
    **FORWARD,
    "sigmoid_backward": lambda dy, y: dy * (y - y * y),
    "tanh_backward": lambda dy, y: dy * (1 - y * y),
    "relu_backward": lambda dy, y: torch.where(y <= 0, 0.0, dy),
    "zeros_like": lambda y: None,
}
