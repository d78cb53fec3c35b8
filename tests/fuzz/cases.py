"""One call of a layer with all its options: how it is drawn, and what is simpler than it."""

from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from random import Random

CELLS = ("rnn_tanh", "rnn_relu", "lstm", "gru")
LAYOUTS = ("plain", "transposed", "sliced", "offset", "expanded", "negated")
DTYPES = ("float64", "float32", "bfloat16", "float16")


@dataclass(frozen=True)
class Case:
    """The options of some calls; the default of each is its simplest value.

    form: packed_sorted is a PackedSequence without sorted_indices. hx: none, one that wants gradients or does not, a
    list, or one tensor for h and c. layouts: strides of the tensors that are given. frozen: every n-th weight wants no
    gradient. derivative: first, second (reverse over reverse) or jvp. results: those that have an incoming gradient.
    dropout: idle is that of a layer in evaluation, total drops everything between layers.
    """

    cell: str = "rnn_tanh"
    input_size: int = 1
    hidden_size: int = 1
    proj_size: int = 0
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
    x_layout: str = "plain"
    hx_layout: str = "plain"
    weight_layout: str = "plain"
    incoming_layout: str = "plain"
    x_grad: bool = True
    frozen: int = 0
    results: str = "all"
    dropout: str = "none"
    recompute: bool = False
    dtype: str = "float64"
    threads: int = 1
    mode: str = "train"
    derivative: str = "first"
    calls: int = 1
    functional: bool = False
    seed: int = 0

    def __repr__(self) -> str:
        """Name what is not as simple as can be."""
        given = (f"{f.name}={getattr(self, f.name)!r}" for f in fields(self) if getattr(self, f.name) != f.default)
        return f"Case({', '.join(given)})"

    @property
    def directions(self) -> int:
        """Return D."""
        return 2 if self.bidirectional else 1

    @property
    def packed(self) -> bool:
        """Say whether the input is a PackedSequence."""
        return self.form.startswith("packed")


def legal(case: Case) -> Case:
    """Return the case with options that exclude one another put right."""
    change: dict = {}
    if not case.hidden_size or not case.input_size:  # torch's modules refuse that
        change["functional"] = True
    if case.cell != "lstm":
        change["proj_size"] = 0
        if case.hx == "shared":
            change["hx"] = "given"
    elif case.proj_size:
        change["proj_size"] = max(min(case.proj_size, case.hidden_size - 1), 0)
        if change["proj_size"] and case.hx == "shared":
            change["hx"] = "given"
    if case.bidirectional:
        change["resets"] = False
    steps, batch = case.steps, case.batch
    lengths = case.lengths
    if case.form == "unbatched":
        batch, lengths = 1, None
    if case.packed:  # torch packs no empty tensors
        change |= {"input_size": max(case.input_size, 1), "hidden_size": max(case.hidden_size, 1)}
        steps, batch = max(steps, 1), max(batch, 1)
        lengths = lengths or (steps,) * batch
    if lengths is not None:
        lengths = tuple(min(n, steps) for n in (*lengths, *(steps,) * batch)[:batch])
    if case.packed and lengths is not None:
        lengths = (steps, *(max(n, 1) for n in lengths[1:]))
        if case.form == "packed_sorted":
            lengths = tuple(sorted(lengths, reverse=True))
    change |= {"steps": steps, "batch": batch, "lengths": lengths}
    if case.mode == "autocast":
        change |= {"dtype": "float32", "derivative": "first"}
    if case.mode in ("no_grad", "inference", "inference_tensors"):
        change |= {"derivative": "first", "recompute": False}
    if case.derivative == "jvp":
        change |= {"functional": True, "recompute": False}
        # torch makes no dual numbers of expanded tensors.
        layouts = {name: getattr(case, name) for name in ("x_layout", "hx_layout", "weight_layout")}
        change |= {name: "plain" for name, layout in layouts.items() if layout == "expanded"}
    if case.derivative != "first" and case.dtype in ("bfloat16", "float16"):
        change["dtype"] = "float32"
    negated = [f.name for f in fields(case) if f.name.endswith("_layout") and getattr(case, f.name) == "negated"]
    if change.get("dtype", case.dtype) in ("bfloat16", "float16"):
        change |= dict.fromkeys(negated, "sliced")
    return replace(case, **change)


def draw(random: Random) -> Case:
    """Draw a case."""

    def rarely(likelihood: float, *others):
        return random.choice(others) if random.random() < likelihood else None

    def size(most: int) -> int:
        return random.choice((1, 2, 3, 4, 5, 8, 15, 16, 17, random.randint(1, most)))

    steps, batch = random.choice((0, 1, 2, 3, 5, 7)), random.choice((0, 1, 1, 2, 3, 4, 9, 17))
    hidden = size(40) if random.random() > 0.07 else random.choice((0, 130, 257))
    lengths = tuple(random.randint(0, steps) for _ in range(batch))
    if random.random() < 0.3:
        lengths = tuple(sorted(lengths, reverse=True))
    drawn = {
        "cell": random.choice(CELLS),
        "input_size": 0 if random.random() < 0.03 else size(40),
        "hidden_size": hidden,
        "proj_size": rarely(0.3, 1, 2, 5, 16),
        "layers": rarely(0.4, 2, 3),
        "bidirectional": rarely(0.35, True),
        "bias": rarely(0.25, False),
        "batch_first": rarely(0.35, True),
        "steps": steps,
        "batch": batch,
        "form": rarely(0.4, "unbatched", "packed_sorted", "packed_unsorted"),
        "lengths": rarely(0.4, lengths),
        "resets": rarely(0.3, True),
        "all_states": rarely(0.25, True),
        "hx": rarely(0.7, "given", "given", "no_grad", "list", "shared"),
        "x_layout": rarely(0.35, *LAYOUTS),
        "hx_layout": rarely(0.25, *LAYOUTS),
        "weight_layout": rarely(0.15, *LAYOUTS),
        "incoming_layout": rarely(0.3, *LAYOUTS),
        "x_grad": rarely(0.3, False),
        "frozen": rarely(0.2, 1, 2, 3),
        "results": rarely(0.4, "output", "finals", "last"),
        "dropout": rarely(0.15, "idle", "total"),
        "recompute": rarely(0.08, True),
        "dtype": rarely(0.6, "float32", "float32", "bfloat16", "float16"),
        "threads": rarely(0.4, 2, 3),
        "mode": rarely(0.35, "no_grad", "inference", "inference_tensors", "autocast"),
        "derivative": rarely(0.25, "second", "jvp"),
        "calls": rarely(0.6, 2, 3, 4),
        "functional": rarely(0.4, True),
        "seed": random.randrange(1000),
    }
    return legal(Case(**{name: value for name, value in drawn.items() if value is not None}))


def simpler(case, legal=legal) -> Iterator:
    """Yield cases that differ from this one in one option, which is simpler."""
    simplest = type(case)()
    for field in fields(case):
        value, default = getattr(case, field.name), getattr(simplest, field.name)
        values = [default]
        if type(value) is int and value > default:
            values += [max(value // 2, default), value - 1]
        elif isinstance(value, tuple):
            values += [value[: len(value) // 2]]
        for other in values:
            found = legal(replace(case, **{field.name: other}))
            if other != value and found != case:
                yield found
