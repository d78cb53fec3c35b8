"""`torch.compile(fullgraph=True)`: whole graphs, right numbers, no recompilation for new lengths and batch sizes."""

import pytest
import torch
from closeness import assert_all_close
from layers import CELLS, pair, run
from torch._dynamo.testing import CompileCounterWithBackend
from torch.library import opcheck
from torch_releases import needs, needs_compiled_autograd

import rnnfast
from rnnfast import operators
from rnnfast.backends import dispatch

F64 = {"dtype": torch.float64}


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()


def sample(cell: str, **options):
    """Return a layer of ours and an input that wants a gradient."""
    _, ours = pair(cell, 3, 7, **options)
    return ours, torch.randn(5, 4, 3, dtype=options.get("dtype"), requires_grad=True)


@pytest.mark.parametrize("cell", CELLS)
def test_compiled_layers_equal_torch_forward_and_backward(cell, backend):
    theirs, ours = pair(cell, 3, 7, 2, bidirectional=True, **F64)
    x = torch.randn(5, 4, 3, **F64, requires_grad=True)
    expected = run(theirs, x)
    ours.forward = torch.compile(ours.forward, fullgraph=True, backend="aot_eager")
    assert_all_close(expected, run(ours, x))


@pytest.mark.parametrize("cell", ["lstm", "gru"])
def test_inductor_compiles_forward_and_backward(cell, backend):
    theirs, ours = pair(cell, 3, 7, **F64)
    x = torch.randn(5, 4, 3, **F64, requires_grad=True)
    expected = run(theirs, x)
    ours.forward = torch.compile(ours.forward, fullgraph=True, backend="inductor")
    assert_all_close(expected, run(ours, x))


@needs(torch.__version__ >= "2.7", "keeps no graphs with operators that are not its own")
def test_a_graph_kept_on_disk_serves_its_own_version_alone(backend, monkeypatch):
    layer, x = sample("lstm", **F64)

    def found_on_disk() -> bool:
        torch._dynamo.reset()
        before = torch._dynamo.utils.counters["aot_autograd"]["autograd_cache_hit"]
        torch.compile(layer, fullgraph=True)(x)[0].sum().backward()
        return torch._dynamo.utils.counters["aot_autograd"]["autograd_cache_hit"] > before

    module = dispatch.load(backend)
    forward, backward, saved_like = module.forward, module.backward, module.saved_like

    def save_more(layer, **options):
        result = forward(layer, **options)
        return result._replace(saved=(*result.saved, layer.x.clone()) if options["save"] else ())

    found_on_disk()
    assert found_on_disk()
    monkeypatch.setattr(module, "forward", save_more)
    monkeypatch.setattr(module, "backward", lambda *args: backward(*args[:2], args[2][:-1], *args[3:]))
    monkeypatch.setattr(module, "saved_like", lambda layer: (*saved_like(layer), (layer.x.shape, layer.x.dtype)))
    monkeypatch.setattr(operators, "hash_of_sources", lambda: "the next version")
    assert not found_on_disk()


def test_options_compile_in_one_graph(backend):
    layer, x = sample("lstm", **F64)
    lengths, resets = torch.tensor([3, 0, 5, 1]), torch.rand(5, 4) < 0.3
    hx = (torch.randn(1, 4, 7, **F64, requires_grad=True), torch.randn(1, 4, 7, **F64))
    options = {"lengths": lengths, "resets": resets, "all_states": True}
    expected = run(layer, x, hx, **options)
    layer.forward = torch.compile(layer.forward, fullgraph=True, backend="aot_eager")
    assert_all_close(expected, run(layer, x, hx, **options))


def test_without_gradients_the_graph_keeps_nothing_for_backward(backend):
    graphs = []

    def look(graph, inputs):
        graphs.append(graph)
        return graph.forward

    layer, x = sample("lstm")
    with torch.no_grad():
        torch.compile(layer, fullgraph=True, backend=look)(x)
    (node,) = [n for n in graphs[0].graph.nodes if n.target is torch.ops.rnnfast.layer]
    save = 4
    assert node.args[save] is False


@pytest.mark.parametrize("dynamic", [True, None], ids=["asked_for", "noticed"])
@pytest.mark.parametrize("ragged", [False, True], ids=["dense", "lengths"])
def test_new_lengths_and_batch_sizes_do_not_recompile(ragged, dynamic, backend):
    layer, _ = sample("gru")
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(layer, fullgraph=True, backend=counter, dynamic=dynamic)
    frames = []
    for steps, batch in ((5, 4), (9, 6), (3, 2), (50, 7), (8, 8)):
        x = torch.randn(steps, batch, 3, requires_grad=True)
        lengths = torch.randint(0, steps + 1, (batch,)) if ragged else None
        expected, got = layer(x, lengths=lengths)[0], compiled(x, lengths=lengths)[0]
        torch.testing.assert_close(got, expected)
        got.sum().backward()
        frames.append(counter.frame_count)
    # Left to itself Dynamo takes the first sizes for constants and finds at the second call that they are not.
    assert len(set(frames[0 if dynamic else 1 :])) == 1


def test_marked_dimensions_stay_dynamic(backend):
    layer, _ = sample("lstm")
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(layer, fullgraph=True, backend=counter)
    for steps, batch in ((5, 4), (9, 6), (17, 3)):
        x = torch.randn(steps, batch, 3)
        torch._dynamo.mark_dynamic(x, 0)
        torch._dynamo.mark_dynamic(x, 1)
        compiled(x)
    assert counter.frame_count == 1


