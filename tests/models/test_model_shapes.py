"""Models of well-known shapes, written here after their papers, with torch's layers and accelerated."""

import pytest
import torch
from comparison import compare
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence


class TacotronEncoder(nn.Module):
    """The encoder of Tacotron 2 (Shen et al., 2018): three convolutions and a bidirectional LSTM on packed input."""

    def __init__(self, width: int = 64):
        super().__init__()
        self.embedding = nn.Embedding(30, width)
        stack: list[nn.Module] = []
        for _ in range(3):
            # No bias: the normalisation takes the mean away, and with it the bias.
            convolution = nn.Conv1d(width, width, 5, padding=2, bias=False)
            stack += [convolution, nn.BatchNorm1d(width), nn.ReLU(), nn.Dropout(0.5)]
        self.convolutions = nn.Sequential(*stack)
        self.lstm = nn.LSTM(width, width // 2, 1, batch_first=True, bidirectional=True)

    def forward(self, characters, lengths):
        x = self.convolutions(self.embedding(characters).transpose(1, 2)).transpose(1, 2)
        self.lstm.flatten_parameters()
        packed, _ = self.lstm(pack_padded_sequence(x, lengths, batch_first=True))
        return pad_packed_sequence(packed, batch_first=True)[0]


def test_tacotron_2_encoder(backend):
    characters, lengths = torch.randint(30, (4, 50)), torch.tensor([50, 40, 31, 7])
    compare(TacotronEncoder(), lambda model: {"memory": model(characters, lengths)}, layers=1)


class AwdLstm(nn.Module):
    """The language model of Merity et al. (2018): three LSTMs whose recurrent weights are dropped, tied embeddings."""

    def __init__(self, vocabulary: int = 50, embedding: int = 40, hidden: int = 115):
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, embedding)
        sizes = [(embedding, hidden), (hidden, hidden), (hidden, embedding)]
        self.layers = nn.ModuleList(nn.LSTM(i, h) for i, h in sizes)
        self.raw = nn.ParameterList(nn.Parameter(layer.weight_hh_l0.detach().clone()) for layer in self.layers)
        for layer in self.layers:
            del layer.weight_hh_l0
        self.decoder = nn.Linear(embedding, vocabulary)
        self.decoder.weight = self.embedding.weight

    def forward(self, tokens, states):
        x, new = self.embedding(tokens), []
        for layer, raw, state in zip(self.layers, self.raw, states, strict=True):
            layer.weight_hh_l0 = nn.functional.dropout(raw, 0.5, self.training)
            x, state = layer(x, state)
            new.append(tuple(s.detach() for s in state))
        return self.decoder(x), new


@pytest.mark.filterwarnings("ignore:RNN module weights are not part of single contiguous chunk:UserWarning")
def test_awd_lstm_over_two_windows(backend):
    tokens = torch.randint(50, (2, 20, 8))

    def run(model):
        states, logits = [None] * 3, []
        for window in tokens:
            result, states = model(window, states)
            logits.append(result)
        return {"logits": torch.stack(logits), "state": states[-1][1]}

    compare(AwdLstm(), run, layers=3)


class Critic(nn.Module):
    """A recurrent critic of a Wasserstein GAN with gradient penalty (Gulrajani et al., 2017)."""

    def __init__(self):
        super().__init__()
        self.recurrent, self.head = nn.GRU(8, 32, batch_first=True), nn.Linear(32, 1)

    def forward(self, x):
        return self.head(self.recurrent(x)[1][-1])


def test_gradient_penalty(backend):
    real, fake = torch.randn(2, 16, 24, 8)

    def run(critic):
        mixed = (0.4 * real + 0.6 * fake).requires_grad_()
        (gradient,) = torch.autograd.grad(critic(mixed).sum(), mixed, create_graph=True)
        return {"penalty": gradient.flatten(1).norm(dim=1) - 1, "value": critic(fake) - critic(real)}

    compare(Critic(), run, layers=1)


class Amplifier(nn.Module):
    """A guitar amplifier as neural-amp-modeler has it: an LSTM over single samples, its initial state learned."""

    def __init__(self, hidden: int = 24):
        super().__init__()
        self.lstm, self.head = nn.LSTM(1, hidden, batch_first=True), nn.Linear(hidden, 1)
        self.h0, self.c0 = nn.Parameter(torch.randn(1, hidden)), nn.Parameter(torch.randn(1, hidden))

    def forward(self, samples):
        hx = tuple(state.unsqueeze(1).expand(-1, len(samples), -1) for state in (self.h0, self.c0))
        return self.head(self.lstm(samples.unsqueeze(-1), hx)[0]).squeeze(-1)


@pytest.mark.long
def test_amplifier_over_16000_samples(backend):
    samples = torch.sin(torch.linspace(0, 500, 16_000)).expand(2, -1) * torch.tensor([[0.3], [0.9]])
    compare(Amplifier(), lambda model: {"signal": model(samples)}, layers=1)
