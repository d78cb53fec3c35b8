"""What `explain` says: of one call of a layer or cell, and of every recurrent layer that a model's call runs."""

import sys
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.nn.utils.rnn import PackedSequence

from rnnfast import limits, validate
from rnnfast.accelerate import Finding, survey
from rnnfast.backends import measured
from rnnfast.backends.dispatch import Choice, choose, choose_step, load
from rnnfast.call import Call
from rnnfast.cell_modules import RNNCellBase
from rnnfast.frozen import Frozen
from rnnfast.modules import RNNBase
from rnnfast.recurrent import Recurrent
from rnnfast.spec import shown

OURS = (RNNBase, RNNCellBase, Recurrent, Frozen)


@dataclass(frozen=True)
class Explanation:
    """Who runs a call. Prints as one line.

    backend: its name.
    kernel: what it launches.
    reason: why this backend.
    milliseconds: time of a call without gradients, where it was measured, else None.
    fraction: share of the machine's limit that this call reaches, where it was measured. The limit is the rate of a
        large product in this dtype, or that of a copy of as many bytes as the call reads and writes, whichever takes
        longer. None for weights frozen in bfloat16 or int8, of which torch has no product to compare with.
    """

    backend: str
    kernel: str
    reason: str
    milliseconds: float | None = None
    fraction: float | None = None

    def __str__(self) -> str:
        told = f"{self.backend}: {self.kernel} ({self.reason})"
        if self.milliseconds is not None:
            told += f"; {self.milliseconds:.3g} ms"
        if self.fraction is not None:
            told += f", {self.fraction:.0%} of the machine's limit"
        return told


class LayerExplanation(NamedTuple):
    """What runs one layer of a model. calls: how often it was called. explanation: of its first call, None without."""

    name: str
    type: str
    calls: int
    explanation: Explanation | None

    def __str__(self) -> str:
        often = f", {self.calls} calls" if self.calls > 1 else ""
        return f"{self.name or 'the model itself'}: {self.type}{often}, {self.explanation or 'not called'}"


class ModelExplanation(tuple[LayerExplanation, ...]):
    """What runs each recurrent layer of a model. Prints as a line for each."""

    def __str__(self) -> str:
        return "\n".join(map(str, self)) or "no recurrent layer"


def explain_layer(
    module: nn.Module, input: Tensor | PackedSequence, lengths=None, resets=None, all_states=False
) -> Explanation:
    """Explain one call of a layer of rnnfast."""
    data = input.data if isinstance(input, PackedSequence) else input
    needs_ours = resets is not None or all_states
    if isinstance(module, Frozen):
        return explain_frozen(module, data, needs_ours)
    if isinstance(module, RNNCellBase):
        cell, projection = module.equations, 0
        dtype = dtype_of(cell, data)
        choice = choose_step(cell, data.device, data.dtype)
        if choice.backend != "torch":
            choice = choose(cell, data.device, dtype, False)
    elif isinstance(module, Recurrent):
        cell, projection = module.cell.identity, 0
        dtype = dtype_of(cell, data)
        choice = choose(cell, data.device, dtype, needs_ours)
    elif isinstance(module, RNNBase):
        cell, projection = module.options().cell, module.proj_size
        dtype = dtype_of(cell, data)
        known = data is input and lengths is None and not needs_ours and dtype == data.dtype
        choice = choose(cell, data.device, dtype, needs_ours, sizes_of(module, data) if known else None)
    else:
        raise TypeError(f"explain: expected a module of rnnfast, got {type(module).__name__}")
    kernel = kernel_of(choice, cell, module.hidden_size, projection, data.device, dtype)
    return Explanation(choice.backend, kernel, choice.reason)


def dtype_of(cell: str, data: Tensor) -> torch.dtype:
    """Return the dtype in which a call without initial states computes: that of autocast where it is at work."""
    dtype = validate.autocast_dtype(cell, data.device.type, data.dtype) if validate.is_cast(data.dtype) else None
    return data.dtype if dtype is None else dtype


def sizes_of(module: RNNBase, input: Tensor) -> measured.Sizes | None:
    """Return the sizes of a call without initial states."""
    x = input if validate.input_is_batched(module.options(), input) else input[:, None]
    if module.batch_first and input.dim() == 3:
        x = x.transpose(0, 1)
    return measured.sizes_of_call(Call(module.options(), x, (), module.weights()))


def explain_frozen(module: Frozen, data: Tensor, needs_ours: bool) -> Explanation:
    """Explain a call of a frozen layer."""
    cell, reason = module.options().cell, module.reason_for_plain(data)
    if reason is None:
        kernel = f"{shown(cell)} loop over packed {module.weights_format} weights"
        return Explanation("numba", kernel, f"weights are frozen in {module.weights_format}")
    dtype = validate.autocast_dtype(cell, data.device.type, torch.float32) or torch.float32
    choice = choose(cell, data.device, dtype, needs_ours)
    kernel = kernel_of(choice, cell, module.hidden_size, module.proj_size, data.device, dtype)
    return Explanation(choice.backend, kernel, f"weights are made float32 again: {reason}")


def kernel_of(choice: Choice, cell: str, hidden: int, projection: int, device: torch.device, dtype: torch.dtype) -> str:
    """Name what a backend launches."""
    if choice.backend == "torch":
        return f"torch.{shown(cell)}"
    if choice.backend == "reference":
        return f"plain loop over {shown(cell)}"
    return load(choice.backend).describe(cell, hidden, projection, device, dtype)


