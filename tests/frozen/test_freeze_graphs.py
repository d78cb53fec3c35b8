"""Frozen layers in compiled and exported graphs, without kernels, and under another backend."""

import copy
import io

import pytest
import torch
from torch import nn
from torch_releases import needs_exporting

import rnnfast
from rnnfast import frozen_ops

FORMATS = ["float32", "int8"]


class Model(nn.Module):
    """Two layers and a product."""

    def __init__(self):
        super().__init__()
        self.rnn = nn.LSTM(7, 20, num_layers=2, bidirectional=True)
        self.out = nn.Linear(40, 3)

    def forward(self, x, lengths=None):
        y, (h, _) = self.rnn(x) if lengths is None else self.rnn(x, lengths=lengths)
        return self.out(y), h


@pytest.fixture
def frozen(request):
    torch.manual_seed(3)
    with torch.no_grad():
        yield rnnfast.freeze(Model().eval(), request.param)


@pytest.mark.parametrize("frozen", [pytest.param("float32", marks=pytest.mark.long), "int8"], indirect=True)
def test_compiled(frozen):
    compiled = torch.compile(frozen, fullgraph=True, backend="aot_eager", dynamic=True)
    for steps in (6, 9):
        x, lengths = torch.randn(steps, 3, 7), torch.tensor([3, 6, 2])
        assert torch.equal(compiled(x)[1], frozen(x)[1])
        assert torch.equal(compiled(x, lengths)[1], frozen(x, lengths)[1])
    with torch.enable_grad(), pytest.raises(RuntimeError, match="no gradient can be taken"):
        torch.compile(frozen, backend="eager")(x.requires_grad_())
    torch._dynamo.reset()


@needs_exporting
@pytest.mark.parametrize("frozen", FORMATS, indirect=True)
def test_exported(frozen, monkeypatch):
    """The program has integers and scales, which it packs when it first runs, wherever that is, and once."""
    x = torch.randn(6, 3, 7)
    program = torch.export.export(frozen, (x,), dynamic_shapes=({0: torch.export.Dim("T")},))
    buffer = io.BytesIO()
    torch.export.save(program, buffer)
    buffer.seek(0)
    loaded = torch.export.load(buffer)
    shapes = [each.shape for each in loaded.constants.values()]
    assert torch.Size((80, 7)) in shapes
    assert torch.uint8 not in {each.dtype for each in loaded.constants.values()}
    packs, pack = [], frozen_ops.kernels().pack
    monkeypatch.setattr(frozen_ops.kernels(), "pack", lambda *args: packs.append(args) or pack(*args))
    with torch.inference_mode():  # tensors made here do not count changes in place
        buffer.seek(0)
        inferred = torch.export.load(buffer).module()
    for run in (loaded.module(), inferred):
        packs.clear()
        for steps, inference in ((6, False), (11, False), (6, True)):
            x = torch.randn(steps, 3, 7)
            with torch.inference_mode(inference):
                assert torch.equal(run(x)[1], frozen(x)[1])
        assert len(packs) == 2  # one for each layer


def test_weights_of_an_operator_are_packed_again_where_they_change():
    layer = rnnfast.freeze(rnnfast.GRU(7, 20).eval())
    form, x, hx = layer._forms[0], torch.randn(6, 3, 7), [torch.zeros(1, 3, 20)]
    held = [layer.weight_ih_l0.clone(), layer.weight_hh_l0.clone(), *layer.dequantised()[2:]]

    def call(held):
        *constants, _, _ = form.cell, form.weights, 7, 20, 20, False, True, [False], False, 0, 0
        return torch.ops.rnnfast.frozen_layer(*constants, "", x, hx, held, None, None, [])[1]

    expected = layer(x)[1]
    assert torch.equal(call(held), expected)
    other = [held[0], held[1] / 2, *held[2:]]
    assert not torch.equal(call(other), expected)
    assert torch.equal(call(held), expected)
    with torch.no_grad():
        held[1].zero_()
    assert not torch.equal(call(held), expected)


@pytest.mark.parametrize("frozen", ["int8"], indirect=True)
def test_panels_of_another_processor_are_refused(frozen):
    layer, hx = frozen.rnn, [torch.zeros(2, 3, 20)] * 2
    form, layout = layer._forms[0], layer._panel_layout
    (a, b), x = layer._offsets[0], torch.randn(6, 3, 7)

    def call(x, hx, held, layout):
        *constants, _, _ = form.cell, form.weights, 7, 20, 20, False, True, [False, True], False, 0, 0
        return torch.ops.rnnfast.frozen_layer(*constants, layout, x, hx, held, None, None, [])

    panels = layer.panels[a:b]
    assert torch.equal(call(x, hx, [panels], layout)[2][0], layer(x)[1][0][0])
    with pytest.raises(RuntimeError, match=r"packed for 3 lanes, and this processor is \d+ lanes"):
        call(x, hx, [panels], "3 lanes")
    with pytest.raises(RuntimeError, match="expected panels of shape"):
        call(x, hx, [panels[1:]], layout)
    with pytest.raises(RuntimeError, match=r"expected hx\[1\] of shape \[2, 3, 20\]"):
        call(x, [hx[0], hx[1][:, :2]], [panels], layout)
    with pytest.raises(RuntimeError, match=r"expected x of shape \[T, B, 7\]"):
        call(x[..., 1:], hx, [panels], layout)


@pytest.mark.parametrize("frozen", FORMATS, indirect=True)
@pytest.mark.parametrize("backend", ["reference", "torch"])
def test_other_backends_run_on_weights_made_float32(frozen, backend):
    x = torch.randn(6, 3, 7)
    expected = frozen(x)[1]
    assert "frozen in" in rnnfast.explain(frozen.rnn, x).reason
    with rnnfast.use_backend(backend):
        found = frozen(x)[1]
        told = rnnfast.explain(frozen.rnn, x)
    assert told.backend == backend
    assert "weights are made float32 again" in told.reason
    torch.testing.assert_close(found, expected, rtol=0, atol=0.02)


@pytest.mark.parametrize("weights", FORMATS)
def test_without_kernels(weights, monkeypatch):
    layer = rnnfast.GRU(7, 20).eval()
    expected = rnnfast.freeze(copy.deepcopy(layer), weights)

    def broken(form):
        raise OSError("no compiler")

    x = torch.randn(6, 3, 7)
    output = expected(x)[0]
    with monkeypatch.context() as patch, torch.no_grad():
        patch.setattr(frozen_ops.kernels(), "kernel_of", broken)
        frozen = rnnfast.freeze(layer, weights)
        torch.testing.assert_close(frozen(x)[0], output, rtol=0, atol=0.02)
        assert "OSError: no compiler" in rnnfast.explain(frozen, x).reason
        state = frozen.state_dict()
        torch.testing.assert_close(rnnfast.Stream(frozen, batch=3)(x[0]), frozen(x[:1])[0][0])
    assert all(torch.equal(each, state[name]) for name, each in expected.state_dict().items())
