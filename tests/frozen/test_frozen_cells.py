"""Frozen layers of declared cells against the layers they were."""

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import pack_sequence
from torch.utils._pytree import tree_leaves
from torch_releases import needs_exporting

import rnnfast

# Relative L2 error, by format. float32 is exact.
BOUNDS = {"float32": 0.0, "bfloat16": 0.01, "int8": 0.03}
LONG = pytest.mark.long
# Kernels are compiled for each cell and format but float32: few of them in the default run.
DEFAULT = {("augru", "float32"), ("augru", "int8")}
NAMES = ("augru", "peephole_lstm", "slstm", "indrnn", "sru", "recurrent_lif", "zoneout_lstm")
CASES = [
    pytest.param(name, weights, marks=[LONG] * ((name, weights) not in DEFAULT), id=f"{name}-{weights}")
    for name in NAMES
    for weights in BOUNDS
]


@rnnfast.cell(gates="a b", states="shown kept", recurrent="a", parameters="w_ih bias", read="kept")
def reads_another_state(x, u, state, p):
    """Names of parameters that weights have, too, and a product over a state that is not the output."""
    kept = state[1] + 0.5 * torch.tanh(x.a + u.a + p.w_ih * state[0])
    return torch.tanh(x.b + kept) * p.bias, kept


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(7)
    with torch.no_grad():
        yield


def error(reference, got) -> float:
    """The largest relative L2 error of the tensors in two nested results."""
    pairs = zip(tree_leaves(reference), tree_leaves(got), strict=True)
    return max(((a - b).float().norm() / a.float().norm().clamp(min=1e-9)).item() for a, b in pairs)


def both(cell, weights: str, *args, **options):
    layer = rnnfast.Recurrent(cell, *args, **options).eval()
    return layer, rnnfast.freeze(copy.deepcopy(layer), weights)


def signals_for(cell, *shape: int) -> dict:
    return {name: torch.rand(*shape) for name in cell.signals}


@pytest.mark.parametrize(("name", "weights"), CASES)
def test_a_frozen_layer_is_the_layer(name, weights):
    cell = getattr(rnnfast.cells, name)
    # A spike is 0 or 1: one that rounding moves changes all that follows.
    bound = BOUNDS[weights] if name != "recurrent_lif" or weights == "float32" else 1.0
    layer, frozen = both(cell, weights, 12, 20, num_layers=2, bidirectional=True, batch_first=True)
    x, given = torch.randn(6, 9, 12), {"signals": signals_for(cell, 6, 9, 20)}
    hx = tuple(torch.rand(4, 6, 20) for _ in cell.states)
    for states in (None, hx):
        for _ in range(2):  # the second call finds the first one prepared
            assert error(layer(x, states, **given), frozen(x, states, **given)) <= bound
    lengths = torch.tensor([3, 9, 0, 4, 1, 9])
    options = {"lengths": lengths, "all_states": True}
    assert error(layer(x, **options, **given), frozen(x, **options, **given)) <= bound
    for copied in (copy.deepcopy(frozen), pickle.loads(pickle.dumps(frozen))):
        assert error(frozen(x, **given), copied(x, **given)) == 0


def test_states_by_name_resets_and_unbatched_input():
    cell = rnnfast.cells.augru
    layer, frozen = both(cell, "int8", 12, 20)
    x, resets = torch.randn(9, 12), torch.rand(9) < 0.4
    given = {"signals": {"attention": torch.rand(9, 1)}, "resets": resets}
    hx = {"h": torch.randn(1, 20)}
    assert error(layer(x, hx, **given), frozen(x, hx, **given)) <= BOUNDS["int8"]
    packed = pack_sequence([torch.randn(n, 12) for n in (2, 7, 5)], enforce_sorted=False)
    signals = {"attention": torch.rand(7, 3, 1)}
    expected, got = layer(packed, signals=signals), frozen(packed, signals=signals)
    assert error((expected[0].data, expected[1]), (got[0].data, got[1])) <= BOUNDS["int8"]
    for call in (layer, frozen):
        with pytest.raises(ValueError, match="augru expects attention, got none"):
            call(x)
        with pytest.raises(ValueError, match=r"expected attention to be broadcastable to \[9, 20\]"):
            call(x, signals={"attention": torch.rand(3, 1)})


@pytest.mark.parametrize("weights", ["float32", pytest.param("int8", marks=LONG)])
def test_a_cell_with_names_of_weights(weights):
    layer, frozen = both(reads_another_state, weights, 5, 33, num_layers=2)
    x = torch.randn(7, 2, 5)
    for states in (None, (torch.randn(2, 2, 33), None)):
        assert error(layer(x, states), frozen(x, states)) <= BOUNDS[weights]
    assert torch.equal(frozen.w_ih_l1, layer.w_ih_l1)
    assert torch.equal(frozen.bias_l0, layer.bias_l0)
    with pytest.raises(RuntimeError, match="w_ih_l0 is frozen"):
        frozen.w_ih_l0 = torch.zeros(33)
    with pytest.raises(RuntimeError, match="its weights are frozen"):
        frozen.reset_parameters()
    stream = rnnfast.Stream(frozen, batch=2)
    assert torch.equal(torch.stack([stream(step).clone() for step in x]), frozen(x)[0])
    assert error(frozen(x)[1], stream.state) == 0