def node_count(layer, x) -> int:
    """Return the number of nodes in a layer's traced graph."""
    torch._dynamo.reset()
    counts = []

    def count(graph, inputs):
        counts.append(len(graph.graph.nodes))
        return graph.forward

    torch.compile(layer, fullgraph=True, backend=count)(x)
    return counts[0]


def test_the_graph_does_not_grow_with_the_steps_and_by_a_constant_with_each_layer(backend):
    two, three, four = (node_count(rnnfast.LSTM(3, 7, n), torch.randn(5, 4, 3)) for n in (2, 3, 4))
    assert node_count(rnnfast.LSTM(3, 7, 2), torch.randn(500, 4, 3)) == two
    # A layer brings its 4 weights, one call and what unpacks it.
    assert four - three == three - two <= 16


def test_dropout_between_layers_is_kept(backend):
    layer = rnnfast.LSTM(3, 64, 2, dropout=0.5)
    with torch.no_grad():
        layer.weight_ih_l1.zero_()
        layer.weight_ih_l1[128:192] = torch.eye(64)  # the second layer's g sees the first layer's output, one to one
    x = torch.randn(5, 4, 3)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    assert not torch.equal(compiled(x)[0], compiled(x)[0])
    torch.manual_seed(1)
    expected = layer(x)[0]
    torch.manual_seed(1)
    torch.testing.assert_close(compiled(x)[0], expected)
    layer.eval()
    assert torch.equal(compiled(x)[0], layer(x)[0])


def test_a_model_around_the_layer_compiles_whole(backend):
    class Tagger(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.embedding = torch.nn.Embedding(10, 3)
            self.layer = rnnfast.GRU(3, 7, batch_first=True, bidirectional=True)
            self.head = torch.nn.Linear(14, 2)

        def forward(self, tokens, lengths):
            return self.head(self.layer(self.embedding(tokens), lengths=lengths)[0])

    model, tokens, lengths = Tagger(), torch.randint(10, (4, 6)), torch.tensor([6, 2, 0, 5])
    expected = model(tokens, lengths)
    expected.sum().backward()
    grads = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    got = torch.compile(model, fullgraph=True, backend="aot_eager")(tokens, lengths)
    got.sum().backward()
    torch.testing.assert_close(got, expected)
    assert_all_close(grads, {name: p.grad for name, p in model.named_parameters()})


# torch 2.14 looks at what it was given.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
@pytest.mark.parametrize(
    ("cell", "ragged", "members"),
    [("lstm_proj", False, 1), ("gru", True, 1), ("gru", True, 2)],
    ids=["dense", "lengths", "ensemble"],
)
def test_opcheck_passes_for_every_operator(cell, ragged, members, backend):
    if members > 1 and not dispatch.load(backend).TAKES_ENSEMBLES:
        pytest.skip("this backend takes no ensembles")
    name = "lstm" if cell == "lstm_proj" else cell
    layer, x = sample(cell, bidirectional=True, **F64)
    x = x[:2].detach().repeat(1, 1, members).requires_grad_()
    weights = [w.detach().clone().requires_grad_() for _ in range(members) for w in layer._flat_weights]
    widths = [5, 7] if name == "lstm" else [7]
    hx = [torch.randn(2 * members, 4, width, **F64, requires_grad=True) for width in widths]
    lengths = (torch.tensor([2, 1, 1, 0]), 2)
    batch_sizes = torch.ops.rnnfast.sort_lengths(*lengths)[0] if ragged else None
    opcheck(torch.ops.rnnfast.sort_lengths.default, lengths)
    present = [True] * 4 + [cell == "lstm_proj", False, ragged, False]
    constants = (backend, name, [False, True] * members, present)
    given = [x, *hx, *weights, *([batch_sizes] if ragged else [])]
    opcheck(torch.ops.rnnfast.layer.default, (*constants, ragged, False, given))
    with torch.no_grad():
        results = torch.ops.rnnfast.layer(*constants, True, True, given)
    count = len(hx)
    states, finals, saved = results[:count], results[count : 2 * count], results[2 * count :]
    incoming = [*(torch.randn_like(s).requires_grad_() for s in states), None, *map(torch.randn_like, finals[1:])]
    needs = [True, True, True, False]
    opcheck(torch.ops.rnnfast.layer_backward.default, (*constants, needs, 1, given, states, saved, incoming))


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
@needs_compiled_autograd
@pytest.mark.parametrize("calls", [0, 3])
@pytest.mark.parametrize("cell", ["lstm", "gru"])
def test_compiled_autograd(cell, calls, backend):
    """The backward pass compiled too: of a first call, and of one that may have been prepared."""
    _, layer = pair(cell, 3, 5)
    x = torch.randn(4, 2, 3, requires_grad=True)
    for _ in range(calls):
        layer(x)
    wanted = {"x": x, **dict(layer.named_parameters())}
    expected = torch.autograd.grad(layer(x)[0].square().sum(), list(wanted.values()))
    output, _ = layer(x)
    with torch._dynamo.compiled_autograd._enable(torch.compile(backend="aot_eager")):
        output.square().sum().backward()
    assert_all_close(dict(zip(wanted, expected, strict=True)), {name: each.grad for name, each in wanted.items()})
