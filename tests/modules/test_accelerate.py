"""`accelerate` and `restore` change a model's layers in place, keep what it means, and say what they left alone."""

import copy
import io
import pickle

import pytest
import torch
from closeness import assert_all_close
from layers import weights_like
from torch import nn

import rnnfast


class Doubled(nn.LSTM):
    """A subclass with a forward of its own over torch's."""

    def forward(self, input, hx=None):
        output, finals = super().forward(2 * input, hx)
        return output + 1, finals


class Named(nn.GRU):
    """A subclass that changes nothing about the call."""

    def label(self) -> str:
        return f"hidden {self.hidden_size}"


class Model(nn.Module):
    """Nested, shared, subclassed and overridden layers."""

    def __init__(self):
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(3, 3), nn.LSTM(3, 4, 2, bidirectional=True))
        self.shared = self.encoder[1]
        self.doubled, self.named = Doubled(3, 4), Named(3, 4)
        self.rnn = nn.RNN(3, 4, nonlinearity="relu", batch_first=True)
        self.normed = nn.utils.parametrizations.weight_norm(nn.LSTM(3, 4), "weight_hh_l0")
        self.own = nn.GRU(3, 4)
        plain = self.own.forward
        self.own.forward = lambda x: (3 * plain(x)[0], None)

    def forward(self, x):
        layers = (self.shared, self.doubled, self.named, self.rnn, self.normed, self.own)
        return torch.cat((self.encoder(x)[0], *(layer(x)[0] for layer in layers)), -1)


def results(model: nn.Module, x) -> dict[str, torch.Tensor]:
    """Return a model's output and the gradients of all of its parameters."""
    output = model(x)
    model.zero_grad()
    (output * weights_like(output)).sum().backward()
    return {"output": output} | {name: p.grad.clone() for name, p in model.named_parameters()}


def types(model: nn.Module) -> list[tuple[str, type]]:
    """Return the types of a model's recurrent layers; parametrize makes a class for each layer it meets."""
    layers = [(n, type(m)) for n, m in model.named_modules() if isinstance(m, nn.RNNBase)]
    return [(n, t.__bases__[0] if t.__name__.startswith("Parametrized") else t) for n, t in layers]


@pytest.fixture
def model() -> Model:
    torch.manual_seed(0)
    return Model().double()


@pytest.fixture
def x() -> torch.Tensor:
    return torch.randn(5, 2, 3, dtype=torch.float64)


@pytest.mark.parametrize("keep_types", [False, True])
def test_a_model_keeps_its_numbers_parameters_and_state_dict(keep_types, model, x, backend):
    expected, before = results(model, x), types(model)
    parameters, keys = list(model.parameters()), list(model.state_dict())
    assert rnnfast.accelerate(model, keep_types=keep_types) is model
    assert_all_close(expected, results(model, x))
    assert all(a is b for a, b in zip(parameters, model.parameters(), strict=True))
    assert list(model.state_dict()) == keys
    assert isinstance(model.shared, rnnfast.LSTM)
    assert isinstance(model.shared, nn.LSTM) is keep_types
    assert model.shared is model.encoder[1]
    once = types(model)
    rnnfast.accelerate(model, keep_types=not keep_types)
    assert types(model) == once
    assert rnnfast.restore(model) is model
    assert types(model) == before
    assert_all_close(expected, results(model, x))


def test_an_optimizer_made_before_keeps_training_the_model(x, backend):
    def trained(accelerated: bool) -> dict[str, torch.Tensor]:
        torch.manual_seed(0)
        model = Model().double()
        optimizer = torch.optim.Adam(model.parameters(), 0.01)
        for n in range(4):
            if accelerated and n == 1:
                rnnfast.accelerate(model)
            if n == 3:
                rnnfast.restore(model)
            optimizer.zero_grad()
            model(x).square().sum().backward()
            optimizer.step()
        return dict(model.state_dict())

    assert_all_close(trained(False), trained(True))


def test_survey_names_what_is_left_alone_and_why(model):
    assert all(f.reason == "accelerate() was not called" for f in rnnfast.survey(model) if f.name != "own")
    rnnfast.accelerate(model)
    found = {f.name: f for f in rnnfast.survey(model)}
    assert [name for name, f in found.items() if not f.accelerated] == ["own"]
    assert str(found["own"]) == "own: GRU, the instance has a forward of its own"
    assert str(found["doubled"]) == "doubled: Doubled, accelerated"
    scripted = torch.nn.ModuleList([script(nn.LSTM(2, 3))])
    assert "torch.jit.script" in rnnfast.survey(rnnfast.accelerate(scripted))[0].reason


def script(module: nn.Module) -> nn.Module:
    """Script a module, which torch has deprecated but not removed."""
    import warnings

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*is deprecated", category=DeprecationWarning)
        return torch.jit.script(module)


