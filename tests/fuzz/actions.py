"""Sequences of actions on one of our modules and on torch's, side by side."""

import copy
import pickle
from collections.abc import Callable
from random import Random

import torch
from torch import Tensor, nn

import rnnfast
from rnnfast import fast_path
from tests.recurrent_layers import two_speeds

# The name of an action and its seed: what it does is drawn from that, so that any part of a sequence can be run alone.
Action = tuple[str, int]
NAMES = ("LSTM", "GRU", "RNN", "LSTM", "GRU", "RNN", "LSTMCell", "GRUCell", "RNNCell", "Recurrent", "Recurrent")


class Plain(rnnfast.Recurrent):
    """Layers of a declared cell by the plain loop."""

    proj_size = 0

    def forward(self, *args):
        """Run the loop."""
        with rnnfast.use_backend("reference"):
            return super().forward(*args)


def module_of(library, kind: str, **options) -> nn.Module:
    """Make a small module, of torch or ours, in float64; of a declared cell, in float32 alone."""
    if kind == "Recurrent":
        return (Plain if library is nn else rnnfast.Recurrent)(two_speeds, 3, 4, **options)
    return getattr(library, kind)(3, 4, **options).double()


class Pair:
    """Torch's module, ours, and the graphs that wait for backward."""

    def __init__(self, seed: int):
        random = Random(seed)
        kind = random.choice(NAMES)
        options = {
            "num_layers": random.choice((1, 1, 2)),
            "bidirectional": random.random() < 0.3,
            "bias": random.random() < 0.8,
            "batch_first": random.random() < 0.3,
        }
        if kind == "LSTM" and random.random() < 0.3:
            options["proj_size"] = 2
        self.is_cell, self.states = kind.endswith("Cell"), 2 if kind.startswith(("LSTM", "Recurrent")) else 1
        if self.is_cell:
            options = {"bias": options["bias"]}
        torch.manual_seed(seed)
        self.theirs, self.ours = module_of(nn, kind, **options), module_of(rnnfast, kind, **options)
        self.ours.load_state_dict(self.theirs.state_dict())
        self.graphs: list[tuple[Tensor, Tensor, list[Tensor], list[Tensor]]] = []
        self.kept: list[tuple[nn.RNNBase, nn.RNNBase]] = []

    @property
    def both(self) -> tuple[nn.RNNBase, nn.RNNBase]:
        """Return both modules, torch's first."""
        return self.theirs, self.ours

    def draw(self, random: Random, *size: int) -> Tensor:
        """Return a tensor of the modules' dtype."""
        values = torch.randn(*size, generator=torch.Generator().manual_seed(random.randrange(10**6)))
        return values.to(next(self.theirs.parameters()).dtype)

    def results(self, random: Random) -> list[tuple[Tensor, list[Tensor], list[Tensor]]]:
        """Call both modules: output, all results, leaves."""
        sizes, batched = random.choice(((3, 2), (5, 1), (1, 4))), random.random() < 0.9
        x, with_hx, wants = (
            self.draw(random, *self.size(sizes, batched), 3),
            random.random() < 0.5,
            random.random() < 0.6,
        )
        hx = [self.draw(random, *shape) for shape in self.state_sizes(sizes, batched)]
        found = []
        for module in self.both:
            leaves = [t.clone().requires_grad_(wants) for t in (x, *(hx if with_hx else ()))]
            state = None if not with_hx else tuple(leaves[1:]) if len(hx) == 2 else leaves[1]
            results = module(leaves[0], state)
            every = [t for each in as_tuple(results) for t in as_tuple(each)]
            found.append((every[0], every, [leaf for leaf in leaves if leaf.requires_grad]))
        return found

    def size(self, sizes: tuple[int, int], batched: bool) -> tuple[int, ...]:
        """Return the size of an input but for its width; sizes: [T, B], or [B, T] with batch_first."""
        return sizes[self.is_cell :] if batched else sizes[: 1 - self.is_cell]

    def state_sizes(self, sizes: tuple[int, int], batched: bool) -> list[tuple[int, ...]]:
        """Return the sizes of the states."""
        if self.is_cell:
            return [(*self.size(sizes, batched), 4)] * self.states
        rows = self.theirs.num_layers * (2 if self.theirs.bidirectional else 1)
        lead = (rows, sizes[0 if self.theirs.batch_first else 1]) if batched else (rows,)
        return [(*lead, self.theirs.proj_size or 4), (*lead, 4)][: self.states]


def as_tuple(results) -> tuple:
    """Return results as a tuple."""
    return results if isinstance(results, tuple) else (results,)


def call(pair: Pair, random: Random) -> None:
    """Compare a call, and sometimes keep its graph."""
    (theirs, all_theirs, from_theirs), (ours, all_ours, from_ours) = pair.results(random)
    same("result", all_ours, all_theirs)
    assert [t.requires_grad for t in all_ours] == [t.requires_grad for t in all_theirs], "requires_grad of results"
    if ours.requires_grad:
        weight = pair.draw(random, *ours.shape)
        sums = ((theirs * weight).sum(), (ours * weight).sum())
        if random.random() < 0.7:
            pair.graphs.append((*sums, from_theirs, from_ours))


