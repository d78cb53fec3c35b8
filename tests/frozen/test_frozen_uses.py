"""What users do with frozen models beside calling them: compile, trace, map, count, export, copy, load."""

import copy
import pickle
import threading

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from torch_releases import needs_onnx_operators

import rnnfast

LONG = pytest.mark.long
FORMATS = ["float32", "int8"]


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(11)
    with torch.no_grad():
        yield


def frozen(weights="int8", **options) -> nn.Module:
    return rnnfast.freeze(rnnfast.LSTM(7, 20, **options), weights)


def same(a, b) -> bool:
    leaves = zip(torch.utils._pytree.tree_leaves(a), torch.utils._pytree.tree_leaves(b), strict=True)
    return all(torch.equal(x, y) for x, y in leaves)


@pytest.mark.parametrize("weights", [pytest.param("float32", marks=LONG), "int8"])
def test_compiled_with_a_weight_that_is_read(weights):
    layer, x = frozen(weights, num_layers=2), torch.randn(6, 3, 7)

    def call(x):
        return layer(x)[0] + layer.weight_ih_l0.float().abs().amax()

    compiled = torch.compile(call, fullgraph=True, backend="eager")
    assert same(compiled(x), call(x))
    torch._dynamo.reset()


@pytest.mark.parametrize("weights", FORMATS)
@pytest.mark.filterwarnings("ignore:.*torch.jit.trace.*")
def test_traced(weights):
    """A trace has torch's operator over weights made float32 again, which with int8 is not quite what a call does."""
    layer, x = frozen(weights), torch.randn(6, 3, 7)
    traced = torch.jit.trace(layer, (x,), check_trace=weights == "float32")
    other = torch.randn(9, 2, 7)
    with rnnfast.use_backend("torch"):
        expected = layer(other)
    assert torch.allclose(traced(other)[0], expected[0], atol=1e-6)
    assert torch.allclose(layer(other)[0], expected[0], atol=0.02)
    assert same(layer(other), layer(other.clone()))
    assert "torch.jit.trace" not in rnnfast.explain(layer, x).reason


@pytest.mark.parametrize("weights", FORMATS)
def test_mapped(weights):
    layer, x = frozen(weights, num_layers=2, bidirectional=True), torch.randn(4, 6, 3, 7)
    expected = torch.stack([layer(each)[0] for each in x])
    assert same(torch.vmap(lambda a: layer(a)[0])(x), expected)
    states = torch.randn(4, 4, 3, 20), torch.randn(4, 4, 3, 20)
    with_states = torch.stack([layer(x[0], (h, c))[1][1] for h, c in zip(*states, strict=True)])
    assert same(torch.vmap(lambda h, c: layer(x[0], (h, c))[1][1])(*states), with_states)
    lengths = torch.tensor([3, 6, 0])
    expected = torch.stack([layer(each, lengths=lengths)[0] for each in x])
    assert same(torch.vmap(lambda a: layer(a, lengths=lengths)[0])(x), expected)
    resets = torch.rand(4, 6, 3) < 0.3
    one_way = frozen(weights)
    expected = torch.stack([one_way(x[0], resets=each, all_states=True)[2][1] for each in resets])
    assert same(torch.vmap(lambda r: one_way(x[0], resets=r, all_states=True)[2][1])(resets), expected)


def test_mapped_member_by_member():
    cell = rnnfast.cells.augru
    layer = rnnfast.freeze(rnnfast.Recurrent(cell, 7, 20), "int8")
    x, signal = torch.randn(6, 3, 7), torch.rand(4, 6, 3, 1)
    expected = torch.stack([layer(x, signals={"attention": each})[0] for each in signal])
    assert same(torch.vmap(lambda s: layer(x, signals={"attention": s})[0])(signal), expected)


@pytest.mark.parametrize("calls", [0, 2])
def test_products_are_counted(calls):
    x = torch.randn(6, 3, 7)
    for layer in (rnnfast.LSTM(7, 20, proj_size=9, bidirectional=True), rnnfast.LSTM(7, 20, num_layers=2)):
        ways = layer, rnnfast.freeze(copy.deepcopy(layer), "int8")
        counts = []
        for each in ways:
            for _ in range(calls):
                each(x)
            with FlopCounterMode(display=False) as mode:
                each(x)
            counts.append(mode.get_total_flops())
        assert counts[0] == counts[1] > 0


def test_autocast_and_float64():
    layer, x = frozen("float32"), torch.randn(6, 3, 7)
    with torch.autocast("cpu", torch.bfloat16):
        with pytest.raises(RuntimeError, match=r"same dtype, got torch\.float32 and torch\.float64"):
            layer(x.double())
        state = torch.zeros(1, 3, 20)
        with pytest.raises(RuntimeError, match=r"same dtype, got torch\.float32 and torch\.float64"):
            layer(x, (state, state.double()))
    with pytest.raises(ValueError, match=r"expected an input of torch\.float32, .* got torch\.float64"):
        layer(x.double())


