"""The tensors of a case: their values, with NaN where nothing may be read, and their strides."""

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

from tests.fuzz.cases import Case

COMPLEX = {torch.float64: torch.complex128, torch.float32: torch.complex64}


def weight_shapes(case: Case) -> list[tuple[int, ...]]:
    """Return the shapes of the weights, in torch's order."""
    gates = {"lstm": 4, "gru": 3}.get(case.cell, 1) * case.hidden_size
    width, found = case.proj_size or case.hidden_size, list[tuple[int, ...]]()
    for layer in range(case.layers):
        inputs = width * case.directions if layer else case.input_size
        shapes: list[tuple[int, ...]] = [(gates, inputs), (gates, width)]
        shapes += [(gates,), (gates,)] if case.bias else []
        shapes += [(width, case.hidden_size)] if case.proj_size else []
        found += shapes * case.directions
    return found


class Values:
    """What one call is given, in float64 but representable in the case's dtype, in padded time-major form.

    leaves: x, h, c and w0, w1, ... Those of `given` are handed to the layer. along: a direction for each leaf.
    incoming: a gradient for each result.
    """

    def __init__(self, case: Case, call: int):
        random = torch.Generator().manual_seed(case.seed * 10 + call)
        dtype = getattr(torch, case.dtype)

        def make(*size: int, layout: str, scale: float = 1.0) -> Tensor:
            tensor = torch.randn(*size, generator=random, dtype=torch.float64) * scale
            if layout == "expanded" and size:
                at = int(torch.randint(len(size), (), generator=random))
                tensor = tensor[(slice(None),) * at + (slice(1),)].expand(size).clone()
            return tensor.to(dtype).double()

        steps, batch, hidden = case.steps, case.batch, case.hidden_size
        width, rows = case.proj_size or hidden, case.layers * case.directions
        names = ("h", "c") if case.cell == "lstm" else ("h",)
        sizes = {"h": (rows, batch, width), "c": (rows, batch, hidden)}
        lengths = torch.tensor(case.lengths or (steps,) * batch, dtype=torch.long)
        self.resets = torch.rand(steps, batch, generator=random) < (0.3 if case.resets else 0.0)
        self.leaves = {"x": make(steps, batch, case.input_size, layout=case.x_layout)}
        for name in names:
            scale = 0.0 if case.hx == "none" else 1.0
            self.leaves[name] = make(*sizes[name], layout=case.hx_layout, scale=scale)
        if case.hx == "shared":
            self.leaves["c"] = self.leaves["h"]
        scale = max(case.hidden_size, 2) ** -0.5
        for n, shape in enumerate(weight_shapes(case)):
            self.leaves[f"w{n}"] = make(*shape, layout=case.weight_layout, scale=scale)
        self.along = {name: make(*leaf.shape, layout="plain") for name, leaf in self.leaves.items()}
        every = width * case.directions, hidden * case.directions
        outputs = {"output": (steps, batch, every[0])}
        outputs |= {f"final{s}": sizes[name] for s, name in enumerate(names)}
        if case.all_states:
            outputs |= {f"states{s}": (steps, batch, every[s]) for s in range(len(names))}
        self.incoming = {name: make(*size, layout=case.incoming_layout) for name, size in outputs.items()}
        # What stands in the padding, and a state that is reset before it is used, reaches nothing.
        padding = torch.arange(steps)[:, None] >= lengths
        self.poisoned = {name: leaf.clone() for name, leaf in self.leaves.items()}
        self.incoming_poisoned = {name: tensor.clone() for name, tensor in self.incoming.items()}
        self.along_poisoned = {name: tensor.clone() for name, tensor in self.along.items()}
        self.poisoned["x"][padding] = torch.nan
        if case.x_layout == "expanded":
            self.poisoned["x"] = self.leaves["x"]
        if case.incoming_layout != "expanded":
            for name in {"output", "states0", "states1"} & self.incoming.keys():
                self.incoming_poisoned[name][padding] = torch.nan
        self.along_poisoned["x"][padding] = torch.nan
        if case.resets and steps and case.hx_layout != "expanded":
            for name in names:
                self.poisoned[name][:, self.resets[0] & (lengths > 0)] = torch.nan

    def wanted(self, case: Case) -> list[str]:
        """Return the names of the leaves that want gradients."""
        wants = ["x"] if case.x_grad else []
        wants += [name for name in ("h", "c") if name in self.leaves and case.hx not in ("none", "no_grad")]
        if case.hx == "shared":
            wants.remove("c")
        weights = [name for name in self.leaves if name.startswith("w")]
        return wants + [name for n, name in enumerate(weights) if not case.frozen or n % case.frozen]


def laid_out(tensor: Tensor, layout: str) -> Tensor:
    """Return an equal tensor with other strides, in memory of its own."""
    if layout == "transposed" and tensor.dim() > 1:
        return tensor.transpose(0, -1).clone(memory_format=torch.contiguous_format).transpose(0, -1)
    if layout == "sliced" and tensor.dim():
        room = tensor.new_full((*tensor.shape[:-1], 2 * tensor.shape[-1]), torch.nan)
        room[..., ::2] = tensor
        return room[..., ::2]
    if layout == "offset":
        room = tensor.new_full((tensor.numel() + 1,), torch.nan)
        room[1:] = tensor.flatten()
        return room[1:].view(tensor.shape)
    if layout == "expanded":
        for at in range(tensor.dim()):
            one = tensor[(slice(None),) * at + (slice(1),)]
            if tensor.shape[at] > 1 and torch.equal(one.expand(tensor.shape), tensor):
                return one.clone().expand(tensor.shape)
    if layout == "negated" and tensor.dtype in COMPLEX:
        view = torch.complex(torch.zeros_like(tensor), -tensor).conj().imag
        return view if tensor.numel() % 2 else torch._neg_view(-tensor.contiguous())
    return tensor.clone(memory_format=torch.contiguous_format)


def to_user(case: Case, tensor: Tensor) -> Tensor:
    """Bring a sequence [T, B, *] into the case's form; of a PackedSequence, its data."""
    if case.packed:
        return pack(case, tensor).data
    if case.form == "unbatched":
        return tensor[:, 0]
    return tensor.transpose(0, 1) if case.batch_first else tensor


def pack(case: Case, tensor: Tensor) -> PackedSequence:
    """Pack a sequence [T, B, *]."""
    assert case.lengths is not None
    return pack_padded_sequence(tensor, torch.tensor(case.lengths), enforce_sorted=case.form == "packed_sorted")


def from_user(case: Case, tensor: Tensor) -> Tensor:
    """Undo `to_user`."""
    if case.packed:
        like = pack(case, tensor.new_zeros(case.steps, case.batch, 1))
        return pad_packed_sequence(like._replace(data=tensor), total_length=case.steps)[0]
    if case.form == "unbatched":
        return tensor.unsqueeze(1)
    return tensor.transpose(0, 1) if case.batch_first else tensor
