"""Layers of declared cells, published and made up, beside a plain loop that calls the step in float64."""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from random import Random

import torch
from torch import Tensor, nn

import rnnfast
from rnnfast import cells, fast_path
from tests.fuzz import cases
from tests.fuzz.declared_loop import Named, compare, derive
from tests.fuzz.made_up import KINKED, KINKED_PAIRS, made_up, source
from tests.fuzz.tensors import from_user, laid_out, pack, to_user
from tests.recurrent_layers import everything

PUBLISHED = tuple(name for name, value in vars(cells).items() if isinstance(value, rnnfast.declare.Cell))
# Those whose results or gradients jump where rounding crosses a bound.
JUMPING = ("li_gru", "indrnn", "leaky_rnn", "recurrent_lif", "slstm")


@dataclass(frozen=True)
class Case:
    """The options of some calls; the default of each is its simplest value.

    form: as in `cases.Case`. hx: none, all of them, one by name, or a tuple with None. signals: which dimensions are
    broadcast, of each in turn. frozen: every n-th weight wants no gradient. derivative: first or second.
    """

    cell: str = "janet"
    input_size: int = 1
    hidden_size: int = 1
    layers: int = 1
    bidirectional: bool = False
    bias: bool = True
    batch_first: bool = False
    steps: int = 1
    batch: int = 1
    form: str = "padded"
    lengths: tuple[int, ...] | None = None
    resets: bool = False
    all_states: bool = False
    hx: str = "none"
    signals: str = "full"
    x_layout: str = "plain"
    weight_layout: str = "plain"
    x_grad: bool = True
    frozen: int = 0
    recompute: bool = False
    dtype: str = "float64"
    threads: int = 1
    mode: str = "train"
    derivative: str = "first"
    calls: int = 1
    seed: int = 0

    def __repr__(self) -> str:
        """Name what is not as simple as can be."""
        given = (f"{f.name}={getattr(self, f.name)!r}" for f in fields(self) if getattr(self, f.name) != f.default)
        return f"Case({', '.join(given)})"

    @property
    def packed(self) -> bool:
        """Say whether the input is a PackedSequence."""
        return self.form.startswith("packed")

    @property
    def declared(self) -> rnnfast.declare.Cell:
        """Return the cell."""
        if self.cell.startswith("made_up"):
            return made_up(int(self.cell.rsplit("_", 1)[1]))
        return everything if self.cell == "everything" else getattr(cells, self.cell)

    @property
    def jumps(self) -> bool:
        """Say whether rounding may change a result or a gradient by much."""
        if not self.cell.startswith("made_up"):
            return self.cell in JUMPING
        text = source(int(self.cell.rsplit("_", 1)[1]))[0]
        return any(each.split("(")[0] in text for each in KINKED + KINKED_PAIRS)


def legal(case: Case) -> Case:
    """Return the case with options that exclude one another put right."""
    change: dict = {"resets": False} if case.bidirectional else {}
    steps, batch, lengths = case.steps, case.batch, case.lengths
    if case.form == "unbatched":
        batch, lengths = 1, None
    if case.packed:
        steps, batch = max(steps, 1), max(batch, 1)
        lengths = lengths or (steps,) * batch
    if lengths is not None:
        lengths = tuple(min(n, steps) for n in (*lengths, *(steps,) * batch)[:batch])
    if case.packed and lengths is not None:
        lengths = (steps, *(max(n, 1) for n in lengths[1:]))
        if case.form == "packed_sorted":
            lengths = tuple(sorted(lengths, reverse=True))
    change |= {"steps": steps, "batch": batch, "lengths": lengths}
    if case.mode != "train":
        change |= {"derivative": "first", "recompute": False}
    if case.derivative != "first" and case.dtype in ("bfloat16", "float16"):
        change["dtype"] = "float32"
    return replace(case, **change)


