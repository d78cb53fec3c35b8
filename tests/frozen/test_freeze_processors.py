"""A frozen layer on processors that can do less: whole layers, and a state_dict that moves from one to another."""

import os
import subprocess
import sys

import pytest
import torch
from torch import nn

import rnnfast

PROBE = """
import sys, torch, rnnfast
state, path, weights = torch.load(sys.argv[1]), sys.argv[2], sys.argv[3]
layer = rnnfast.freeze(torch.nn.GRU(70, 90), weights)
layer.load_state_dict(state["layer"])
torch.save(layer(state["x"])[0], path)
"""


@pytest.mark.long
@pytest.mark.timeout(600)
@pytest.mark.parametrize("weights", ["bfloat16", "int8"])
@pytest.mark.parametrize("processor", ["avx2", "sse"])
def test_a_layer_of_another_processor(processor, weights, tmp_path):
    torch.manual_seed(1)
    layer, x = rnnfast.freeze(nn.GRU(70, 90), weights), torch.randn(20, 9, 70)
    torch.save({"layer": layer.state_dict(), "x": x}, tmp_path / "state.pt")
    words = [sys.executable, "-c", PROBE, tmp_path / "state.pt", tmp_path / "result.pt", weights]
    subprocess.run(words, check=True, env={**os.environ, "RNNFAST_CPU": processor})
    # Without fused multiply-adds, activation functions round otherwise.
    torch.testing.assert_close(torch.load(tmp_path / "result.pt"), layer(x)[0], rtol=0, atol=1e-6)
