"""`torch.export` and `torch.onnx.export` carry layers over with free sequence lengths and batch sizes."""

import io

import pytest
import torch
from closeness import assert_all_close
from layers import CELLS, as_tuple, pair
from torch import nn
from torch.export import Dim
from torch_releases import needs_onnx_operators

import rnnfast

DYNAMIC = {"x": {0: Dim("T"), 1: Dim("B")}, "lengths": {0: Dim("B")}}


class Wrapped(nn.Module):
    """A layer that is called with lengths, by position."""

    def __init__(self, layer: nn.Module):
        super().__init__()
        self.layer = layer

    def forward(self, x, lengths=None):
        return self.layer(x, lengths=lengths)


def named(results) -> dict[str, torch.Tensor]:
    """Name a call's output and final states."""
    output, finals = results
    return {"output": output} | {f"final{n}": s for n, s in enumerate(as_tuple(finals))}


@pytest.mark.parametrize("ragged", [False, True], ids=["dense", "lengths"])
@pytest.mark.parametrize("cell", CELLS)
def test_export_saves_loads_and_runs_other_sizes(cell, ragged, backend):
    model = Wrapped(pair(cell, 3, 7, 2, bidirectional=True, dtype=torch.float64)[1]).eval()
    x, lengths = torch.randn(5, 4, 3, dtype=torch.float64), torch.tensor([5, 0, 2, 3])
    args = (x, lengths) if ragged else (x,)
    shapes = DYNAMIC if ragged else {"x": DYNAMIC["x"]}
    buffer = io.BytesIO()
    torch.export.save(torch.export.export(model, args, dynamic_shapes=shapes), buffer)
    buffer.seek(0)
    loaded = torch.export.load(buffer).module()
    for steps, batch in ((5, 4), (9, 2), (2, 6)):
        args = [torch.randn(steps, batch, 3, dtype=torch.float64)]
        if ragged:
            args.append(torch.randint(0, steps + 1, (batch,)))
        assert_all_close(named(model(*args)), named(loaded(*args)))


def test_an_exported_layer_trains(backend):
    model = Wrapped(rnnfast.GRU(3, 7, 2))
    x = torch.randn(5, 4, 3)
    exported = torch.export.export(model, (x,), dynamic_shapes={"x": DYNAMIC["x"]}).module()
    nodes = [n for n in exported.graph.nodes if n.target is torch.ops.rnnfast.layer.default]
    save = 4
    assert [n.args[save] for n in nodes] == [False, False]
    grads = []
    for each in (model, exported):
        each(x)[0].square().sum().backward()
        grads.append({name: p.grad for name, p in each.named_parameters()})
    assert_all_close(*grads)


def onnx_session(model: nn.Module, args: tuple, dynamic_shapes):
    """Export a model and open it in ONNX Runtime."""
    pytest.importorskip("onnxscript", reason="onnxscript, which torch's ONNX exporter needs, is not installed")
    runtime = pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
    program = torch.onnx.export(model, args, dynamo=True, dynamic_shapes=dynamic_shapes, verbose=False)
    return program, runtime.InferenceSession(program.model_proto.SerializeToString())


# torch's exporter calls what torch has deprecated, and remarks that both inputs name their batch dimension B.
onnx_warnings = pytest.mark.filterwarnings(
    "ignore::DeprecationWarning", "ignore::FutureWarning", "ignore:# The axis name. B will not be used:UserWarning"
)


@onnx_warnings
@needs_onnx_operators
@pytest.mark.parametrize(("ragged", "bias"), [(False, True), (True, False)], ids=["dense", "lengths, no bias"])
@pytest.mark.parametrize("cell", ["rnn_tanh", "rnn_relu", "lstm", "gru"])
def test_onnx_runtime_gives_the_same_through_standard_operators(cell, ragged, bias, backend):
    layer = pair(cell, 3, 7, 2, bidirectional=True, bias=bias)[1]
    with torch.no_grad():
        # A GRU whose reset gate matters, so that linear_before_reset does.
        for weight in layer.parameters():
            weight.mul_(2)
    model = Wrapped(layer).eval()
    x, lengths = torch.randn(5, 4, 3), torch.tensor([5, 0, 2, 3])
    args = (x, lengths) if ragged else (x,)
    program, session = onnx_session(model, args, DYNAMIC if ragged else {"x": DYNAMIC["x"]})
    operators = [node.op_type for node in program.model_proto.graph.node]
    assert operators.count({"lstm": "LSTM", "gru": "GRU"}.get(cell, "RNN")) == 2
    for steps, batch in ((5, 4), (9, 2)):
        args = [torch.randn(steps, batch, 3)]
        if ragged:
            args.append(torch.randint(0, steps + 1, (batch,)))
        feeds = {i.name: a.numpy() for i, a in zip(session.get_inputs(), args, strict=True)}
        got = [torch.from_numpy(each) for each in session.run(None, feeds)]
        expected = named(model(*args))
        assert_all_close(expected, dict(zip(expected, got, strict=True)), 1e-5)


class Started(nn.Module):
    """A layer or cell that is called with initial states, by position."""

    def __init__(self, layer: nn.Module):
        super().__init__()
        self.layer = layer

    def forward(self, x, h, c=None):
        return tuple(torch.utils._pytree.tree_leaves(self.layer(x, h if c is None else (h, c))))


@onnx_warnings
@needs_onnx_operators
@pytest.mark.parametrize("kind", ["layer", "cell"])
@pytest.mark.parametrize("name", ["RNN", "LSTM", "GRU"])
def test_initial_states_travel_too(name, kind, backend):
    if kind == "layer":
        module = getattr(rnnfast, name)(3, 7, 2, bidirectional=True, batch_first=True)
        sizes, rows, at = ((4, 5), (2, 9)), (4,), 1
    else:
        module, sizes, rows, at = getattr(rnnfast, f"{name}Cell")(3, 7), ((4,), (2,)), (), 0
    model, states = Started(module).eval(), "hc" if name == "LSTM" else "h"
    given, other = ((torch.randn(*size, 3), *(torch.randn(*rows, size[0], 7) for _ in states)) for size in sizes)
    batch, steps = Dim("B"), Dim("T")
    shapes = {"x": {0: batch, 1: steps} if kind == "layer" else {0: batch}} | {state: {at: batch} for state in states}
    expected = dict(enumerate(model(*other)))
    exported = torch.export.export(model, given, dynamic_shapes=shapes).module()
    assert_all_close(expected, dict(enumerate(exported(*other))))
    _, session = onnx_session(model, given, shapes)
    feeds = {i.name: tensor.numpy() for i, tensor in zip(session.get_inputs(), other, strict=True)}
    got = [torch.from_numpy(each) for each in session.run(None, feeds)]
    assert_all_close(expected, dict(enumerate(got)), 1e-5)


@onnx_warnings
@needs_onnx_operators
def test_what_onnx_lacks_is_named(backend):
    pytest.importorskip("onnxscript", reason="onnxscript, which torch's ONNX exporter needs, is not installed")
    with pytest.raises(Exception, match="ONNX's LSTM has no proj_size"):
        torch.onnx.export(rnnfast.LSTM(3, 7, proj_size=5).eval(), (torch.randn(5, 4, 3),), dynamo=True, verbose=False)