def test_a_state_is_never_taken_by_halves():
    layer, x = frozen(), torch.randn(6, 3, 7)
    expected, other = layer(x), frozen().state_dict()
    plain = rnnfast.LSTM(7, 20)
    mixed = {**other, "weight_hh_l0": plain.state_dict()["weight_hh_l0"]}
    without_scales = {name: each for name, each in other.items() if name != "weight_hh_l0_scale"}
    scales_alone = {name: each for name, each in other.items() if name != "weight_hh_l0"}
    for state, told in (
        (mixed, r"weight_hh_l0: expected torch.int8 of shape \[4, 20, 20\].*got torch.float32"),
        (without_scales, "weight_hh_l0_scale: expected it beside weight_hh_l0, got that alone"),
        (scales_alone, "weight_hh_l0: expected it beside weight_hh_l0_scale, got that alone"),
        (rnnfast.freeze(rnnfast.LSTM(7, 20), "bfloat16").state_dict(), "got torch.bfloat16"),
    ):
        with pytest.raises(RuntimeError, match=told):
            layer.load_state_dict(state, strict=False)
        assert same(layer(x), expected)
    biases = {name: each for name, each in other.items() if name.startswith("bias")}
    layer.load_state_dict(biases, strict=False)
    assert torch.equal(layer.bias_ih_l0, other["bias_ih_l0"])
    assert not same(layer(x), expected)


@pytest.mark.parametrize("kind", [nn.LSTM, rnnfast.LSTM])
def test_layers_that_are_not_frozen_refuse_integers(kind):
    plain = kind(7, 20)
    before = plain.weight_ih_l0.clone()
    with pytest.raises(RuntimeError, match="size mismatch for weight_ih_l0"):
        plain.load_state_dict(frozen().state_dict(), strict=False)
    assert torch.equal(plain.weight_ih_l0, before)
    plain.load_state_dict(rnnfast.freeze(rnnfast.LSTM(7, 20), "bfloat16").state_dict())


@needs_onnx_operators
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("weights", [*(pytest.param(each, marks=LONG) for each in ("float32", "bfloat16")), "int8"])
def test_onnx_gets_weights_made_float32(weights):
    pytest.importorskip("onnxscript", reason="onnxscript, which torch's ONNX exporter needs, is not installed")
    runtime = pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
    layer = rnnfast.freeze(rnnfast.LSTM(7, 20, num_layers=2, bidirectional=True), weights)
    program = torch.onnx.export(
        layer, (torch.randn(6, 3, 7),), dynamo=True, verbose=False, dynamic_shapes={"input": {0: torch.export.Dim("T")}}
    )
    session = runtime.InferenceSession(program.model_proto.SerializeToString())
    x = torch.randn(9, 3, 7)
    with rnnfast.use_backend("reference"):
        expected = layer(x)[0]
    found = session.run(None, {session.get_inputs()[0].name: x.numpy()})[0]
    torch.testing.assert_close(torch.from_numpy(found), expected)


def test_threads_that_call_and_copy():
    layer = frozen(num_layers=2)
    inputs = [torch.randn(steps, 3, 7) for steps in range(1, 9)]
    expected, found, failures = [layer(x) for x in inputs], {}, []

    def work(n: int) -> None:
        try:
            with torch.no_grad():
                for k in range(12):
                    at = (n + k) % len(inputs)
                    other = copy.deepcopy(layer) if k % 3 else pickle.loads(pickle.dumps(layer))
                    found[n, k] = same(other(inputs[at]), expected[at]) and same(layer(inputs[at]), expected[at])
        except Exception as error:  # told in the main thread
            failures.append(error)

    threads = [threading.Thread(target=work, args=(n,)) for n in range(4)]
    for each in threads:
        each.start()
    for each in threads:
        each.join()
    assert not failures
    assert len(found) == 48
    assert all(found.values())


def test_a_replica():
    """As torch.nn.DataParallel makes it."""
    layer, x = frozen(), torch.randn(6, 3, 7)
    replica = layer._replicate_for_data_parallel()
    expected = layer(x)
    assert same(replica(x), expected)
    replica.load_state_dict(frozen().state_dict())
    assert not same(replica(x), expected)
    assert same(layer(x), expected)


def test_warming_up_leaves_frozen_layers_alone():
    model = nn.ModuleList([frozen(), rnnfast.freeze(rnnfast.Recurrent(rnnfast.cells.augru, 7, 20), "int8")])
    rnnfast.warmup(model)
    assert not any(layer.training for layer in model)
    assert model[0](torch.randn(6, 3, 7))[0].isfinite().all()
