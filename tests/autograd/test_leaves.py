"""torch.fx and torch.jit.script meet layers of declared cells, and frozen layers."""

import pytest
import torch
from conftest import backends_under_test
from torch import nn

import rnnfast

LAYERS = {
    "declared": lambda: rnnfast.Recurrent(rnnfast.cells.augru, 3, 4),
    "frozen": lambda: rnnfast.freeze(rnnfast.GRU(3, 4)),
    "frozen, declared": lambda: rnnfast.freeze(rnnfast.Recurrent(rnnfast.cells.augru, 3, 4)),
}


class Model(nn.Module):
    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x, h, a, lengths):
        options = {"signals": {"attention": a}} if isinstance(self.layer, rnnfast.Recurrent) else {}
        return self.layer(x, h, lengths=lengths, **options)[0]


@pytest.mark.skipif(backends_under_test() != ["numba"], reason="frozen layers run on the CPU")
@pytest.mark.parametrize("name", LAYERS)
def test_fx_takes_a_layer_for_a_leaf(name):
    model = Model(LAYERS[name]())
    args = torch.randn(5, 2, 3), torch.randn(1, 2, 4), torch.rand(5, 2, 1), torch.tensor([3, 5])
    graph = torch.fx.symbolic_trace(model)
    assert [node.target for node in graph.graph.nodes if node.op == "call_module"] == ["layer"]
    torch.testing.assert_close(graph(*args), model(*args), rtol=0, atol=0)


@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated:DeprecationWarning")
@pytest.mark.parametrize("name", LAYERS)
def test_script_says_what_to_do(name):
    with pytest.raises(TypeError, match=r"torch\.jit\.script cannot compile .*: use torch\..*export"):
        torch.jit.script(LAYERS[name]())
