"""Python threads that share a layer where none can be started, and at the end of the interpreter."""

import subprocess
import sys
import textwrap
import threading

from cpu_layers import Case, same, threads
from rnnfast_kernels.cpu.runtime import pool


def test_a_limit_on_threads(monkeypatch):
    case = Case("lstm", 40, 33, 64, 130)
    layer = case.layer()
    with threads(1):
        serial = case.run(layer)

    def refuse(thread):
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(pool, "team", lambda: pool.NO_TEAM)
    monkeypatch.setattr(pool, "workers", [])
    monkeypatch.setattr(threading.Thread, "start", refuse)
    with threads(3):
        assert not same(serial, case.run(layer))


LAST = """
    import builtins, sys, torch, rnnfast
    from rnnfast_kernels.cpu.runtime import pool

    pool.team, pool.cores = lambda: pool.NO_TEAM, lambda: 8
    torch.set_num_threads(2)
    torch.set_grad_enabled(False)

    class Last:
        def __init__(self, layer, x):
            self.layer, self.x, self.print, self.sys = layer, x, print, sys
            layer(x)

        def __del__(self):
            self.print(self.sys.is_finalizing(), len(self.layer(self.x)[0]), flush=True)

    builtins.last = Last(rnnfast.LSTM(64, 65), torch.randn(60, 32, 64))
"""


def test_a_call_at_the_end_of_the_interpreter_waits_for_nobody():
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(LAST)], capture_output=True, text=True, timeout=100)
    assert (done.returncode, done.stdout) == (0, "True 60\n"), done.stderr