def test_subclasses_keep_their_type_and_methods(model, x, backend):
    rnnfast.accelerate(model)
    assert isinstance(model.named, Named)
    assert isinstance(model.doubled, Doubled)
    assert model.named.label() == "hidden 4"
    assert len(model.named(x, lengths=torch.tensor([2, 5]), all_states=True)) == 3


def test_an_accelerated_layer_takes_what_ours_takes(x, backend):
    theirs = nn.LSTM(3, 4, dtype=torch.float64)
    ours = rnnfast.LSTM(3, 4, dtype=torch.float64)
    ours.load_state_dict(theirs.state_dict())
    options = {"lengths": torch.tensor([2, 5]), "resets": torch.rand(5, 2) < 0.5, "all_states": True}
    expected = ours(x, **options)
    got = rnnfast.accelerate(theirs)(x, **options)
    torch.testing.assert_close(got, expected, rtol=0, atol=0)


def test_the_model_may_be_a_layer_itself():
    layer = nn.GRU(2, 3)
    assert rnnfast.accelerate(layer) is layer
    assert type(layer) is rnnfast.GRU
    assert type(rnnfast.restore(layer)) is nn.GRU
    own = rnnfast.GRU(2, 3)
    assert type(rnnfast.restore(rnnfast.accelerate(own))) is rnnfast.GRU


def test_restored_layers_run_on_torchs_weights_of_today(x):
    layer = rnnfast.accelerate(nn.LSTM(3, 4)).double()
    layer.weight_hh_l0 = nn.Parameter(torch.zeros(16, 4, dtype=torch.float64))
    rnnfast.restore(layer)
    assert layer._flat_weights[1] is layer.weight_hh_l0
    assert layer(x)[0].dtype == torch.float64


def test_parametrizations_come_and_go_on_accelerated_layers(x, backend):
    layer = nn.utils.parametrizations.weight_norm(nn.LSTM(3, 4, dtype=torch.float64), "weight_hh_l0")
    expected = layer(x)[0]
    rnnfast.accelerate(layer)
    nn.utils.parametrizations.weight_norm(layer, "weight_ih_l0")
    torch.testing.assert_close(layer(x)[0], expected)
    for name in ("weight_hh_l0", "weight_ih_l0"):
        nn.utils.parametrize.remove_parametrizations(layer, name)
    assert type(layer) is rnnfast.LSTM
    assert type(rnnfast.restore(layer)) is nn.LSTM
    torch.testing.assert_close(layer(x)[0], expected)


def test_hooks_stay(x, backend):
    layer, seen = nn.LSTM(3, 4).double(), []
    layer.register_forward_hook(lambda module, args, output: seen.append(output[0].shape))
    rnnfast.accelerate(layer)(x)
    assert seen == [(5, 2, 4)]


@pytest.mark.parametrize("keep_types", [False, True])
def test_accelerated_layers_copy_and_pickle(keep_types, x, backend):
    model = nn.ModuleList([nn.LSTM(3, 4), Doubled(3, 4), Named(3, 4)]).double()
    rnnfast.accelerate(model, keep_types=keep_types)
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), torch.load(buffer, weights_only=False)):
        assert types(twin) == types(model)
        for a, b in zip(model, twin, strict=True):
            assert torch.equal(a(x)[0], b(x)[0])
        assert types(rnnfast.restore(twin)) == [("0", nn.LSTM), ("1", Doubled), ("2", Named)]


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
def test_the_default_compiles_in_one_graph_and_kept_types_do_not(x, backend):
    compile_whole = {"fullgraph": True, "backend": "aot_eager"}
    torch._dynamo.reset()
    model = rnnfast.accelerate(nn.Sequential(nn.Linear(3, 3), nn.LSTM(3, 4)).double())
    torch.testing.assert_close(torch.compile(model, **compile_whole)(x)[0], model(x)[0])
    kept = rnnfast.accelerate(nn.Sequential(nn.Linear(3, 3), nn.LSTM(3, 4)).double(), keep_types=True)
    with pytest.raises(torch._dynamo.exc.Unsupported):
        torch.compile(kept, **compile_whole)(x)
    torch.testing.assert_close(torch.compile(kept, backend="aot_eager")(x)[0], kept(x)[0])


def test_what_is_no_module_is_refused():
    for function in (rnnfast.accelerate, rnnfast.restore, rnnfast.survey):
        with pytest.raises(TypeError, match=r"expected a torch.nn.Module, got dict"):
            function({})


@pytest.mark.parametrize("function", [rnnfast.accelerate, rnnfast.restore, rnnfast.survey, rnnfast.freeze])
def test_the_error_names_the_function_that_was_called(function):
    with pytest.raises(TypeError, match=f"^{function.__name__}: expected a torch.nn.Module, got list"):
        function([nn.LSTM(2, 2)])