def call_without_gradient(pair: Pair, random: Random) -> None:
    """Compare a call under no_grad or inference_mode."""
    with torch.no_grad() if random.random() < 0.5 else torch.inference_mode():
        (_, theirs, _), (_, ours, _) = pair.results(random)
    same("result", ours, theirs)
    assert [t.is_inference() for t in ours] == [t.is_inference() for t in theirs], "inference tensors"


def backward(pair: Pair, random: Random) -> None:
    """Go backward through a kept graph; with retain_graph it stays."""
    if not pair.graphs:
        return
    at, retain, create = random.randrange(len(pair.graphs)), random.random() < 0.4, random.random() < 0.2
    theirs, ours, from_theirs, from_ours = pair.graphs[at] if retain else pair.graphs.pop(at)
    accumulate = random.random() < 0.5
    found: list = []
    for loss, leaves, module in ((theirs, from_theirs, pair.theirs), (ours, from_ours, pair.ours)):
        inputs = [*leaves, *(p for p in module.parameters() if p.requires_grad)]
        try:
            if accumulate:
                loss.backward(retain_graph=retain, create_graph=create)
                grads = [p.grad for p in inputs]
            else:
                options = {"retain_graph": retain, "create_graph": create, "allow_unused": True}
                grads = torch.autograd.grad(loss, inputs, **options)
        except RuntimeError as error:
            grads = error
        found.append(grads)
    expected, grads = found
    if isinstance(grads, RuntimeError):
        # torch saves copies of some weights, where ours are those of the module.
        if isinstance(expected, RuntimeError) or "modified by an inplace operation" in str(grads):
            pair.graphs = [graph for graph in pair.graphs if graph[1] is not ours]
            zero_grad(pair, random)
            return
        raise AssertionError(f"backward: {grads}")
    if isinstance(expected, RuntimeError):
        raise AssertionError(f"backward: torch refuses, {expected}")
    same("gradient", grads, expected)


def optimise(pair: Pair, random: Random) -> None:
    """Take a step of an optimizer over the gradients that there are."""
    kind, foreach = random.choice((torch.optim.SGD, torch.optim.Adam)), random.random() < 0.5
    if any(p.grad is not None and p.grad.requires_grad for p in pair.theirs.parameters()):
        return
    for module in pair.both:
        kind(module.parameters(), lr=0.1, foreach=foreach).step()


def zero_grad(pair: Pair, random: Random) -> None:
    """Forget the gradients."""
    to_none = random.random() < 0.5
    for module in pair.both:
        module.zero_grad(
            set_to_none=to_none or any(p.grad is not None and p.grad.requires_grad for p in module.parameters())
        )


def change_in_place(pair: Pair, random: Random) -> None:
    """Change a weight in place, through the tensor, its data or a view of it."""
    name, way = random.choice([name for name, _ in pair.theirs.named_parameters()]), random.randrange(4)
    change = pair.draw(random, *getattr(pair.theirs, name).shape)
    if way < 2:  # autograd does not see that, so what is saved is anybody's guess
        pair.graphs.clear()
    for module in pair.both:
        weight = getattr(module, name)
        if way == 0:
            weight.data.add_(change)
        elif way == 1:
            weight.data = weight.data + change
        else:
            with torch.no_grad():
                (weight if way == 2 else weight[:2]).copy_(change if way == 2 else change[:2])


def assign(pair: Pair, random: Random) -> None:
    """Set another parameter, sometimes one of other strides."""
    name, way = random.choice([name for name, _ in pair.theirs.named_parameters()]), random.random()
    values = pair.draw(random, *getattr(pair.theirs, name).shape)
    for module in pair.both:
        strided = values.clone().mT.contiguous().mT if values.dim() == 2 and way < 0.3 else values.clone()
        setattr(module, name, nn.Parameter(strided, requires_grad=way > 0.1))


def freeze(pair: Pair, random: Random) -> None:
    """Say of a parameter, or of all, whether it wants a gradient."""
    wants, every = random.random() < 0.6, random.random() < 0.3
    names = [name for name, _ in pair.theirs.named_parameters()]
    names = names if every else [random.choice(names)]
    for module in pair.both:
        for name in names:
            getattr(module, name).requires_grad_(wants)


def convert(pair: Pair, random: Random) -> None:
    """Convert to another dtype and forget the graphs of the last."""
    dtype = random.choice((torch.float32, torch.float64))
    if isinstance(pair.theirs, Plain):
        return
    for module in pair.both:
        module.to(dtype)
        module.zero_grad()
    with torch.no_grad():  # what rounding in the last dtype has made of weights is no matter in this one
        for own, p in zip(pair.ours.parameters(), pair.theirs.parameters(), strict=True):
            own.copy_(p)
    pair.graphs.clear()


