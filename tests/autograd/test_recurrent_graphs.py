"""Layers of declared cells in graphs: `torch.compile`, `torch.export`, fake tensors, operators with wrong sizes."""

import pytest
import torch
from closeness import assert_all_close
from conftest import backends_under_test
from recurrent_layers import F64, everything, make
from torch_releases import needs_onnx_operators

import rnnfast

PRESENT = [True, True, True, True, False, True, False, False]
pytestmark = pytest.mark.skipif(backends_under_test() != ["numba"], reason="these are kernels of the CPU")


def compute(layer, x, hx, signals, lengths=None):
    output, finals = layer(x, hx, signals=signals, lengths=lengths)
    return output.sin().sum() + sum(final.cos().sum() for final in finals)


def test_one_graph_with_gradients():
    layer, x, hx, signals = make(directions=2)
    compiled = torch.compile(compute, fullgraph=True, backend="aot_eager")
    leaves = [x, *hx.values(), *signals.values(), *layer.parameters()]
    for options in ({}, {"lengths": torch.tensor([3, 0, 5, 2])}):
        expected = compute(layer, x, hx, signals, **options)
        got = compiled(layer, x, hx, signals, **options)
        grads = [torch.autograd.grad(each, leaves) for each in (expected, got)]
        assert_all_close(dict(enumerate((expected, *grads[0]))), dict(enumerate((got, *grads[1]))), 1e-12)


def test_exported_programs_run():
    layer, x, hx, signals = make()
    hx, signals = ({n: t.detach() for n, t in each.items()} for each in (hx, signals))

    class Whole(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = layer

        def forward(self, x, hx, signals):
            return self.layer(x, hx, signals=signals)[0]

    program = torch.export.export(Whole(), (x.detach(), hx, signals))
    nodes = [str(node.target) for node in program.graph.nodes if "rnnfast.layer" in str(node.target)]
    assert len(nodes) == 1
    assert everything.identity in str(program.graph)
    assert torch.equal(program.module()(x.detach(), hx, signals), layer(x, hx, signals=signals)[0])


def test_operators_check_what_they_are_given():
    x = make()[1].detach()
    weights = [torch.zeros(shape, **F64) for shape in ((57, 3), (38, 19), (57,), (38,), (2, 19))]
    hx = [torch.zeros(1, 4, 19, **F64) for _ in range(3)]
    of = [torch.zeros(5, 4, 19, **F64), torch.zeros(1, 1, 1, **F64)]

    def call(cell=everything.identity, x=x, hx=hx, weights=weights, signals=of):
        return torch.ops.rnnfast.layer("numba", cell, [False], PRESENT, True, True, [x, *hx, *signals, *weights])

    assert len(call()) == 7
    for wrong, says in (
        ({"hx": [hx[0][..., :18], *hx[1:]]}, r"expected hx\[0\] of shape"),
        ({"hx": [*hx[:2], hx[2][..., :18]]}, r"expected hx\[2\] of shape"),
        ({"hx": hx[:2]}, "expected 11 tensors"),
        ({"x": x[..., :2]}, "expected x of shape"),
        ({"x": x.float()}, "expected w_ih of direction 0"),
        ({"weights": [*weights[:4], weights[4][:1]]}, "expected parameters of direction 0"),
        ({"signals": of[:1]}, "expected 11 tensors of a layer of .*, got 10"),
        ({"signals": [of[0][:2], of[1]]}, "expected the signal s to be broadcastable"),
        ({"cell": "everything-0123"}, "is not declared in this process"),
    ):
        with pytest.raises(RuntimeError, match=says):
            call(**wrong)


def test_shapes_of_fake_tensors_are_those_of_results():
    layer, x, _, signals = make(directions=2)
    flat = [
        getattr(layer, f"{n}_l0{d}") for d in ("", "_reverse") for n in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
    ]
    weights = [t.detach() for t in flat[:4]] + [torch.zeros(2, 19, **F64)]
    weights = [*weights, *(t.detach() for t in flat[4:]), torch.zeros(2, 19, **F64)]
    hx = [torch.zeros(2, 4, 19, **F64) for _ in range(3)]
    of = [s.detach().reshape((1,) * (3 - s.dim()) + s.shape) for s in signals.values()]
    for save, all_states in ((True, False), (False, True), (False, False)):
        tensors = [x.detach(), *hx, *of, *weights]
        args = ("numba", everything.identity, [False, True], PRESENT, save, all_states, tensors)
        torch.library.opcheck(torch.ops.rnnfast.layer, args, test_utils=("test_schema", "test_faketensor"))


def test_warmup_runs_every_kernel():
    layer = make()[0]
    rnnfast.warmup(torch.nn.Sequential(layer))
    assert all(weight.grad is None for weight in layer.parameters())


def test_explain_names_what_runs():
    layer, x, _, _ = make()
    told = rnnfast.explain(layer, x)
    assert told.backend == "numba"
    assert told.kernel.startswith("whole-layer everything kernel")
    with rnnfast.use_backend("reference"):
        assert "plain loop" in rnnfast.explain(layer, x).kernel
    half = rnnfast.explain(layer, x.to(torch.complex64))
    assert half.backend == "reference"
    assert "not torch.complex64" in half.reason


@needs_onnx_operators
def test_onnx_export_says_that_it_cannot():
    layer, x, _, signals = make()
    layer.eval()
    with pytest.raises(Exception, match="cannot be exported to ONNX"):
        torch.onnx.export(layer, (x.detach(),), dynamo=True, kwargs={"signals": signals})
