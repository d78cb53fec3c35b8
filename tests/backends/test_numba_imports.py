"""The import of Numba in bad circumstances."""

import os
import sys
import types

import pytest
import torch
from cpu_layers import run_python
from rnnfast_kernels.cpu.runtime import compiled

from rnnfast.backends.cpu import available


def test_a_module_that_stands_for_numba_is_a_reason(monkeypatch, tmp_path):
    """A stub, as documentation builders put it in place of a package, has no spec to be found by."""
    monkeypatch.setenv("NUMBA_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(compiled, "kernels", {})
    monkeypatch.setitem(sys.modules, "numba", types.ModuleType("numba"))
    assert "numba cannot be imported" in available.obstacle.__wrapped__("gru", torch.float32)


SLOW = """
import builtins, time, types
builtins.begun.set()
time.sleep(0.5)
config = types.SimpleNamespace(DISABLE_JIT=True)
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this platform")
def test_a_child_forked_while_another_thread_imports_numba_does_not_wait_for_it(tmp_path):
    (tmp_path / "numba").mkdir()
    (tmp_path / "numba" / "__init__.py").write_text(SLOW)
    code = f"""
        import builtins, os, sys, threading, time
        import torch
        from rnnfast.backends.cpu import available

        builtins.begun = threading.Event()
        sys.path.insert(0, {str(tmp_path)!r})
        other = threading.Thread(target=lambda: available.obstacle("gru", torch.float32))
        other.start()
        builtins.begun.wait()
        child = os.fork()
        if child == 0:
            os._exit("NUMBA_DISABLE_JIT" not in available.obstacle("lstm", torch.float32))
        for _ in range(100):
            ended, status = os.waitpid(child, os.WNOHANG)
            if ended:
                sys.exit(status != 0)
            time.sleep(0.1)
        os.kill(child, 9)
        sys.exit("the child waits")
    """
    done = run_python(code, NUMBA_CACHE_DIR=str(tmp_path))
    assert done.returncode == 0, done.stderr