def reload(pair: Pair, random: Random) -> None:
    """Load a state_dict, copied or assigned, between the two modules."""
    state = {name: pair.draw(random, *w.shape) for name, w in pair.theirs.state_dict().items()}
    assigned = random.random() < 0.4
    for module in pair.both:
        wants = {name: p.requires_grad for name, p in module.named_parameters()}
        module.load_state_dict({name: value.clone() for name, value in state.items()}, assign=assigned)
        for name, p in module.named_parameters():
            p.requires_grad_(wants[name])


def duplicate(pair: Pair, random: Random) -> None:
    """Go on with a copy of each module; the others are used again later."""
    way: Callable = random.choice((copy.copy, copy.deepcopy, lambda module: pickle.loads(pickle.dumps(module))))
    if any(p.grad is not None and p.grad.requires_grad for p in pair.theirs.parameters()):
        pair.theirs.zero_grad()
        pair.ours.zero_grad()
    pair.kept.append((pair.theirs, pair.ours))
    pair.theirs, pair.ours = way(pair.theirs), way(pair.ours)
    pair.graphs.clear()


def go_back(pair: Pair, random: Random) -> None:
    """Go on with modules that were copied."""
    if pair.kept:
        pair.theirs, pair.ours = random.choice(pair.kept)
        pair.graphs.clear()


def set_threads(pair: Pair, random: Random) -> None:
    """Set the number of threads."""
    torch.set_num_threads(random.choice((1, 2, 3)))


def set_mode(pair: Pair, random: Random) -> None:
    """Go to training or evaluation."""
    mode = random.random() < 0.5
    for module in pair.both:
        module.train(mode)


def call_functional(pair: Pair, random: Random) -> None:
    """Compare a call with other weights, by functional_call, and the gradient by one of them."""
    name = random.choice([name for name, _ in pair.theirs.named_parameters()])
    values = pair.draw(random, *getattr(pair.theirs, name).shape)
    x, found = pair.draw(random, *pair.size((3, 2), True), 3), []
    for module in pair.both:
        leaf = values.clone().requires_grad_()
        output = as_tuple(torch.func.functional_call(module, {name: leaf}, (x,)))[0]
        found.append([output, *torch.autograd.grad(output.sin().sum(), leaf)])
    same("functional_call", found[1], found[0])


def penalise(pair: Pair, random: Random) -> None:
    """Compare a second derivative, and the first one taken once more after it."""
    (theirs, _, from_theirs), (ours, _, from_ours) = pair.results(random)
    found = []
    for output, leaves, module in ((theirs, from_theirs, pair.theirs), (ours, from_ours, pair.ours)):
        inputs = [*leaves, *(p for p in module.parameters() if p.requires_grad)]
        if not inputs:
            return
        grads = torch.autograd.grad(output.sin().sum(), inputs, create_graph=True)
        again = torch.autograd.grad(sum(g.square().sum() for g in grads), inputs, retain_graph=True, allow_unused=True)
        found.append([*grads, *again, *torch.autograd.grad(output.sum(), inputs)])
    same("second derivative", found[1], found[0])


def same(name: str, ours, theirs) -> None:
    """Compare lists of tensors."""
    for n, (a, b) in enumerate(zip(ours, theirs, strict=True)):
        if a is None or b is None:
            assert not any(t.any() for t in (a, b) if t is not None), f"{name} {n}: {a} beside {b}"
            continue
        assert a.shape == b.shape, f"{name} {n}: shape {list(a.shape)}, expected {list(b.shape)}"
        assert a.dtype == b.dtype, f"{name} {n}: {a.dtype}, expected {b.dtype}"
        error, size = (a - b).detach().norm().item(), b.detach().norm().item()
        limit = (1e-12 if b.dtype == torch.float64 else 1e-4) * (1 + size)
        assert error <= limit, f"{name} {n}: error {error:.2g} of {size:.2g}"


ACTIONS = {
    action.__name__: action
    for action in (
        call, call, call_without_gradient, backward, backward, optimise, zero_grad, change_in_place, assign, freeze,
        convert, reload, duplicate, go_back, set_threads, set_mode, call_functional, penalise,
    )
}  # fmt: skip
FREQUENT = ("call", "call", "call", "call_without_gradient", "backward", "backward")


def draw(random: Random) -> tuple[int, list[Action]]:
    """Draw the seed of a pair of modules and a sequence of actions."""
    names = [*ACTIONS, *FREQUENT]
    return random.randrange(1000), [
        (random.choice(names), random.randrange(1000)) for _ in range(random.randint(5, 30))
    ]


def check(seed: int, actions: list[Action]) -> str | None:
    """Do the actions and say what is wrong, or None."""
    fast_path.recorded.clear()
    return do_all(ACTIONS, lambda: Pair(seed), actions)


def do_all(known: dict[str, Callable], make: Callable, actions: list[Action]) -> str | None:
    """Do actions on what `make` makes, and say what is wrong, or None."""
    threads, name, n = torch.get_num_threads(), "making", -1
    try:
        made = make()
        for n, (name, own) in enumerate(actions):  # noqa: B007
            known[name](made, Random(own))
    except Exception as error:  # whatever it is, it is what was looked for
        return f"{name}, action {n + 1}: {type(error).__name__}: {error}"
    finally:
        torch.set_num_threads(threads)
    return None
