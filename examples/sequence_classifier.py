"""Is the sum of a random sequence positive? A recurrent layer, a linear layer and a sigmoid learn to tell.

Change one word to train another layer: `RNN`, `LSTM` or `GRU`, from `rnnfast` or from `torch.nn`.
"""

import torch
from torch import Tensor, nn

from examples import options
from rnnfast import RNN as Recurrent  # or LSTM, or GRU

STEPS, BATCH, HIDDEN = 10, 32, 32
SAMPLES, EPOCHS = 1000, 10


class SequenceClassifier(nn.Module):
    """The probability that a sequence of numbers, [B, T, 1], sums to more than 0: [B, 1]."""

    def __init__(self, recurrent: type[nn.RNNBase] = Recurrent):
        super().__init__()
        self.recurrent = recurrent(1, HIDDEN, batch_first=True)
        self.linear = nn.Linear(HIDDEN, 1)

    def forward(self, sequence: Tensor) -> Tensor:
        output, _ = self.recurrent(sequence)  # [B, T, H]
        last = output[:, -1]
        return torch.sigmoid(self.linear(last))


def make_data(samples: int) -> tuple[Tensor, Tensor]:
    sequences = torch.randn(samples, STEPS, 1)
    labels = (sequences.sum(dim=1) > 0).float()  # [samples, 1]
    return sequences, labels


def train(recurrent: type[nn.RNNBase] = Recurrent, seed: int = 0) -> tuple[SequenceClassifier, list[float]]:
    """Train a classifier; return it with the mean loss of every epoch."""
    torch.manual_seed(seed)
    sequences, labels = make_data(SAMPLES)
    model = SequenceClassifier(recurrent)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    losses = []
    for _ in range(EPOCHS):
        total = 0.0
        for batch in torch.randperm(SAMPLES).split(BATCH):
            loss = nn.functional.binary_cross_entropy(model(sequences[batch]), labels[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            total += loss.item() * len(batch)
        losses.append(total / SAMPLES)
    return model, losses


@torch.no_grad()
def accuracy(model: SequenceClassifier, samples: int = 1000) -> float:
    """The share of right answers on sequences not seen in training."""
    sequences, labels = make_data(samples)
    right = (model(sequences) > 0.5) == (labels > 0.5)
    return right.float().mean().item()


if __name__ == "__main__":
    options("examples.sequence_classifier", __doc__)
    model, losses = train()
    for epoch, loss in enumerate(losses, start=1):
        print(f"epoch {epoch:2d}  loss {loss:.4f}")
    print(f"right answers on new sequences: {accuracy(model):.1%}")
