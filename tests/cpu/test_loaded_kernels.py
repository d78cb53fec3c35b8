"""Machine code from disk, in a process that has not imported Numba."""

import logging

from cpu_layers import run_python
from rnnfast_kernels.cpu.runtime import compiled

import rnnfast


def test_second_derivatives_from_disk():
    """Once compiled, they need LLVM alone."""
    for derivatives in (1, 2):
        compiled.kernel("lstm", "float64", derivatives)
    code = """
        import sys, torch, rnnfast

        layer = rnnfast.LSTM(2, 2).double()
        x = torch.randn(3, 1, 2, dtype=torch.float64, requires_grad=True)
        (dx,) = torch.autograd.grad(layer(x)[0].sin().sum(), x, create_graph=True)
        torch.autograd.grad(dx.square().sum(), x)
        from rnnfast_kernels.cpu.runtime import compiled
        assert ("lstm", "float64", 2, "") in compiled.kernels
        assert "numba" not in sys.modules
    """
    found = run_python(code)
    assert found.returncode == 0, found.stderr


def test_warmup_tells_what_it_compiles(monkeypatch, capsys, caplog):
    rnnfast.warmup()
    code = compiled.read(compiled.file_name("gru", "float32", 1))
    monkeypatch.setattr(compiled, "kernels", {})
    monkeypatch.setattr(compiled, "read", lambda name: None)
    monkeypatch.setattr(compiled, "write", lambda name, code: None)
    monkeypatch.setattr(compiled, "compile_code", lambda *args: code)
    layer = rnnfast.GRU(2, 3)
    rnnfast.warmup(layer, verbose=True)
    said = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in said] == ["compiling", "compiled"], said
    assert all("gru-float32" in line for line in said)
    compiled.kernels.clear()
    rnnfast.warmup(layer)
    assert not capsys.readouterr().out
    with caplog.at_level(logging.INFO, "rnnfast"):
        compiled.kernels.clear()
        rnnfast.warmup(layer)
    assert caplog.records[0].getMessage().startswith("compiling gru-float32")
