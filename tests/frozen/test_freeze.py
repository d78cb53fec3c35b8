"""Frozen layers against the layers they were: every way to call them, and what they refuse."""

import copy
import inspect
import pickle
from typing import get_args

import pytest
import torch
from rnnfast_kernels.cpu import formats
from torch import nn
from torch.nn.utils.rnn import pack_sequence
from torch.utils._pytree import tree_leaves

import rnnfast

CELLS = {"lstm": rnnfast.LSTM, "gru": rnnfast.GRU, "rnn": rnnfast.RNN}
# Relative L2 error, by format. float32 is exact.
BOUNDS = {"float32": 0.0, "bfloat16": 0.005, "int8": 0.02}
FORMATS = sorted(BOUNDS)
SELDOM = [("lstm", "bfloat16"), ("rnn", "bfloat16"), ("rnn", "int8")]
LONG = pytest.mark.long
# Each of these but float32 has machine code of its own to compile.
CASES = [
    pytest.param(cell, weights, marks=[LONG] * ((cell, weights) in SELDOM), id=f"{cell}-{weights}")
    for cell in CELLS
    for weights in FORMATS
]


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(5)
    with torch.no_grad():
        yield


def error(reference, got) -> float:
    """The largest relative L2 error of the tensors in two nested results."""
    pairs = zip(tree_leaves(reference), tree_leaves(got), strict=True)
    return max(((a - b).float().norm() / a.float().norm().clamp(min=1e-9)).item() for a, b in pairs)


def both(cell: str, weights: str, *args, **options):
    layer = CELLS[cell](*args, **options).eval()
    return layer, rnnfast.freeze(copy.deepcopy(layer), weights)


@pytest.mark.parametrize(("cell", "weights"), CASES)
@pytest.mark.parametrize("sizes", [(1, 1, 1, 1), (3, 2, 5, 7), (1, 1, 33, 65), (9, 17, 40, 48), (70, 3, 16, 130)])
def test_a_frozen_layer_is_the_layer(cell, weights, sizes):
    steps, batch, inputs, hidden = sizes
    layer, frozen = both(cell, weights, inputs, hidden)
    x = torch.randn(steps, batch, inputs)
    state = torch.randn(1, batch, hidden)
    hx = (state, torch.randn(1, batch, hidden)) if cell == "lstm" else state
    for given in (None, hx):
        expected = layer(x, given)
        for _ in range(3):  # the first call, and those that find it prepared
            assert error(expected, frozen(x, given)) <= BOUNDS[weights]


@pytest.mark.parametrize(("cell", "weights"), CASES)
def test_every_way_to_call(cell, weights):
    layer, frozen = both(cell, weights, 12, 20, num_layers=2, bidirectional=True, batch_first=True, dropout=0.5)
    x, lengths = torch.randn(6, 9, 12), torch.tensor([3, 9, 0, 4, 1, 9])
    bound = BOUNDS[weights]
    assert error(layer(x, lengths=lengths), frozen(x, lengths=lengths)) <= bound
    assert error(layer(x, all_states=True), frozen(x, all_states=True)) <= bound
    assert error(layer(x[0]), frozen(x[0])) <= bound
    packed = pack_sequence([torch.randn(n, 12) for n in (2, 7, 5)], enforce_sorted=False)
    expected, got = layer(packed), frozen(packed)
    assert error((expected[0].data, expected[1]), (got[0].data, got[1])) <= bound


@pytest.mark.parametrize(("cell", "weights"), CASES)
def test_resets_and_streams(cell, weights):
    layer, frozen = both(cell, weights, 12, 20, num_layers=2)
    x, resets = torch.randn(9, 4, 12), torch.rand(9, 4) < 0.3
    assert error(layer(x, resets=resets), frozen(x, resets=resets)) <= BOUNDS[weights]
    stream = rnnfast.Stream(frozen, batch=4)
    assert torch.equal(torch.stack([stream(step).clone() for step in x]), frozen(x)[0])


@pytest.mark.parametrize("weights", ["float32", "int8", pytest.param("bfloat16", marks=LONG)])
@pytest.mark.parametrize("bias", [True, False])
def test_a_projection(weights, bias):
    layer, frozen = both("lstm", weights, 12, 40, proj_size=9, bidirectional=True, bias=bias)
    x = torch.randn(5, 3, 12)
    assert error(layer(x), frozen(x)) <= BOUNDS[weights]


@pytest.mark.parametrize("weights", FORMATS)
def test_rows_do_not_depend_on_one_another(weights):
    _, frozen = both("gru", weights, 12, 40)
    x = torch.randn(30, 21, 12)
    whole = frozen(x)[0]
    assert torch.equal(whole, frozen(x)[0])
    for threads in (1, 2):
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        assert torch.equal(whole[:, 4:5], frozen(x[:, 4:5])[0])
        assert torch.equal(whole, frozen(x)[0])
        torch.set_num_threads(before)
    first, state = frozen(x[:11])
    assert torch.equal(whole, torch.cat([first, frozen(x[11:], state)[0]]))


@pytest.mark.parametrize("weights", FORMATS)
def test_copies_and_state(weights):
    _, frozen = both("gru", weights, 12, 20, num_layers=2, bidirectional=True)
    x = torch.randn(5, 3, 12)
    expected = frozen(x)
    for other in (copy.deepcopy(frozen), pickle.loads(pickle.dumps(frozen))):
        assert error(expected, other(x)) == 0
    fresh = rnnfast.freeze(rnnfast.GRU(12, 20, num_layers=2, bidirectional=True), weights)
    assert error(expected, fresh(x)) > 0
    fresh.load_state_dict(frozen.state_dict())
    assert error(expected, fresh(x)) == 0
    assert not list(frozen.parameters())


