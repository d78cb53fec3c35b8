"""The fast path in training: the same bits as by the ordinary one, and only where nothing else can tell."""

import pytest
import torch
from cpu_layers import threads
from layers import CELLS, as_tuple, ordinary_path, pair, random_hx
from torch import nn
from torch.utils.checkpoint import checkpoint
from torch_releases import needs_saving_hooks

import rnnfast
from rnnfast import fast_path

pytestmark = needs_saving_hooks

FORMS = {
    "plain": {},
    "stacked": {"num_layers": 3, "bias": False},
    "both": {"num_layers": 2, "bidirectional": True},
    "batch-first": {"batch_first": True, "bidirectional": True},
    "dropout": {"num_layers": 2, "dropout": 0.5},
    "double": {"dtype": torch.float64},
    "bfloat16": {"dtype": torch.bfloat16},
}
cells = pytest.mark.parametrize("cell", CELLS)


@pytest.fixture(autouse=True)
def forgotten():
    fast_path.recorded.clear()


def is_fast(tensor: torch.Tensor) -> bool:
    """Say whether a tensor comes from a recorded layer."""
    nodes, seen = [tensor.grad_fn], []
    while nodes:
        node = nodes.pop()
        if node is not None:
            seen.append(node.name())
            nodes += [before for before, _ in node.next_functions]
    assert any("Layer" in name for name in seen)
    return "FastLayerBackward" in seen


def repeated(layer: nn.Module, *args):
    """Call a layer twice, and return the results of the second call."""
    layer(*args)
    results = layer(*args)
    assert is_fast(results[0])
    return results


def differentiate(layer: nn.Module, x: torch.Tensor, hx) -> list[torch.Tensor]:
    """Results of one call, and every gradient."""
    torch.manual_seed(1)
    output, finals = layer(x, hx)
    results = [output, *as_tuple(finals)]
    leaves = [
        leaf for leaf in (x, *(as_tuple(hx) if hx is not None else ()), *layer.parameters()) if leaf.requires_grad
    ]
    return [*results, *torch.autograd.grad(sum(each.sin().sum() for each in results), leaves)]


@pytest.mark.parametrize("given", ["zero", "given", "learned"])
@pytest.mark.parametrize("form", FORMS)
@cells
def test_repeated_calls_give_the_same_bits(cell, form, given):
    _, layer = pair(cell, 5, 19, **FORMS[form])
    x = torch.randn(4, 3, 5, dtype=layer.weight_hh_l0.dtype, requires_grad=given != "given")
    hx = None if given == "zero" else random_hx(layer, 4 if layer.batch_first else 3)
    if given == "given":
        hx = tuple(s.detach() for s in hx) if isinstance(hx, tuple) else hx.detach()
    with ordinary_path():
        expected = differentiate(layer, x, hx)
    first, found = [differentiate(layer, x, hx) for _ in range(2)]
    assert is_fast(first[0])
    assert is_fast(found[0])
    assert not is_fast(expected[0])
    for a, *others in zip(expected, first, found, strict=True):
        assert all(a.stride() == b.stride() for b in others)
        assert all(torch.equal(a, b) for b in others)
    addresses = {each.untyped_storage().data_ptr() for each in found}
    assert len(addresses) == len(found)


@cells
def test_a_part_of_the_gradients_of_a_part_of_the_results(cell):
    _, layer = pair(cell, 5, 19)
    layer.weight_ih_l0.requires_grad_(False)
    x, hx = torch.randn(4, 3, 5), random_hx(layer, 3)
    with ordinary_path():
        expected = layer(x, hx)
    output, finals = repeated(layer, x, hx)
    leaves = [layer.weight_hh_l0, layer.bias_ih_l0, as_tuple(hx)[-1]]
    for a, b in zip((expected[0], *as_tuple(expected[1])), (output, *as_tuple(finals)), strict=True):
        grads = [torch.autograd.grad(each.sum(), leaves, allow_unused=True, retain_graph=True) for each in (a, b)]
        for one, other in zip(*grads, strict=True):
            assert torch.equal(one, other)
    repeated(layer, x, hx)[0].sum().backward()
    assert layer.weight_ih_l0.grad is None
    with torch.no_grad():
        layer.requires_grad_(False)
    x.requires_grad_()
    with ordinary_path():
        a = torch.autograd.grad(layer(x)[0].sum(), x)
    assert torch.equal(a[0], torch.autograd.grad(repeated(layer, x)[0].sum(), x)[0])


@cells
def test_second_derivatives_are_those_of_the_long_way(cell):
    _, layer = pair(cell, 5, 7, num_layers=2, batch_first=True, dtype=torch.float64)
    x = torch.randn(3, 4, 5, dtype=torch.float64, requires_grad=True)

    def penalty(output):
        (dx,) = torch.autograd.grad(output.sin().sum(), x, create_graph=True)
        return torch.autograd.grad(
            dx.square().sum(), [x, *layer.parameters()], allow_unused=True, materialize_grads=True
        )

    with ordinary_path():
        expected = penalty(layer(x)[0])
    for a, b in zip(expected, penalty(repeated(layer, x)[0]), strict=True):
        assert torch.equal(a, b)


