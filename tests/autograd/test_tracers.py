"""Tracers other than torch.compile: torch.fx, torch.jit, the older ONNX exporter; and torch.func.functionalize."""

import io
import warnings

import pytest
import torch
from layers import pair
from torch import nn
from torch.func import functional_call, functionalize, grad, hessian, jacrev, vjp, vmap
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

import rnnfast

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*is deprecated:DeprecationWarning", "ignore:.*is deprecated:FutureWarning"
)
CELLS = ["RNNCell", "LSTMCell", "GRUCell"]
FORMS = {
    "rnn_tanh": {"batch_first": True},
    "lstm": {"num_layers": 2, "bidirectional": True},
    "gru": {"bias": False},
}


class Model(nn.Module):
    """A layer or cell under a name."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x):
        return self.layer(x)


class WithState(Model):
    """A layer over an input and a state."""

    def forward(self, x, hx):
        return self.layer(x, hx)


class Packs(Model):
    """A layer over a packed sequence."""

    def forward(self, x, lengths):
        output, finals = self.layer(pack_padded_sequence(x, lengths, enforce_sorted=False))
        return pad_packed_sequence(output)[0], finals


@pytest.mark.parametrize("how", ["ours", "keep_types", "accelerated"])
@pytest.mark.parametrize("cell", FORMS)
def test_fx_takes_a_layer_for_a_leaf(cell, how):
    theirs, ours = pair(cell, 3, 4, **FORMS[cell])
    if how != "ours":
        ours = rnnfast.accelerate(theirs, keep_types=how == "keep_types")
    model = nn.Sequential(nn.Linear(3, 3), ours).double()
    graph = torch.fx.symbolic_trace(model)
    assert [node.target for node in graph.graph.nodes if node.op == "call_module"] == ["0", "1"]
    x = torch.randn(5, 2, 3, dtype=torch.float64)
    torch.testing.assert_close(graph(x), model(x), rtol=0, atol=0)


def test_fx_keeps_our_options():
    class Options(Model):
        def forward(self, x, h, lengths):
            return self.layer(x, h, lengths=lengths, all_states=True)[2]

    model, args = Options(rnnfast.GRU(3, 4)), (torch.randn(5, 2, 3), torch.randn(1, 2, 4), torch.tensor([3, 5]))
    torch.testing.assert_close(torch.fx.symbolic_trace(model)(*args), model(*args), rtol=0, atol=0)


@pytest.mark.parametrize("name", CELLS)
def test_fx_and_jit_take_cells(name):
    model, x = Model(getattr(rnnfast, name)(3, 4)), torch.randn(5, 3)
    graph = torch.fx.symbolic_trace(model)
    assert [node.target for node in graph.graph.nodes if node.op == "call_module"] == ["layer"]
    torch.testing.assert_close(graph(x), model(x), rtol=0, atol=0)
    torch.testing.assert_close(torch.jit.trace(model, (torch.randn(2, 3),))(x), model(x))


@pytest.mark.parametrize("given", [False, True], ids=["zero", "given"])
@pytest.mark.parametrize("cell", FORMS)
def test_a_trace_leaves_sizes_free(cell, given):
    theirs, ours = pair(cell, 3, 4, **FORMS[cell])

    def args(steps, batch):
        x = torch.randn(batch, steps, 3) if theirs.batch_first else torch.randn(steps, batch, 3)
        h = torch.randn(theirs.num_layers * (1 + theirs.bidirectional), batch, 4)
        return (x, (h, h.clone()) if cell == "lstm" else h) if given else (x,)

    traced = torch.jit.trace((WithState if given else Model)(ours), args(5, 2))
    buffer = io.BytesIO()
    torch.jit.save(traced, buffer)
    buffer.seek(0)
    loaded = torch.jit.load(buffer)
    for sizes in ((7, 3), (1, 1)):
        x = args(*sizes)
        torch.testing.assert_close(traced(*x), theirs(*x))
        torch.testing.assert_close(loaded(*x), theirs(*x))


def test_a_trace_of_other_forms():
    theirs, ours = pair("lstm", 3, 4)
    x, lengths = torch.randn(7, 3, 3), torch.tensor([2, 7, 4])
    traced = torch.jit.trace(Packs(ours), (torch.randn(5, 2, 3), torch.tensor([3, 5])))
    torch.testing.assert_close(traced(x, lengths), Packs(theirs)(x, lengths))
    torch.testing.assert_close(torch.jit.trace(ours, x[:3, 0])(x[:, 0]), theirs(x[:, 0]))
    with pytest.raises(RuntimeError, match=r"torch.jit.trace .* neither lengths"):
        torch.jit.trace(lambda x, n: ours(x, lengths=n)[0], (x, lengths))


@pytest.mark.parametrize("cell", FORMS)
def test_the_older_onnx_exporter(cell):
    pytest.importorskip("onnx")
    _, ours = pair(cell, 3, 4)
    buffer = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what that exporter says of batch sizes and of itself
        torch.onnx.export(Model(ours), (torch.randn(5, 2, 3),), buffer, dynamo=False)
    assert {"rnn_tanh": b"RNN", "lstm": b"LSTM", "gru": b"GRU"}[cell] in buffer.getvalue()


@pytest.mark.parametrize("name", ["RNN", "LSTM", "GRU", *CELLS])
def test_script_says_what_to_do(name):
    model = Model(getattr(rnnfast, name)(3, 4))
    parameters = [*model.parameters()]
    with pytest.raises(TypeError, match=r"rnnfast.restore\(model, own=True\)"):
        torch.jit.script(model)
    assert type(rnnfast.restore(model).layer) is getattr(rnnfast, name)
    assert rnnfast.restore(model, own=True) is model
    assert type(model.layer) is getattr(nn, name)
    assert all(a is b for a, b in zip(parameters, model.parameters(), strict=True))
    x = torch.randn(5, 3) if name in CELLS else torch.randn(5, 2, 3)
    torch.testing.assert_close(torch.jit.script(model)(x), model(x))


def test_restore_does_not_guess_at_subclasses():
    class Mine(rnnfast.GRU):
        pass

    with pytest.raises(TypeError, match="layer is a Mine, derived from rnnfast's"):
        rnnfast.restore(Model(Mine(2, 3)), own=True)


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("cell", ["lstm", "gru"])
def test_functionalize_and_recomputing_under_transforms(cell, recompute):
    theirs, ours = pair(cell, 3, 4, dtype=torch.float64, **FORMS[cell])
    ours.recompute = recompute
    x = torch.randn(5, 2, 3, dtype=torch.float64, requires_grad=True)
    weights = {name: p.detach() for name, p in ours.named_parameters()}

    def by_weights(weights):
        return functional_call(ours, weights, (x.detach(),))[0].square().sum()

    def by_input(x):
        return ours(x)[0].square().sum()

    wanted = torch.autograd.grad(theirs(x)[0].square().sum(), [x, *theirs.parameters()])
    found = torch.autograd.grad(functionalize(by_input)(x), [x, *ours.parameters()])
    torch.testing.assert_close(found, wanted)
    by_name = dict(zip(weights, wanted[1:], strict=True))
    torch.testing.assert_close(functionalize(grad(by_weights))(weights), by_name)
    torch.testing.assert_close(grad(by_weights)(weights), by_name)
    torch.testing.assert_close(jacrev(by_weights)(weights), by_name)
    torch.testing.assert_close(vjp(by_input, x.detach())[1](torch.ones((), dtype=x.dtype))[0], wanted[0])
    torch.testing.assert_close(vmap(grad(by_input))(x.detach()[None])[0], wanted[0])
    if recompute:
        ours.recompute = False
        plain = hessian(by_input)(x.detach())
        ours.recompute = True
        torch.testing.assert_close(hessian(by_input)(x.detach()), plain)