def test_int8_is_a_quarter():
    layer, frozen = both("lstm", "int8", 256, 256)
    size = sum(each.nbytes for each in layer.state_dict().values())
    assert sum(each.nbytes for each in frozen.state_dict().values()) < 0.27 * size
    assert frozen.panels.nbytes < 0.3 * size
    assert sum(each.nbytes for each in vars(frozen).values() if isinstance(each, torch.Tensor)) < 0.3 * size
    assert not list(frozen.buffers())
    integers, scale = frozen.weight_ih_l0, frozen.weight_ih_l0_scale
    assert integers.dtype == torch.int8
    assert integers.shape == (1024, 256)
    assert scale.shape == (1024,)
    assert ((integers * scale[:, None] - layer.weight_ih_l0).abs() <= 0.5001 * scale[:, None]).all()


def test_a_model_of_torch_is_frozen_in_place():
    model = nn.ModuleDict({"a": nn.LSTM(4, 8), "b": nn.Linear(8, 8), "c": nn.GRU(8, 4, batch_first=True)})
    inner = model["a"]
    assert rnnfast.freeze(model, weights="int8") is model
    assert model["a"] is inner
    assert [(each.name, each.frozen) for each in rnnfast.survey(model)] == [("a", "int8"), ("c", "int8")]
    assert "FrozenLSTM(4, 8, weights=int8)" in repr(model)
    assert [name for name, _ in model.named_parameters()] == ["b.weight", "b.bias"]
    rnnfast.freeze(model, weights="int8")


def test_no_training():
    _, frozen = both("lstm", "int8", 4, 8)
    x = torch.randn(3, 2, 4)
    frozen(x)
    with torch.enable_grad():
        assert not frozen(x)[0].requires_grad
        with pytest.raises(RuntimeError, match="no gradient can be taken through frozen weights"):
            frozen(x.requires_grad_())
    x = x.detach()
    frozen.train()
    with pytest.raises(RuntimeError, match="for inference; call eval"):
        frozen(x)


def test_no_change_of_weights():
    _, frozen = both("gru", "int8", 4, 8)
    with pytest.raises(RuntimeError, match="weight_hh_l0 is frozen"):
        frozen.weight_hh_l0 = torch.zeros(24, 8)
    with torch.enable_grad(), pytest.raises(RuntimeError, match="inference tensor"):
        frozen.bias_ih_l0.zero_()


def test_every_format_is_named_in_the_signature():
    annotation = inspect.signature(rnnfast.freeze).parameters["weights"].annotation
    assert get_args(annotation) == tuple(formats.FORMATS) == tuple(BOUNDS)


def test_unknown_format():
    with pytest.raises(ValueError, match="one of 'float32', 'bfloat16', 'int8', got 'int4'"):
        rnnfast.freeze(nn.LSTM(4, 8), "int4")
    with pytest.raises(TypeError, match=r"freeze: expected a torch\.nn\.Module, got int"):
        rnnfast.freeze(3)


def test_nothing_to_freeze():
    with pytest.warns(RuntimeWarning, match="the model has no recurrent layer"):
        rnnfast.freeze(nn.Linear(2, 2))


@pytest.mark.parametrize(
    ("layer", "reason"),
    [
        (lambda: nn.LSTM(4, 8).double(), "torch.float64; layers of torch.float32"),
        (lambda: nn.utils.parametrizations.weight_norm(nn.GRU(4, 8), "weight_hh_l0"), "it is parametrized"),
        (lambda: type("Mine", (nn.LSTM,), {})(4, 8), "lose the methods of its class, Mine"),
        (lambda: torch.jit.script(nn.LSTM(4, 8)), "before torch.jit.script"),
        (lambda: rnnfast.freeze(nn.LSTM(4, 8), "float32"), "frozen already, in float32"),
    ],
)
def test_layers_that_cannot_be_frozen(layer, reason):
    model = nn.Sequential(layer())
    with pytest.warns(RuntimeWarning, match="0 was not frozen"):
        rnnfast.freeze(model, "int8")
    assert reason in rnnfast.survey(model)[0].not_frozen


def test_weights_that_are_not_finite_are_named():
    model = nn.Sequential(nn.GRU(4, 8), nn.LSTM(4, 8))
    model[1].weight_hh_l0[3, 2] = float("nan")
    with pytest.raises(ValueError, match=r"NaN or infinity in 1\.weight_hh_l0"):
        rnnfast.freeze(model, "int8")
    assert isinstance(model[0], nn.GRU)


def test_a_state_of_another_format():
    layer, frozen = both("lstm", "int8", 4, 8)
    expected = r"weight_ih_l0: expected torch.int8 of shape \[4, 8, 4\].*int8, got torch.float32"
    with pytest.raises(RuntimeError, match=expected):
        frozen.load_state_dict(layer.state_dict())
    state = frozen.state_dict()
    state["weight_ih_l0_scale"][0] = float("inf")
    with pytest.raises(RuntimeError, match="weight_ih_l0_scale: expected finite numbers"):
        frozen.load_state_dict(state)


def test_odd_rows():
    """Zeros, one huge value, denormals, NaN: each row is what it is beside no others."""
    layer, frozen = both("lstm", "int8", 12, 20)
    x = torch.randn(1, 6, 12)
    x[0, 0], x[0, 1, 3], x[0, 2] = 0, 1e37, 1e-40
    assert error(layer(x), frozen(x)) < BOUNDS["int8"]
    x[0, 4, 2], x[0, 5, 1] = float("nan"), float("inf")
    output = frozen(x)[0][0]
    assert output[4:].isnan().all()
    assert not output[:4].isnan().any()