def test_a_graph_is_used_once_unless_it_is_retained():
    layer, x = rnnfast.GRU(5, 7), torch.randn(2, 3, 5, requires_grad=True)
    loss = repeated(layer, x)[0].sum()
    first = torch.autograd.grad(loss, x, retain_graph=True)[0]
    assert torch.equal(first, torch.autograd.grad(loss, x)[0])
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        torch.autograd.grad(loss, x)


@pytest.mark.parametrize("change", ["weight", "state"])
def test_what_was_saved_may_not_be_changed(change):
    layer, x = rnnfast.LSTM(5, 7), torch.randn(2, 3, 5)
    hx = (torch.randn(1, 3, 7), torch.randn(1, 3, 7))
    output, _ = repeated(layer, x, hx)
    loss = output.sum()
    with torch.no_grad():
        {"weight": layer.weight_hh_l0, "state": hx[1]}[change].add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_anomaly_mode_names_the_call():
    layer, x = rnnfast.RNN(5, 7), torch.full((2, 3, 5), torch.nan)
    with torch.autograd.set_detect_anomaly(True):
        output = repeated(layer, x)[0]
        warned = pytest.warns(UserWarning, match="Error detected in FastLayerBackward")
        with warned, pytest.raises(RuntimeError, match="returned nan values"):
            output.sum().backward()


def test_other_layouts_of_what_was_saved_are_seen():
    layer, x = rnnfast.GRU(5, 7), torch.randn(4, 3, 5)
    with ordinary_path():
        expected = torch.autograd.grad(layer(x)[0].sum(), layer.weight_ih_l0)[0]
    output = repeated(layer, x)[0]
    for saved in output.grad_fn._raw_saved_tensors[:2]:
        saved.register_hooks(torch.clone, lambda tensor: tensor.mT.contiguous().mT)
    assert torch.equal(torch.autograd.grad(output.sum(), layer.weight_ih_l0)[0], expected)


def test_threads_are_those_of_the_backward_pass():
    layer, x = rnnfast.GRU(5, 7), torch.randn(4, 3, 5)
    with threads(1):
        output = repeated(layer, x)[0]
    with threads(2):
        output.sum().backward()
    (prepared,) = next(iter(fast_path.recorded.values())).layers
    ((backward_pass, _),) = prepared.backward_passes.values()
    assert (prepared.forward_pass.recipe.threads, backward_pass.recipe.threads) == (1, 2)


def test_checkpoints_save_the_same_tensors_each_time():
    layers = [rnnfast.LSTM(7, 7) for _ in range(2)]
    x = torch.randn(2, 3, 7, requires_grad=True)
    for _ in range(3):
        h = x
        for layer in layers:
            h = checkpoint(lambda h, layer=layer: layer(h)[0], h, use_reentrant=False)
            assert not is_fast(h)
        found = torch.autograd.grad(h.sum(), x)[0]
    expected = torch.autograd.grad(layers[1](layers[0](x)[0])[0].sum(), x)[0]
    assert torch.equal(found, expected)


def test_calls_that_something_watches_go_the_long_way():
    layer, x = rnnfast.LSTM(5, 7, 2), torch.randn(2, 3, 5)
    for _ in range(3):
        with torch.autograd.graph.saved_tensors_hooks(lambda tensor: tensor, lambda tensor: tensor):
            layer(x)
        with torch.autocast("cpu", torch.bfloat16):
            layer(x)
        with rnnfast.use_backend("reference"):
            layer(x)
        with torch.autograd.forward_ad.dual_level():
            layer(x)
        layer(x, lengths=torch.tensor([2, 1, 2]))
        torch.func.vmap(layer)(x[None])
        torch.func.grad(lambda x: layer(x)[0].sum())(x)
        layer.recompute = True
        layer(x)
        layer.recompute = False
        layer(x[:, 0])
    assert not fast_path.recorded


@cells
def test_third_derivatives_are_those_of_the_ordinary_path(cell):
    """The states of every step, and not the output alone, are then differentiated."""
    _, layer = pair(cell, 2, 7, dtype=torch.float64)
    start = torch.randn(4, 2, 2, dtype=torch.float64)

    def third():
        x = start.clone().requires_grad_()
        value = layer(x)[0].square().sum()
        for _ in range(2):
            value = torch.autograd.grad(value, x, create_graph=True)[0].square().sum()
        return torch.autograd.grad(value, x)[0]

    with ordinary_path():
        expected = third()
    torch.testing.assert_close(third(), expected, rtol=1e-12, atol=0)