def draw(random: Random) -> tuple[Case]:
    """Draw a case."""

    def rarely(likelihood: float, *others):
        return random.choice(others) if random.random() < likelihood else None

    def size(most: int) -> int:
        return random.choice((1, 2, 3, 4, 5, 8, 15, 16, 17, random.randint(1, most)))

    # To compile a cell takes seconds: few of those that were made up are new.
    number = random.randrange(3) if random.random() < 0.8 else random.randrange(10**6)
    steps, batch = random.choice((0, 1, 2, 3, 5, 7)), random.choice((0, 1, 1, 2, 3, 4, 9, 17))
    drawn = {
        "cell": rarely(0.7, *PUBLISHED) or f"made_up_{number}",
        "input_size": size(40),
        "hidden_size": size(40),
        "layers": rarely(0.35, 2, 3),
        "bidirectional": rarely(0.35, True),
        "bias": rarely(0.25, False),
        "batch_first": rarely(0.35, True),
        "steps": steps,
        "batch": batch,
        "form": rarely(0.4, "unbatched", "packed_sorted", "packed_unsorted"),
        "lengths": rarely(0.4, tuple(random.randint(0, steps) for _ in range(batch))),
        "resets": rarely(0.3, True),
        "all_states": rarely(0.25, True),
        "hx": rarely(0.7, "all", "one", "some"),
        "signals": rarely(0.5, "steps", "batch", "hidden", "mixed"),
        "x_layout": rarely(0.3, "transposed", "sliced", "offset", "expanded"),
        "weight_layout": rarely(0.15, "transposed", "sliced", "offset"),
        "x_grad": rarely(0.3, False),
        "frozen": rarely(0.2, 1, 2, 3),
        "recompute": rarely(0.08, True),
        "dtype": rarely(0.4, "float32", "float32", "float32", "bfloat16", "float16"),
        "threads": rarely(0.4, 2, 3),
        "mode": rarely(0.3, "no_grad", "inference"),
        "derivative": rarely(0.2, "second"),
        "calls": rarely(0.6, 2, 3, 4),
        "seed": random.randrange(1000),
    }
    return (legal(Case(**{name: value for name, value in drawn.items() if value is not None})),)


def simpler(case: Case) -> Iterator[tuple[Case]]:
    """Yield simpler cases."""
    return ((each,) for each in cases.simpler(case, legal))


class Values:
    """What one call is given, in float64 but representable in the case's dtype: x, states, signals and weights by name.

    In padded time-major form, signals broadcast. wanted: those that a gradient is asked of. incoming: by result.
    """

    def __init__(self, case: Case, call: int, module: rnnfast.Recurrent):
        random = torch.Generator().manual_seed(case.seed * 10 + call)

        def make(*size: int, scale: float = 1.0) -> Tensor:
            drawn = torch.randn(*size, generator=random, dtype=torch.float64) * scale
            return drawn.to(getattr(torch, case.dtype)).double()

        cell, directions = case.declared, 2 if case.bidirectional else 1
        rows = (case.layers * directions, case.batch, case.hidden_size)
        chosen = {"none": 0, "all": len(cell.states), "one": 1, "some": max(len(cell.states) - 1, 1)}[case.hx]
        self.states = cell.states[len(cell.states) - chosen :]
        self.leaves = {"x": make(case.steps, case.batch, case.input_size)}
        if case.x_layout == "expanded":
            self.leaves["x"][:] = self.leaves["x"][:, :1].clone()
        self.leaves |= {f"state {name}": make(*rows) for name in self.states}
        for n, name in enumerate(cell.signals):
            at = {"steps": 0, "batch": 1, "hidden": 2, "mixed": (n + case.seed) % 3}.get(case.signals)
            size = [1 if at == axis else full for axis, full in enumerate((case.steps, *rows[1:]))]
            self.leaves[f"signal {name}"] = make(*size)
        for name, weight in module.named_parameters():
            self.leaves[name] = make(*weight.shape, scale=max(case.hidden_size, 2) ** -0.5)
        self.resets = torch.rand(case.steps, case.batch, generator=random) < (0.3 if case.resets else 0.0)
        weights = [name for name, _ in module.named_parameters()]
        held = {name for n, name in enumerate(weights) if case.frozen and n % case.frozen == 0}
        self.wanted = [name for name in self.leaves if name not in held and (name != "x" or case.x_grad)]
        if case.mode != "train":
            self.wanted = []
        outputs = (case.steps, case.batch, directions * case.hidden_size)
        self.incoming = {"output": make(*outputs)} | {f"final {name}": make(*rows) for name in cell.states}
        if case.all_states:
            self.incoming |= {f"states {name}": make(*outputs) for name in cell.states}