def test_state_and_other_backends():
    layer, frozen = both(rnnfast.cells.augru, "int8", 12, 20, bias=False)
    x, given = torch.randn(9, 2, 12), {"signals": {"attention": torch.rand(9, 2, 1)}}
    state = frozen.state_dict()
    assert set(state) == {"weight_ih_l0", "weight_hh_l0", "weight_ih_l0_scale", "weight_hh_l0_scale"}
    _, other = both(rnnfast.cells.augru, "int8", 12, 20, bias=False)
    assert error(frozen(x, **given), other(x, **given)) > 0.1
    other.load_state_dict(state)
    assert error(frozen(x, **given), other(x, **given)) == 0
    with pytest.raises(RuntimeError, match=r"weight_ih_l0: expected torch.int8 of shape \[3, 20, 12\]"):
        other.load_state_dict(layer.state_dict())
    expected = frozen(x, **given)
    with rnnfast.use_backend("reference"):
        assert 0 < error(expected, frozen(x, **given)) < BOUNDS["int8"]
        assert "weights are made float32 again" in rnnfast.explain(frozen, x).reason
    assert "frozen in int8" in rnnfast.explain(frozen, x).reason
    assert "weights=int8" in repr(frozen)
    assert isinstance(frozen, rnnfast.Recurrent)
    assert [(each.type, each.frozen) for each in rnnfast.survey(frozen)] == [("FrozenRecurrent", "int8")]


def test_compiled():
    _, frozen = both(rnnfast.cells.augru, "int8", 12, 20, num_layers=2)
    compiled = torch.compile(lambda x, s: frozen(x, signals={"attention": s}), fullgraph=True, backend="aot_eager")
    x, signal = torch.randn(9, 2, 12), torch.rand(9, 2, 1)
    assert error(frozen(x, signals={"attention": signal}), compiled(x, signal)) == 0
    torch._dynamo.reset()


class Model(nn.Module):
    """A frozen layer behind positional arguments."""

    def __init__(self):
        super().__init__()
        self.layer = both(rnnfast.cells.augru, "int8", 12, 20)[1]

    def forward(self, x, signal):
        return self.layer(x, signals={"attention": signal})[0]


@needs_exporting
def test_exported():
    model, args = Model(), (torch.randn(9, 2, 12), torch.rand(9, 2, 1))
    assert torch.equal(torch.export.export(model, args).module()(*args), model(*args))


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
@needs_exporting
def test_what_cannot_be_exported_is_named():
    model, args = Model().eval(), (torch.randn(9, 2, 12), torch.rand(9, 2, 1))
    with pytest.raises(RuntimeError, match="record torch's own operators"):
        torch.jit.trace(both(rnnfast.cells.slstm, "float32", 12, 20)[1], args[:1])
    pytest.importorskip("onnxscript", reason="onnxscript, which torch's ONNX exporter needs, is not installed")
    with pytest.raises(Exception, match="export") as raised:
        torch.onnx.export(model, args, dynamo=True, verbose=False)
    assert "layers of declared cells, such as augru, cannot be exported to ONNX" in str(raised.value.__cause__)


@pytest.mark.parametrize(
    ("layer", "reason"),
    [
        (lambda: rnnfast.Recurrent(rnnfast.cells.augru, 4, 8).double(), "torch.float64; layers of torch.float32"),
        (lambda: type("Mine", (rnnfast.Recurrent,), {})(rnnfast.cells.augru, 4, 8), "the methods of its class, Mine"),
        (
            lambda: nn.utils.parametrizations.weight_norm(rnnfast.Recurrent(rnnfast.cells.augru, 4, 8), "weight_hh_l0"),
            "it is parametrized",
        ),
    ],
)
def test_layers_that_are_left_alone(layer, reason):
    model = nn.Sequential(layer())
    with pytest.warns(RuntimeWarning, match=f"0 was not frozen: .*{reason}"):
        rnnfast.freeze(model, "int8")
    assert reason in rnnfast.survey(model)[0].not_frozen


def test_a_parameter_that_is_not_finite_is_named():
    layer = rnnfast.Recurrent(rnnfast.cells.peephole_lstm, 4, 8)
    layer.p_f_l0[3] = float("inf")
    with pytest.raises(ValueError, match="NaN or infinity in p_f_l0"):
        rnnfast.freeze(layer, "float32")
