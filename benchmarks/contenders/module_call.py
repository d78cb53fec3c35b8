"""What the contenders with torch's module interface share: parameters, leaf tensors, the training step, the results."""

from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence

from benchmarks.cases import DECLARED, PASSES, declared_layer
from benchmarks.contenders import Call
from benchmarks.workload import Workload, torch_dtype


class Result(NamedTuple):
    output: Tensor  # [T, B, D*P], or [rows, D*P] when packed
    finals: tuple[Tensor, ...]
    c_states: Tensor | None = None  # [T, B, H], form `states`


@dataclass(frozen=True)
class Inputs:
    """A workload's tensors as a module takes them. leaf: the tensor that receives the input's gradient."""

    x: Tensor | PackedSequence
    leaf: Tensor
    dy: Tensor
    hx: Any
    lengths: Tensor | None
    resets: Tensor | None


def build(namespace: Any, work: Workload) -> nn.Module:
    """Make `namespace.RNN`, `.LSTM` or `.GRU`, or the layer of a declared cell, with the workload's parameters."""
    case = work.case
    if case.cell in DECLARED:
        module = declared_layer(case, device=work.device, dtype=torch_dtype(case.dtype))
        module.load_state_dict(work.weights)
        return module.train(case.mode in PASSES)
    options = {"proj_size": case.proj} if case.proj else {}
    module = getattr(namespace, case.cell.upper())(
        case.I, case.H, num_layers=case.layers, bias=case.bias, bidirectional=case.bidirectional, **options
    )
    # In the case's dtype before the weights are loaded, or they would be rounded to float32 on their way to float64.
    module = module.to(device=work.device, dtype=torch_dtype(case.dtype))
    module.load_state_dict(work.weights)
    return module.train(case.mode in PASSES)


def inputs(work: Workload) -> Inputs:
    case = work.case
    x, dy = work.cast(work.x), work.cast(work.dy)
    if case.form == "permuted":
        x = x.permute(1, 2, 0).contiguous().permute(2, 0, 1)
    if case.form == "packed":
        packed = pack_padded_sequence(x, work.lengths, enforce_sorted=False)
        dy = pack_padded_sequence(dy, work.lengths, enforce_sorted=False).data
        leaf = packed.data.detach().requires_grad_(case.mode in PASSES)
        x = packed._replace(data=leaf)
    else:
        x = leaf = x.requires_grad_(case.mode in PASSES)
    states = tuple(work.cast(state) for state in work.hx)
    return Inputs(
        x=x,
        leaf=leaf,
        dy=dy,
        hx=None if case.mode != "step" else states if case.cell == "lstm" else states[0],
        lengths=work.lengths,
        resets=None if work.resets is None else work.resets.to(work.device),
    )


def finals(states: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return states if isinstance(states, tuple) else (states,)


def named_gradients(module: nn.Module) -> dict[str, Tensor]:
    return {f"grad {name}": parameter.grad for name, parameter in module.named_parameters()}


def forward_plain(module: nn.Module, given: Inputs) -> Result:
    """Call the module as torch.nn's are called, on a tensor or a PackedSequence."""
    output, states = module(given.x, given.hx)
    return Result(output if isinstance(output, Tensor) else output.data, finals(states))


def call(
    work: Workload,
    module: nn.Module,
    forward: Callable[[nn.Module, Inputs], Result],
    context: Callable[[], AbstractContextManager] = nullcontext,
    note: str = "",
    gradients: Callable[[], dict[str, Tensor]] | None = None,
) -> Call:
    """Make the Call of a module whose forward in this case's form is `forward`.

    gradients: hands out the parameters' gradients where the module does not hold them under torch's names.
    """
    given = inputs(work)
    parameters = list(module.parameters())
    training = work.case.mode in PASSES

    def infer() -> Result:
        return forward(module, given)

    def forget() -> None:
        for tensor in (given.leaf, *parameters):
            tensor.grad = None

    def train() -> Result:
        forget()
        result = forward(module, given)
        result.output.backward(given.dy)
        return result

    def penalize() -> Result:
        forget()
        result = forward(module, given)
        (gradient,) = torch.autograd.grad(result.output, given.leaf, given.dy, create_graph=True)
        (gradient.norm(dim=-1) - 1).square().sum().backward(inputs=parameters)
        return result

    def read(result: Result) -> dict[str, Tensor]:
        tensors = {"output": result.output, **dict(zip("hc", result.finals, strict=False))}
        if result.c_states is not None:
            tensors["every c"] = result.c_states
        if training:
            tensors |= {} if given.leaf.grad is None else {"grad x": given.leaf.grad}
            tensors |= gradients() if gradients else named_gradients(module)
        return {name: tensor.detach().to("cpu", torch.float64) for name, tensor in tensors.items()}

    @contextmanager
    def surroundings():
        with ExitStack() as stack:
            stack.enter_context(nullcontext() if training else torch.no_grad())
            stack.enter_context(tf32(work.case.dtype == "tf32"))
            stack.enter_context(context())
            yield

    run = {"training": train, "penalty": penalize}.get(work.case.mode, infer)
    return Call(run, read, surroundings, note)


@contextmanager
def tf32(allowed: bool):
    """Allow or forbid TF32 in recurrent layers and in products, for every contender alike."""
    before = torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = allowed
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32 = before
