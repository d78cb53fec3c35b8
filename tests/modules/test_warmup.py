"""`warmup` prepares the same kernels whatever setting it is called under, and the report reads any cache folder."""

import os
import subprocess
import sys

import pytest
import torch

import rnnfast
from rnnfast.explain import sizes_in
from rnnfast.warmup import standard_layers


def test_the_layers_that_are_prepared_do_not_depend_on_defaults():
    torch.set_default_dtype(torch.float64)
    try:
        with torch.device("meta"):
            made = standard_layers()
    finally:
        torch.set_default_dtype(torch.float32)
    weights = [weight for layer in made for weight in layer.parameters()]
    assert {(weight.device.type, weight.dtype) for weight in weights} == {("cpu", torch.float32)}


@pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad])
def test_backward_is_prepared_where_there_are_no_gradients(mode, monkeypatch):
    layer, seen = rnnfast.GRU(3, 4), []
    grad = torch.autograd.grad
    monkeypatch.setattr(torch.autograd, "grad", lambda *args, **options: seen.append(grad(*args, **options)))
    with mode():
        rnnfast.warmup(layer)
    assert len(seen[0]) == 5


def test_weights_that_are_computed_and_weights_without_gradients_are_prepared():
    rnnfast.warmup(torch.nn.utils.parametrizations.weight_norm(rnnfast.LSTM(3, 4), "weight_hh_l0"))
    with torch.inference_mode():
        layer = rnnfast.LSTM(3, 4)
        rnnfast.warmup(layer)
    rnnfast.warmup(layer)


def test_a_class_with_a_call_of_its_own_is_prepared():
    class FromBatch(torch.nn.GRU):
        def forward(self, batch):
            return super().forward(batch["x"])

    called = []
    layer = rnnfast.accelerate(FromBatch(3, 4))
    layer.register_forward_hook(lambda *args: called.append(0))
    rnnfast.warmup(layer)
    assert not called


def test_kernels_that_vanish_and_folders_that_cannot_be_read(tmp_path, monkeypatch):
    (tmp_path / "kept.bin").write_bytes(bytes(10))
    (tmp_path / "gone.bin").symlink_to(tmp_path / "nowhere")
    assert sizes_in(tmp_path) == [10]
    assert sizes_in(tmp_path / "none") == []
    monkeypatch.setattr(os, "scandir", lambda path: (_ for _ in ()).throw(PermissionError(path)))
    assert sizes_in(tmp_path) == []


def test_the_command_refuses_what_it_does_not_know():
    found = subprocess.run([sys.executable, "-m", "rnnfast", "--hlep"], capture_output=True, text=True, timeout=100)
    assert found.returncode == 2
    assert "--hlep" in found.stderr