def is_ours(module: object) -> bool:
    """Say whether a module is a layer or a cell of rnnfast."""
    return isinstance(module, OURS)


def with_limit(
    module: Any, explanation: Explanation, arguments: tuple[Any, ...], keywords: dict[str, Any]
) -> Explanation:
    """Measure a call of a layer or cell, and say so."""
    call = partial(module, *arguments, **keywords)
    input = input_of(module, arguments, keywords)
    weights, lengths = weights_of(module), keywords.get("lengths")
    milliseconds, fraction = limits.measured(call, stand_in(module) if input is None else input, weights, lengths)
    known = input is not None and (not isinstance(module, Frozen) or module.weights_format == "float32")
    return replace(explanation, milliseconds=milliseconds, fraction=fraction if known else None)


def explain_model(
    model: nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any], measure: bool
) -> ModelExplanation:
    """Call a model once, and explain the first call of each of its recurrent layers and cells."""
    findings = {each.name: each for each in survey(model)}
    layers = {name: module for name, module in model.named_modules() if name in findings}
    calls: dict[str, list[tuple[tuple[Any, ...], dict[str, Any]]]] = {name: [] for name in layers}
    explained: dict[str, Explanation] = {}

    def note(name: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if name not in explained:
            explained[name] = explain_called(module, findings[name], args, kwargs)
        calls[name].append((args, kwargs) if measure and not calls[name] else ((), {}))

    with buffers_kept(model), ExitStack() as hooks:
        if "torch._dynamo" in sys.modules:
            hooks.enter_context(torch.compiler.set_stance("force_eager"))  # compiled code may have no place for hooks
        if any(isinstance(each, Frozen) for each in layers.values()):
            hooks.enter_context(torch.no_grad())  # as any call of a frozen layer behind parameters
        for name, module in layers.items():
            if isinstance(module, torch.jit.ScriptModule):  # takes no hooks
                explained[name] = Explanation("torch", f"torch.jit's {module.original_name}", findings[name].reason)
                continue
            handle = module.register_forward_pre_hook(partial(note, name), with_kwargs=True)
            hooks.callback(handle.remove)
        model(*arguments, **keywords)
    if measure:
        explained |= {n: with_limit(layers[n], each, *calls[n][0]) for n, each in explained.items() if calls[n]}
    return ModelExplanation(
        LayerExplanation(name, each.type, len(calls[name]), explained.get(name)) for name, each in findings.items()
    )


def explain_called(module: nn.Module, finding: Finding, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Explanation:
    """Explain a call of a layer, torch's own among them."""
    if not is_ours(module):
        kind = next(base for base in type(module).__mro__ if base.__module__.startswith("torch.nn.modules."))
        return Explanation("torch", f"torch.nn.{kind.__name__}", finding.reason)
    input = input_of(module, args, kwargs)
    input = stand_in(module) if input is None else input
    given = kwargs.get("lengths"), kwargs.get("resets"), kwargs.get("all_states", False)
    return explain_layer(module, input, *given)


def input_of(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | PackedSequence | None:
    """Return the input of a layer's call: a subclass may be given it by another name, in a container, or not at all."""
    found = (each for each in tensors_in((*args, *kwargs.values())) if fits(module, each))
    return next(found, None)


def tensors_in(given: Any) -> Iterator[Tensor | PackedSequence]:
    """Yield what a layer's input may be in nested containers."""
    if isinstance(given, (Tensor, PackedSequence)):
        yield given
    elif isinstance(given, (tuple, list, dict)):
        for each in given.values() if isinstance(given, dict) else given:
            yield from tensors_in(each)


def fits(module: Any, given: Tensor | PackedSequence) -> bool:
    """Say whether a layer would take this as its input."""
    data = given.data if isinstance(given, PackedSequence) else given
    return data.is_floating_point() and data.shape[-1:] == (module.input_size,)


def stand_in(module: Any) -> PackedSequence:
    """Return an input of unknown length for a layer whose class computes it: of one step, in the layer's dtype."""
    weight = next(iter(weights_of(module)))
    data = torch.empty(1, module.input_size, dtype=weight.dtype, device=weight.device)
    return PackedSequence(data, torch.ones(1, dtype=torch.long, device="cpu"))


def weights_of(module: Any) -> Iterable[Any]:
    """Return what a layer multiplies with, and its biases."""
    if isinstance(module, Frozen):
        return module.like_weights()
    return module.weights() if isinstance(module, (RNNBase, Recurrent)) else module.parameters()


@contextmanager
def buffers_kept(model: nn.Module) -> Iterator[None]:
    """Put a model's buffers, such as running means, and torch's random state back after a call."""
    kept = [(buffer, buffer.clone()) for buffer in model.buffers() if not is_lazy(buffer) and not is_expanded(buffer)]
    try:
        with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
            yield
    finally:
        for buffer, before in kept:
            with torch.inference_mode(buffer.is_inference()), torch.no_grad():
                buffer.copy_(before)


def is_expanded(tensor: Tensor) -> bool:
    """Say whether elements of a tensor share memory, so that nothing can be written to it."""
    return tensor.layout is torch.strided and any(
        s == 0 and n > 1 for s, n in zip(tensor.stride(), tensor.shape, strict=True)
    )
