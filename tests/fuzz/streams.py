"""Sequences of actions on a Stream, beside torch's module called step by step."""

import copy
import pickle
from collections.abc import Callable
from random import Random

import torch
from torch import Tensor, nn

import rnnfast
from tests.fuzz.actions import Action, Plain, do_all, module_of, same


class Streamed:
    """A stream over our module, and what it must do: torch's module as it was at the last refresh, and a state."""

    def __init__(self, seed: int):
        random = Random(seed)
        kind = random.choice(("LSTM", "GRU", "RNN", "Recurrent"))
        options = {"num_layers": random.choice((1, 2)), "bias": random.random() < 0.8}
        if kind == "LSTM" and random.random() < 0.4:
            options["proj_size"] = 2
        torch.manual_seed(seed)
        self.batch = random.choice((1, 1, 2, 5))
        self.theirs, self.ours = module_of(nn, kind, **options), module_of(rnnfast, kind, **options)
        self.ours.load_state_dict(self.theirs.state_dict())
        with torch.inference_mode(random.random() < 0.2):
            self.stream = rnnfast.Stream(self.ours, self.batch)
        self.steps = copy.deepcopy(self.theirs)
        self.state = self.zeros()
        self.kept: list = []

    def zeros(self) -> list[Tensor]:
        """Return a state of zeros."""
        widths = [self.steps.proj_size or 4, 4][: 2 if getattr(self.steps, "mode", "LSTM") == "LSTM" else 1]
        like = next(self.steps.parameters())
        return [like.new_zeros(self.steps.num_layers, self.batch, width).detach() for width in widths]

    def draw(self, random: Random, *size: int) -> Tensor:
        """Return a tensor of the stream's dtype."""
        values = torch.randn(*size, generator=torch.Generator().manual_seed(random.randrange(10**6)))
        return values.to(next(self.steps.parameters()).dtype)


def step(s: Streamed, random: Random) -> None:
    """Compare one step, its output and the state after it."""
    x, way = s.draw(random, s.batch, 3), random.random()
    given = x[0] if s.batch == 1 and way < 0.3 else x.mT.contiguous().mT if way < 0.6 else x
    if way > 0.9:
        with torch.inference_mode():
            output = s.stream(given)
    else:
        output = s.stream(given)
    with torch.no_grad():
        expected, finals = s.steps(x[None], tuple(s.state) if len(s.state) == 2 else s.state[0])
    s.state = list(finals) if isinstance(finals, tuple) else [finals]
    same("output", [output], [expected[0]])
    assert not output.requires_grad, "the output wants a gradient"
    read_state(s, random)


def read_state(s: Streamed, random: Random) -> None:
    """Compare the state."""
    state = s.stream.state
    same("state", state if isinstance(state, tuple) else [state], s.state)


def set_state(s: Streamed, random: Random) -> None:
    """Set the state, or try one that does not fit."""
    state = [s.draw(random, *own.shape) for own in s.state]
    if random.random() < 0.3:
        state[-1] = state[-1][:, :, 1:]
        try:
            s.stream.state = tuple(state) if len(state) == 2 else state[0]
        except ValueError:
            read_state(s, random)
            return
        raise AssertionError("a state of the wrong size is accepted")
    s.stream.state = tuple(state) if len(state) == 2 else state[0]
    s.state = [own.clone() for own in state]
    for own in state:  # the stream has copied it
        own.zero_()


def reset(s: Streamed, random: Random) -> None:
    """Zero the state, of some rows or of all."""
    if random.random() < 0.5:
        s.stream.reset()
        s.state = s.zeros()
        return
    rows = torch.tensor([random.random() < 0.5 for _ in range(s.batch)])
    s.stream.reset(rows)
    s.state = [torch.where(rows[:, None], 0.0, own) for own in s.state]


