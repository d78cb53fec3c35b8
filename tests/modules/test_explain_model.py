"""`explain` of a whole model, `survey` with cells, and what `print` shows."""

import copy

import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import pack_sequence

import rnnfast


class Model(nn.Module):
    """Layers of every kind, one of them never called and one called four times."""

    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm1d(3)
        self.fast, self.slow, self.unused = rnnfast.LSTM(3, 5, dropout=0.5, num_layers=2), nn.GRU(5, 5), nn.RNN(2, 2)
        self.cell, self.torchs = rnnfast.GRUCell(5, 5), nn.LSTMCell(5, 5)
        self.own = rnnfast.Recurrent(rnnfast.cells.janet, 5, 5)

    def forward(self, x, scale=1):
        x, _ = self.fast(self.norm(x.transpose(1, 2)).transpose(1, 2) * scale, lengths=torch.tensor([4, 2]))
        h = self.own(self.slow(x)[0])[0][0]
        for _ in range(4):
            h = self.cell(self.torchs(h)[0], h)
        return h


NAMES = ["fast", "slow", "unused", "cell", "torchs", "own"]


def test_a_model_is_explained_layer_by_layer():
    model, x = Model(), torch.randn(4, 2, 3)
    before, state = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    told = rnnfast.explain(model, x)
    assert [each.name for each in told] == NAMES
    found = {each.name: each for each in told}
    assert {name: each.calls for name, each in found.items()} == dict(zip(NAMES, (1, 1, 0, 4, 4, 1), strict=True))
    assert found["unused"].explanation is None
    assert found["fast"].explanation == rnnfast.explain(model.fast, x)
    assert found["slow"].explanation.backend == found["torchs"].explanation.backend == "torch"
    assert found["slow"].explanation.reason == "accelerate() was not called"
    assert found["cell"].explanation.backend == found["own"].explanation.backend == "numba"
    lines = str(told).splitlines()
    assert len(lines) == len(NAMES)
    assert lines[2] == "unused: RNN, not called"
    assert "4 calls" in lines[3]
    # Nothing of it remains.
    assert torch.equal(torch.get_rng_state(), state)
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_arguments_of_a_model_come_as_a_tuple_or_by_name():
    model, x = Model(), torch.randn(4, 2, 3)
    alone = rnnfast.explain(model, x)
    assert alone == rnnfast.explain(model, (x, 2)) == rnnfast.explain(model, {"x": x, "scale": 2})
    layers = nn.Sequential(rnnfast.GRU(3, 5))
    rows = pack_sequence([torch.zeros(4, 3), torch.zeros(2, 3)])
    assert rnnfast.explain(layers, rows)[0].explanation.backend == "numba"
    with pytest.raises(TypeError, match="go with a layer"):
        rnnfast.explain(model, x, all_states=True)
    with pytest.raises(TypeError, match=r"torch\.nn\.Module, got int"):
        rnnfast.explain(3, x)


def test_hooks_are_removed_where_the_model_raises():
    model = Model()
    with pytest.raises(RuntimeError):
        rnnfast.explain(model, torch.randn(4, 2, 7))
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_torchs_layer_is_a_model_of_one_layer():
    (only,) = rnnfast.explain(nn.LSTM(3, 5), torch.randn(4, 2, 3))
    assert str(only) == "the model itself: LSTM, torch: torch.nn.LSTM (accelerate() was not called)"


def test_the_share_of_the_limit_is_measured_where_asked_for(monkeypatch):
    monkeypatch.setattr(rnnfast.limits, "SECONDS", 0.01)
    layer, x = rnnfast.GRU(64, 64), torch.randn(20, 16, 64)
    assert rnnfast.explain(layer, x).fraction is None
    told = rnnfast.explain(layer, x, measure=True)
    assert told.milliseconds > 0
    assert told.fraction > 0
    assert f"{told.fraction:.0%} of the machine's limit" in str(told)
    (slow,) = rnnfast.explain(nn.GRU(64, 64), x, measure=True)
    assert slow.explanation.fraction > 0


def test_the_share_counts_rows_and_bytes(monkeypatch):
    """With every call taking a millisecond: twice the rows are twice the share, and few rows are bound by the copy."""
    rates = rnnfast.limits.product_rate, rnnfast.limits.copy_rate
    for each in rates:
        monkeypatch.setattr(rnnfast.limits, each.__name__, each.__wrapped__)
    monkeypatch.setattr(rnnfast.limits, "fastest", lambda call, device: 1e-3)
    weights = [torch.zeros(4096, 64), torch.zeros(4096)]

    def share(steps, batch, lengths=None):
        return rnnfast.limits.measured(lambda: None, torch.zeros(steps, batch, 64), weights, lengths)[1]

    assert share(128, 128) == pytest.approx(4.0)  # 2 ** 14 rows by 2 ** 18 weights over 2 ** 30
    assert share(128, 256) == pytest.approx(8.0)
    assert share(128, 256, torch.tensor([128] * 128 + [0] * 128)) == pytest.approx(4.0)
    moved = 4 * (4096 * 64 + 4096 + 8 * 64)
    assert share(8, 1) == pytest.approx(moved / 2**21)


def test_survey_lists_cells():
    findings = {each.name: each for each in rnnfast.survey(Model())}
    assert list(findings) == NAMES
    assert [each.accelerated for each in findings.values()] == [True, False, False, True, False, True]
    assert [findings[name].type for name in ("cell", "torchs", "own")] == ["GRUCell", "LSTMCell", "Recurrent"]
    assert "LSTMCell" in findings["torchs"].reason
    assert "accelerate() was not called" not in findings["torchs"].reason
    scripted = torch.jit.script(nn.LSTMCell(2, 3))
    assert rnnfast.survey(nn.Sequential(scripted))[0].reason.startswith("a scripted layer")


def test_print_shows_what_runs_on_rnnfast():
    model = Model()
    model.fast.recompute = True
    told = repr(rnnfast.accelerate(model))
    assert "(fast): LSTM(3, 5, num_layers=2, dropout=0.5, rnnfast, recompute=True)" in told
    assert "(slow): GRU(5, 5, rnnfast, accelerated)" in told
    assert "(cell): GRUCell(5, 5, rnnfast)" in told
    assert "(torchs): LSTMCell(5, 5)" in told
    assert "(own): Recurrent(janet, 5, 5, rnnfast)" in told
    assert "(slow): GRU(5, 5)" in repr(rnnfast.restore(model))
