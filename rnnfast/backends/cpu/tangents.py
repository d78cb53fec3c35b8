"""Tangents of a layer and of its gradients by the Numba kernels, which know float32 and float64; halves are converted.

The names are those of the fields and bases in `rnnfast_kernels.cpu.plan.tangents`: `name_dot` is the tangent of `name`.
"""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from itertools import chain
from typing import Any

import torch
from rnnfast_kernels.cpu.plan import tangents as plan_tangents
from torch import Tensor

from rnnfast.backends.cpu import executable
from rnnfast.backends.cpu.arguments import described
from rnnfast.backends.cpu.available import WIDER
from rnnfast.backends.cpu.executable import Buffer, Executable
from rnnfast.spec import Gradients, Layer, Needs, OutputTangents, States, Tangents, Weights


def in_dtype(tensors: Any, dtype: torch.dtype) -> Any:
    """Convert all tensors of a structure."""
    if isinstance(tensors, Tensor):
        return tensors.to(dtype)
    if isinstance(tensors, Layer):
        x, hx, weights = in_dtype((tensors.x, tensors.hx, tensors.weights), dtype)
        return replace(tensors, x=x, hx=hx, weights=weights)
    if not isinstance(tensors, (tuple, list)):
        return tensors
    parts = [in_dtype(each, dtype) for each in tensors]
    return type(tensors)(*parts) if hasattr(tensors, "_fields") else type(tensors)(parts)


class TangentCall:
    """A layer's tensors, what its forward pass left, and the tangents, by name.

    kept: names of what forward left beside h. moves_x, moves_weights: whether x has a tangent, and the weights.
    """

    def __init__(self, layer: Layer, states: States, saved: States, tangents: Tangents):
        self.signature, self.tensors = described(layer)
        self.x = self.tensors["x"]
        residuals = executable.residual_buffers(self.signature)
        left = dict(zip(executable.STATES, states, strict=False)) | dict(zip(residuals, saved, strict=True))
        self.tensors |= {name: tensor.contiguous() for name, tensor in left.items()}
        self.kept = tuple(left)[1:]
        of_weights = [each for direction in tangents.weights for each in direction]
        self.moves_weights = any(each is not None for each in of_weights)
        self.moves_x = tangents.x is not None or not self.moves_weights  # the kernels want one of the two
        if self.moves_x:
            self.add("x", tangents.x)
        for name, each in zip(executable.state_names(self.signature, "{}_first"), tangents.hx, strict=True):
            self.add(name, each)
        if self.moves_weights:
            names = (f"{name}{d}" for d in range(len(layer.weights)) for name in Weights._fields)
            for name, each in zip(names, of_weights, strict=True):
                if name in self.tensors:
                    self.add(name, each)

    def add(self, name: str, tangent: Tensor | None) -> None:
        """Take the tangent of a tensor; None for 0."""
        zeros = partial(torch.zeros_like, memory_format=torch.contiguous_format)
        self.tensors[f"{name}_dot"] = zeros(self.tensors[name]) if tangent is None else tangent.contiguous()

    def run(self, record, results: dict[str, Buffer]) -> tuple[dict[str, Tensor], OutputTangents]:
        """Run a plan, and return its results and the tangents of the states."""
        left = {name: Buffer(tuple(self.tensors[name].shape)) for name in ("h", *self.kept)}
        finals = executable.state_buffers(
            self.signature, "{}_final", (len(self.signature.form.reverse), self.signature.batch)
        )
        results = results | {f"{name}_dot": each for name, each in (left | finals).items()}
        code = executable.code_of(self.signature, 2)
        fixed = executable.fixed_values(self.signature)
        recorded = Executable(code, self.x.dtype, record, tuple(self.tensors), results, fixed)
        found = recorded.run_named(self.x, self.tensors)
        pairs = [
            [found[f"{name}_dot"] for name in executable.state_names(self.signature, f)] for f in ("{}", "{}_final")
        ]
        return found, OutputTangents(*map(tuple, pairs))


def jvp(layer: Layer, states: States, saved: States, tangents: Tangents) -> OutputTangents:
    """Return the tangents of a layer's states."""
    dtype = layer.x.dtype
    if dtype in WIDER:
        return in_dtype(jvp(*in_dtype((layer, states, saved, tangents), WIDER[dtype])), dtype)
    at = TangentCall(layer, states, saved, tangents)
    shape, biased = executable.shape_of(at.signature), at.signature.form.present.b_ih
    return at.run(partial(plan_tangents.jvp, shape, at.kept, at.moves_x, at.moves_weights, biased), {})[1]


def hvp(
    layer: Layer,
    states: States,
    saved: States,
    dstates: Sequence[Tensor | None],
    dfinals: Sequence[Tensor | None],
    tangents: Tangents,
    needs: Needs,
) -> tuple[Gradients, OutputTangents]:
    """Return the tangents of the results of `backward`, and of the states."""
    dtype = layer.x.dtype
    if dtype in WIDER:
        given = in_dtype((layer, states, saved, dstates, dfinals, tangents, needs), WIDER[dtype])
        return in_dtype(hvp(*given), dtype)
    at = TangentCall(layer, states, saved, tangents)
    signature = at.signature
    names = executable.state_names(signature, "d{}"), executable.state_names(signature, "d{}_final")
    pairs = chain(zip(names[0], dstates, strict=True), zip(names[1], dfinals, strict=True))
    given = {name: gradient.contiguous() for name, gradient in pairs if gradient is not None}
    at.tensors |= given
    results = {"dx": Buffer(signature.x_shape)} if needs.x else {}
    results |= executable.state_buffers(signature, "d{}_first", (len(layer.reverse), signature.batch))
    if needs.weights:
        weights = executable.weight_names(signature)
        results |= {f"d{name}": Buffer(tuple(at.tensors[name].shape)) for name in weights}
    record = partial(
        plan_tangents.hvp, executable.shape_of(signature), at.kept, tuple(given), at.moves_x, at.moves_weights,
        needs.x, needs.weights, signature.form.present.b_ih,
    )  # fmt: skip
    found, of_states = at.run(record, results)
    hx = tuple(found[name] if needs.hx else None for name in executable.state_names(signature, "d{}_first"))
    dweights = tuple(
        Weights._make([found.get(f"d{name}{d}") for name in Weights._fields]) for d in range(len(layer.weights))
    )
    return Gradients(found.get("dx"), hx, dweights), of_states
