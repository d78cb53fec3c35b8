"""`explain` of models whose layers are called in their own ways, and of buffers that cannot be written."""

import pytest
import torch
from torch import nn

import rnnfast


class FromList(nn.LSTM):
    """Takes a list of steps."""

    def forward(self, steps):
        return super().forward(torch.stack(steps))


class FromNothing(nn.LSTM):
    """Takes nothing."""

    def forward(self):
        return super().forward(torch.zeros(6, 2, 3))


class FromTokens(nn.LSTM):
    """Takes integers."""

    def forward(self, tokens):
        return super().forward(nn.functional.one_hot(tokens, 3).float())


class Model(nn.Module):
    """A layer, and what it is called with."""

    def __init__(self, layer, *arguments):
        super().__init__()
        self.layer, self.arguments = layer, arguments

    def forward(self, x):
        return self.layer(*(self.arguments or (x,)))[0] if not isinstance(self.layer, FromNothing) else self.layer()[0]


X = torch.randn(6, 2, 3)


@pytest.mark.parametrize(
    ("kind", "arguments"),
    [(FromList, (list(X),)), (FromNothing, ()), (FromTokens, (torch.zeros(6, 2, dtype=torch.long),))],
    ids=["list", "nothing", "tokens"],
)
def test_a_layer_that_is_not_called_with_its_input(kind, arguments):
    model = rnnfast.accelerate(Model(kind(3, 5), *arguments))
    (told,) = rnnfast.explain(model, X)
    assert (told.calls, told.explanation.backend) == (1, "numba")
    assert told.explanation.kernel.startswith("whole-layer lstm kernel in float32")
    (measured,) = rnnfast.explain(model, X, measure=True)
    assert measured.explanation.milliseconds > 0
    assert (measured.explanation.fraction is None) == (kind is not FromList)


def test_a_layer_that_is_not_called_with_its_input_under_another_default_device():
    model = Model(FromNothing(3, 5))
    with torch.device("meta"):
        (told,) = rnnfast.explain(rnnfast.accelerate(model.to("meta")), X)
    assert told.explanation.backend == "torch"


def test_buffers_that_cannot_be_written_or_are_not_there_yet():
    model = nn.Sequential(nn.LazyLinear(3), Model(rnnfast.LSTM(3, 5)), nn.LazyBatchNorm1d())
    model.register_buffer("expanded", torch.arange(4.0).expand(3, 4))
    with torch.inference_mode():
        model.register_buffer("inferred", torch.zeros(2))
    model.register_buffer("unset", None)
    (told,) = rnnfast.explain(model, X)
    assert told.explanation.backend == "numba"
    assert model.expanded.shape == (3, 4)


def test_a_compiled_model_is_explained_as_it_is_written():
    model = torch.compile(Model(rnnfast.LSTM(3, 5)), backend="eager", fullgraph=True)
    before = model(X)
    (told,) = rnnfast.explain(model, X)
    assert (told.name, told.calls) == ("_orig_mod.layer", 1)
    assert torch.equal(model(X), before)
    torch._dynamo.reset()


@pytest.mark.filterwarnings("ignore:.*is deprecated", "ignore::torch.jit.TracerWarning")
def test_a_scripted_layer_is_not_said_to_be_left_out():
    model = Model(torch.jit.trace(nn.LSTM(3, 5), X, check_trace=False))
    for measure in (False, True):
        (told,) = rnnfast.explain(model, X, measure=measure)
        assert "torch.jit's LSTM (a scripted layer cannot change" in str(told)


@pytest.mark.parametrize("dim", [1, 4])
def test_an_input_of_other_dimensions_is_refused_as_by_the_call(dim):
    layer, x = rnnfast.LSTM(3, 5), torch.randn((2,) * (dim - 1) + (3,))
    with pytest.raises(ValueError, match=f"LSTM: Expected input to be 2D or 3D, got {dim}D instead"):
        rnnfast.explain(layer, x)


def test_a_subclass_is_explained_by_torchs_layer():
    (told,) = rnnfast.explain(nn.Sequential(FromList(3, 5)), ([*X],))
    assert (told.type, told.explanation.kernel) == ("FromList", "torch.nn.LSTM")
