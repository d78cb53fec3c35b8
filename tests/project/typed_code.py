"""Code as users write it. Type checkers read it; nothing runs it. Lines marked `expect error` are mistakes to catch."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence
from typing_extensions import assert_type

import rnnfast

x = torch.randn(7, 3, 5)
h = torch.zeros(1, 3, 4)
lengths = torch.tensor([7, 2, 0])
packed = pack_padded_sequence(x, lengths)


def layers() -> None:
    rnn = rnnfast.RNN(5, 4, nonlinearity="relu", batch_first=True, device="cpu", dtype=torch.float64)
    gru = rnnfast.GRU(5, 4, 2, True, False, 0.1, bidirectional=True)
    lstm = rnnfast.LSTM(input_size=5, hidden_size=4, proj_size=2)
    assert_type(rnn(x), tuple[Tensor, Tensor])
    assert_type(gru(x, h, lengths=lengths), tuple[Tensor, Tensor])
    assert_type(gru(x, resets=x > 0, all_states=True), tuple[Tensor, Tensor, tuple[Tensor]])
    assert_type(gru.forward(x), tuple[Tensor, Tensor])
    output, (hn, cn) = lstm(x, (h, h))
    assert_type(output, Tensor)
    assert_type(cn, Tensor)
    assert_type(lstm(x, all_states=True)[2], tuple[Tensor, Tensor])
    output, _ = lstm(output, (hn, cn))
    rows, _ = lstm(packed)
    assert_type(rows, PackedSequence)
    assert_type(gru(packed, all_states=True), tuple[PackedSequence, Tensor, tuple[PackedSequence]])


def either(gru: rnnfast.GRU, sequence: Tensor | PackedSequence, every: bool) -> None:
    assert_type(gru(sequence), tuple[Tensor, Tensor] | tuple[PackedSequence, Tensor])
    assert_type(gru(x, all_states=every), tuple[Tensor, Tensor] | tuple[Tensor, Tensor, tuple[Tensor]])


class Tagger(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encoder = rnnfast.LSTM(5, 4, bidirectional=True)
        self.head = nn.Linear(8, 2)

    def forward(self, words: Tensor, count: Tensor) -> Tensor:
        output, (_, c) = self.encoder(words, lengths=count)
        scores: Tensor = self.head(output)
        return scores + c.sum()


class Louder(rnnfast.GRU):
    def loud(self, words: Tensor) -> Tensor:
        output, _ = super().forward(words)
        return 2 * output


def cells() -> None:
    assert_type(rnnfast.RNNCell(5, 4, nonlinearity="relu")(x[0]), Tensor)
    assert_type(rnnfast.GRUCell(5, 4)(x[0], h[0]), Tensor)
    assert_type(rnnfast.LSTMCell(5, 4, bias=False)(x[0], (h[0], h[0])), tuple[Tensor, Tensor])


@rnnfast.cell(gates="f g", parameters=("p",), signals="m")
def leaky(x: Any, u: Any, state: tuple[Tensor, ...], p: Any, s: Any) -> Tensor:
    f = torch.sigmoid(x.f + u.f)
    spike = rnnfast.surrogate(x.g, lambda value: 1 / (1 + value.abs()) ** 2)
    new: Tensor = f * state[0] * p.p + spike * s.m
    return new


def declared() -> None:
    layer = rnnfast.Recurrent(leaky, 5, 4, num_layers=2, initial={"p": 1.0})
    output, final = layer(x, signals={"m": x.new_ones(())})
    assert_type(output, Tensor)
    assert_type(final, Tensor | tuple[Tensor, ...])
    layer(x, final, signals={})
    rnnfast.Recurrent(rnnfast.cells.peephole_lstm, 5, 4)(x, {"h": h, "c": None}, all_states=True)
    assert_type(layer(packed, signals={}), tuple[PackedSequence, Tensor | tuple[Tensor, ...]])


def functions() -> None:
    weights = list(rnnfast.LSTM(5, 4).parameters())
    assert_type(rnnfast.functional.gru(x, weights), tuple[Tensor, Tensor])
    assert_type(rnnfast.functional.lstm(packed, weights, (h, h))[1], tuple[Tensor, Tensor])
    assert_type(rnnfast.functional.rnn_tanh(x, weights, all_states=True)[2], tuple[Tensor])


def models() -> None:
    model = Tagger()
    assert_type(rnnfast.accelerate(model, keep_types=True), Tagger)
    assert_type(rnnfast.restore(model, own=True), Tagger)
    assert_type(rnnfast.freeze(model.eval(), "int8"), Tagger)
    assert_type(rnnfast.survey(model), list[rnnfast.Finding])
    assert_type(rnnfast.explain(rnnfast.GRU(5, 4), x), rnnfast.Explanation)
    for each in rnnfast.explain(model, (x, lengths), measure=True):
        assert_type(each.explanation, rnnfast.Explanation | None)
    rnnfast.warmup(model, training=False, verbose=True)
    with rnnfast.use_backend("numba"):
        model(x, lengths)
    stream = rnnfast.Stream(rnnfast.LSTM(5, 4), batch=3)
    assert_type(stream(x[0]), Tensor)
    stream.state = (h, h)
    stream.reset(lengths > 2)


def mistakes() -> None:
    rnnfast.LSTM(5, hiden_size=3)  # expect error
    rnnfast.GRU(5, "4")  # expect error
    rnnfast.GRU(5, 4, proj_size=2)  # expect error
    rnnfast.RNN(5, 4, nonlinearity="sigmoid")  # expect error
    rnnfast.RNNCell(5, 4, nonlinearity="sigmoid")  # expect error
    rnnfast.LSTMCell(5, 4, num_layers=2)  # expect error
    rnnfast.Gru(5, 4)  # expect error
    lstm, gru = rnnfast.LSTM(5, 4), rnnfast.GRU(5, 4)
    lstm(x, lengths=3)  # expect error
    lstm(x, h)  # expect error
    lstm(x, (h,))  # expect error
    lstm(x, lenghts=lengths)  # expect error
    lstm(x, None, lengths)  # expect error
    gru(x, (h, h))  # expect error
    gru(x, all_states="yes")  # expect error
    gru(packed, lengths=lengths)  # expect error
    _, _h, _c = lstm(x)  # expect error
    lstm(x)[1].size()  # expect error
    lstm([1.0, 2.0])  # expect error
    rnnfast.LSTMCell(5, 4)(x[0], h[0])  # expect error
    rnnfast.GRUCell(5, 4)(x[0], (h[0], h[0]))  # expect error
    rnnfast.Recurrent("lstm", 5, 4)  # expect error
    rnnfast.Recurrent(leaky, 5, 4, proj_size=2)  # expect error
    rnnfast.Recurrent(leaky, 5, 4)(x, signals=h)  # expect error
    rnnfast.cell(gates=3)  # expect error
    rnnfast.cells.peephole(x, x, (h,))  # expect error
    rnnfast.functional.lstm(x, [h], h)  # expect error
    rnnfast.functional.gru(x, [h], num_layer=2)  # expect error
    rnnfast.Stream(nn.LSTM(5, 4))  # expect error
    rnnfast.Stream(lstm, batch="all")  # expect error
    rnnfast.use_backend("numbaa")  # expect error
    rnnfast.freeze(lstm, "int4")  # expect error
    rnnfast.freeze(lstm, weight="int8")  # expect error
    rnnfast.accelerate(lstm, keep_type=True)  # expect error
    rnnfast.survey([lstm])  # expect error
    rnnfast.explain(lstm)  # expect error
    rnnfast.warmup(lstm, train=False)  # expect error
