"""A character language model, trained on Python's own documentation: the same network on two recurrent layers at once.

The text is `pydoc_data.topics`, the manual behind `help()`: half a megabyte of English that ships with Python. Both
models start from the same seed and see the same batches, turn by turn, so that losses and times can be compared.
"""

import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pydoc_data.topics import topics

import torch
from torch import Tensor, nn

import rnnfast
from examples import options

STEPS, BATCH = 128, 32
EMBEDDING, HIDDEN = 64, 256


class Corpus:
    """The text as a tensor of character numbers."""

    def __init__(self):
        text = "\n".join(topics[name] for name in sorted(topics))
        self.characters = sorted(set(text))
        number = {character: i for i, character in enumerate(self.characters)}
        self.data = torch.tensor([number[character] for character in text])

    def batches(self, count: int, seed: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield `count` random windows and the same windows one character later, [T, B] each."""
        generator = torch.Generator().manual_seed(seed)
        window = torch.arange(STEPS + 1)[:, None]
        for _ in range(count):
            starts = torch.randint(len(self.data) - STEPS, (BATCH,), generator=generator)
            piece = self.data[starts + window]  # [T + 1, B]
            yield piece[:-1], piece[1:]


class LanguageModel(nn.Module):
    """Predict each next character: numbers [T, B] to logits [T, B, characters], and the recurrent layer's state."""

    def __init__(self, recurrent: type[nn.RNNBase], characters: int):
        super().__init__()
        self.embedding = nn.Embedding(characters, EMBEDDING)
        self.recurrent = recurrent(EMBEDDING, HIDDEN)
        self.linear = nn.Linear(HIDDEN, characters)

    def forward(self, characters: Tensor, state=None):
        output, state = self.recurrent(self.embedding(characters), state)
        return self.linear(output), state


@dataclass
class Run:
    """One model in training: its losses and its seconds, one entry per batch."""

    model: LanguageModel
    optimizer: torch.optim.Optimizer
    losses: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)

    def learn(self, inputs: Tensor, targets: Tensor) -> None:
        start = time.perf_counter()
        logits, _ = self.model(inputs)
        loss = nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())
        self.optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.losses.append(loss.item())
        self.seconds.append(time.perf_counter() - start)


def train(
    layers: Mapping[str, type[nn.RNNBase]],
    characters: int,
    batches: Iterable[tuple[Tensor, Tensor]],
    seed: int = 0,
    watch: Callable[[int, dict[str, Run]], None] = lambda done, runs: None,
) -> dict[str, Run]:
    """Train one model per entry of `layers`, all from the same seed, in turns on the same batches.

    characters: how many different ones there are. batches: pairs of inputs and targets, as `Corpus.batches` gives them.
    watch: called after every batch with the number of batches done and the runs.
    """
    runs = {}
    for name, recurrent in layers.items():
        torch.manual_seed(seed)
        model = LanguageModel(recurrent, characters)
        runs[name] = Run(model, torch.optim.Adam(model.parameters(), lr=2e-3))
    for done, (inputs, targets) in enumerate(batches, start=1):
        for run in runs.values():
            run.learn(inputs, targets)
        watch(done, runs)
    return runs


@torch.no_grad()
def write_text(model: LanguageModel, corpus: Corpus, length: int, start: str = "The ", seed: int = 0) -> str:
    """Let the model write `length` characters, one step of the recurrent layer each."""
    generator = torch.Generator().manual_seed(seed)
    written = list(start)
    piece = torch.tensor([[corpus.characters.index(character)] for character in start])  # [T, 1]
    state = None
    for _ in range(length):
        logits, state = model(piece, state)
        chances = torch.softmax(logits[-1] * 1.5, dim=-1)
        piece = torch.multinomial(chances, 1, generator=generator)  # [1, 1]
        written.append(corpus.characters[piece.item()])
    return "".join(written)


def main(batches: int) -> None:
    corpus = Corpus()

    def watch(done: int, runs: dict[str, Run]) -> None:
        if done == 1 or done % 10 == 0:
            told = ", ".join(f"{name} {run.losses[-1]:.4f}" for name, run in runs.items())
            print(f"batch {done:4d}  loss {told}", flush=True)

    layers = {"torch.nn.LSTM": nn.LSTM, "rnnfast.LSTM": rnnfast.LSTM}
    runs = train(layers, len(corpus.characters), corpus.batches(batches), watch=watch)
    print(write_text(runs["rnnfast.LSTM"].model, corpus, length=200))


if __name__ == "__main__":
    main(options("examples.language_model", __doc__, batches=(100, "batches to train")).batches)