def check(case: Case) -> str | None:
    """Run the calls of a case and say what is wrong, or None."""
    fast_path.recorded.clear()
    threads = torch.get_num_threads()
    torch.set_num_threads(case.threads)
    try:
        module = make_module(case)
        for call in range(case.calls):
            values = Values(case, call, module)
            problem = compare(case, values, run_ours(case, values, module))
            if problem is not None:
                return f"call {call + 1}: {problem}"
    except Exception as error:  # whatever it is, it is what was looked for
        return f"{type(error).__name__}: {error}"
    finally:
        torch.set_num_threads(threads)
    return None


def make_module(case: Case) -> rnnfast.Recurrent:
    """Make the layers of a case."""
    module = rnnfast.Recurrent(
        case.declared, case.input_size, case.hidden_size, case.layers, case.bias, case.batch_first,
        bidirectional=case.bidirectional, dtype=getattr(torch, case.dtype),
    )  # fmt: skip
    module.recompute = case.recompute
    return module


def run_ours(case: Case, values: Values, module: rnnfast.Recurrent) -> Named:
    """Run our layers and return results and gradients in padded time-major form, NaN in the padding of x."""
    dtype, cell, along = getattr(torch, case.dtype), case.declared, case.batch_first and not case.packed
    padding = torch.arange(case.steps)[:, None] >= torch.tensor(case.lengths or (case.steps,) * case.batch)
    leaves: Named = {}
    for name, value in values.leaves.items():
        if name == "x":
            value = value if case.x_layout == "expanded" else value.masked_fill(padding[..., None], torch.nan)
            leaves[name] = laid_out(to_user(case, value).to(dtype), case.x_layout)
        elif name.startswith("state"):
            leaves[name] = (value[:, 0] if case.form == "unbatched" else value).to(dtype)
        elif name.startswith("signal"):
            value = value[:, 0] if case.form == "unbatched" else value.transpose(0, 1) if along else value
            leaves[name] = value.to(dtype)
        else:
            setattr(module, name, nn.Parameter(laid_out(value.to(dtype), case.weight_layout), requires_grad=False))
            leaves[name] = getattr(module, name)
    for name in values.wanted:
        leaves[name] = leaves[name].requires_grad_()
    states = {name: leaves[f"state {name}"] for name in values.states}
    hx = states or None
    if case.hx in ("all", "some") and case.seed % 2:
        hx = tuple(states.get(name) for name in cell.states)
    lengths = None if case.packed or case.lengths is None else torch.tensor(case.lengths, dtype=torch.long)
    resets = values.resets if case.packed else to_user(case, values.resets)
    resets = resets.mT if case.packed and case.batch_first else resets
    x = pack(case, values.leaves["x"])._replace(data=leaves["x"]) if case.packed else leaves["x"]
    signals = {name: leaves[f"signal {name}"] for name in cell.signals}
    with {"no_grad": torch.no_grad, "inference": torch.inference_mode}.get(case.mode, contextlib.nullcontext)():
        output, finals, *rest = module(
            x, hx, signals=signals, lengths=lengths, resets=resets if case.resets else None, all_states=case.all_states
        )
    finals = finals if isinstance(finals, tuple) else (finals,)
    results = {"output": output.data if case.packed else output}
    results |= {f"final {name}": each for name, each in zip(cell.states, finals, strict=True)}
    for group in rest:
        group = group if isinstance(group, tuple) else (group,)
        named = zip(cell.states, group, strict=True)
        results |= {f"states {name}": each.data if case.packed else each for name, each in named}

    def in_users_form(name: str, tensor: Tensor) -> Tensor:
        if not name.startswith("final"):
            return to_user(case, tensor)
        return tensor[:, 0] if case.form == "unbatched" else tensor

    def back(name: str, tensor: Tensor) -> Tensor:
        base = name.split(" ", 1)[1] if name.startswith(("d ", "d2 ")) else name
        if base in ("x", "output") or base.startswith("states "):
            return from_user(case, tensor)
        if case.form == "unbatched" and base.split(" ")[0] in ("state", "signal", "final"):
            return tensor.unsqueeze(1)
        return tensor.transpose(0, 1) if along and base.startswith("signal") else tensor

    incoming = {name: in_users_form(name, tensor).to(dtype) for name, tensor in values.incoming.items()}
    found = derive(case, values.wanted, leaves, results, incoming)
    return {name: back(name, tensor) for name, tensor in found.items()}
