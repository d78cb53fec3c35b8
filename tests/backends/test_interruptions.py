"""Exceptions from signal handlers, as Ctrl-C raises them, while threads work on a call."""

import signal
import subprocess
import sys
import textwrap

import pytest

# Python threads share every phase; each handler raises, wherever the main thread is.
RAIN = """
    import signal, sys, torch, rnnfast
    from rnnfast_kernels.cpu.runtime import pool

    torch.set_num_threads(2)
    if sys.argv[1] == "call":
        pool.team = lambda: pool.NO_TEAM
        pool.cores = lambda: 8
        layer, x = rnnfast.LSTM(64, 65), torch.randn(40, 32, 64)
        work = lambda: layer(x)
        expected = layer(x)[0].detach().clone()
    else:
        import ctypes, time
        running, phase = set(), (ctypes.c_int64 * 16)()

        def kernel(address):
            call = object()
            running.add(call)
            time.sleep(0.002)
            running.discard(call)

        main = __import__("threading").current_thread()

        def slow(address):
            if __import__("threading").current_thread() is not main:
                kernel(address)

        work = lambda: pool.share(slow, ctypes.addressof(phase), 4)
        work()

    class Interrupted(Exception):
        pass

    def interrupt(*_):
        raise Interrupted

    interrupted = 0
    signal.signal(signal.SIGALRM, interrupt)
    for n in range(300):
        try:
            signal.setitimer(signal.ITIMER_REAL, 0.00002 + 0.00001 * (n % 150))
            work()
            signal.setitimer(signal.ITIMER_REAL, 0)
        except Interrupted:
            interrupted += 1
        if sys.argv[1] == "share":
            assert not running and pool.tasks.empty(), n
    signal.setitimer(signal.ITIMER_REAL, 0)
    if sys.argv[1] == "call":
        assert not pool.reserved
        assert torch.equal(layer(x)[0], expected)
    print(interrupted)
"""


@pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="no timers that send signals on this platform")
@pytest.mark.parametrize("what", ["share", "call"])
def test_no_thread_works_on_a_call_that_a_signal_ended(what):
    code = [sys.executable, "-c", textwrap.dedent(RAIN), what]
    run = subprocess.run(code, capture_output=True, text=True, check=False, timeout=200)
    assert run.returncode == 0, run.stderr[-2000:]
    assert int(run.stdout) > 20