def change_weights(s: Streamed, random: Random) -> None:
    """Change a weight; the stream does not see that before it is refreshed."""
    name, assigned = random.choice([name for name, _ in s.theirs.named_parameters()]), random.random() < 0.4
    values = s.draw(random, *getattr(s.theirs, name).shape).to(getattr(s.theirs, name).dtype)
    for module in (s.theirs, s.ours):
        if assigned:
            setattr(module, name, nn.Parameter(values.clone()))
        else:
            with torch.no_grad():
                getattr(module, name).copy_(values)


def convert(s: Streamed, random: Random) -> None:
    """Convert the module to another dtype, and refresh."""
    dtype = torch.float32 if isinstance(s.theirs, Plain) else random.choice((torch.float32, torch.float64))
    s.theirs.to(dtype)
    s.ours.to(dtype)
    refresh(s, random)


def refresh(s: Streamed, random: Random) -> None:
    """Read the weights again."""
    read_state(s, random)
    state = s.stream.state
    with torch.inference_mode(random.random() < 0.2):
        s.stream.refresh()
    s.steps = copy.deepcopy(s.theirs)
    dtype = next(s.steps.parameters()).dtype
    s.state = [own.to(dtype) for own in (state if isinstance(state, tuple) else (state,))]


def duplicate(s: Streamed, random: Random) -> None:
    """Keep a copy of the stream; both go on by themselves."""
    read_state(s, random)
    s.state = list(s.stream.state) if isinstance(s.stream.state, tuple) else [s.stream.state]
    way: Callable = random.choice((copy.copy, copy.deepcopy, lambda stream: pickle.loads(pickle.dumps(stream))))
    other = way(s.stream)
    shared = other.module is s.stream.module
    steps = copy.deepcopy(s.theirs)  # a copy reads the weights that the module has now
    dtype = next(steps.parameters()).dtype
    theirs = s.theirs if shared else copy.deepcopy(s.theirs)
    s.kept.append((other, other.module, theirs, steps, [own.to(dtype) for own in s.state]))


def go_on_with_another(s: Streamed, random: Random) -> None:
    """Exchange the stream for a copy that was kept."""
    if s.kept:
        other = s.kept.pop(random.randrange(len(s.kept)))
        s.kept.append((s.stream, s.ours, s.theirs, s.steps, s.state))
        s.stream, s.ours, s.theirs, s.steps, s.state = other


def use_in_a_graph(s: Streamed, random: Random) -> None:
    """Use the output in a graph: after another step, backward must refuse."""
    weight = s.draw(random, s.batch, s.steps.proj_size or 4).requires_grad_()
    overwritten = random.random() < 0.5
    loss = (s.stream.output * weight).sum()
    expected = s.stream.output.clone()
    if overwritten:
        step(s, random)
        try:
            loss.backward()
        except RuntimeError:
            return
        raise AssertionError("backward reads an output that the next step has overwritten")
    loss.backward()
    same("gradient", [weight.grad], [expected])


def call_module(s: Streamed, random: Random) -> None:
    """Call the stream's module in between."""
    x = s.draw(random, 4, 2, 3).to(next(s.theirs.parameters()).dtype)
    same("module", [s.ours(x)[0]], [s.theirs(x)[0]])


def set_threads(s: Streamed, random: Random) -> None:
    """Set the number of threads."""
    torch.set_num_threads(random.choice((1, 2, 3)))


ACTIONS = {
    action.__name__: action
    for action in (
        step, read_state, set_state, reset, change_weights, convert, refresh, duplicate, go_on_with_another,
        use_in_a_graph, call_module, set_threads,
    )
}  # fmt: skip


def draw(random: Random) -> tuple[int, list[Action]]:
    """Draw the seed of a stream and a sequence of actions."""
    names = [*ACTIONS, "step", "step", "step"]
    return random.randrange(1000), [
        (random.choice(names), random.randrange(1000)) for _ in range(random.randint(5, 30))
    ]


def check(seed: int, actions: list[Action]) -> str | None:
    """Do the actions and say what is wrong, or None."""
    return do_all(ACTIONS, lambda: Streamed(seed), actions)
