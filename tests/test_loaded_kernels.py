"""Machine code from disk, in a process that has not imported Numba."""

from cpu_layers import run_python


def test_second_derivatives_from_disk(tmp_path):
    """The second process loads what the first one compiled."""
    code = """
        import sys, torch, rnnfast

        layer = rnnfast.LSTM(2, 2).double()
        x = torch.randn(3, 1, 2, dtype=torch.float64, requires_grad=True)
        (dx,) = torch.autograd.grad(layer(x)[0].sin().sum(), x, create_graph=True)
        torch.autograd.grad(dx.square().sum(), x)
        print("numba" in sys.modules)
    """
    for compiles in ("True", "False"):
        found = run_python(code, NUMBA_CACHE_DIR=str(tmp_path))
        assert (found.returncode, found.stdout.strip()) == (0, compiles), found.stderr
