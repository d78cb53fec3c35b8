"""Choosing a backend: by name, by environment, by thread; what cannot run says so; explain and warmup."""

import asyncio
import os
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from rnnfast_kernels.cpu.target import has_bfloat16_products

import rnnfast
from rnnfast.backends.dispatch import choose, setting

CPU, F32 = torch.device("cpu"), torch.float32


def test_use_backend_nests_and_ends():
    with rnnfast.use_backend("reference"):
        assert setting() == "reference"
        with rnnfast.use_backend("torch"):
            assert setting() == "torch"
        assert setting() == "reference"
    with pytest.raises(RuntimeError, match="inside"), rnnfast.use_backend("torch"):
        raise RuntimeError("inside")
    assert setting() == os.environ.get("RNNFAST_BACKEND", "auto")


def test_the_setting_belongs_to_its_thread_and_task():
    seen = {}

    def look():
        seen["thread"] = setting()

    async def task(name, other):
        with rnnfast.use_backend(name):
            await other
            return setting()

    async def tasks():
        event = asyncio.Event()
        waiting = asyncio.create_task(task("torch", event.wait()))
        await asyncio.sleep(0)
        assert setting() == "reference"
        event.set()
        return await waiting

    with rnnfast.use_backend("reference"):
        thread = threading.Thread(target=look)
        thread.start()
        thread.join()
        assert asyncio.run(tasks()) == "torch"
    assert seen["thread"] != "reference"


@pytest.mark.parametrize("name", ["cudnn", "", None, 3])
def test_unknown_names_are_refused(name):
    with pytest.raises(ValueError, match=r"expected one of 'auto', 'triton'.*got"), rnnfast.use_backend(name):
        pass


def python(code: str, **environment: str) -> subprocess.CompletedProcess:
    """Run code in a fresh interpreter."""
    given = {**os.environ, **environment}
    return subprocess.run([sys.executable, "-c", code], env=given, capture_output=True, text=True, check=False)


def test_the_environment_sets_the_default():
    code = "import torch, rnnfast; print(rnnfast.explain(rnnfast.GRU(2, 3), torch.zeros(1, 1, 2)))"
    assert python(code, RNNFAST_BACKEND="reference").stdout.startswith("reference: plain loop over gru")
    wrong = python(code, RNNFAST_BACKEND="cudnn")
    assert wrong.returncode != 0
    assert "RNNFAST_BACKEND: expected one of 'auto'" in wrong.stderr


def test_use_backend_is_a_statement_and_a_decorator_too():
    def in_a_thread() -> list[str]:
        found = [setting()]
        rnnfast.use_backend("reference")

        @rnnfast.use_backend("torch")
        def decorated(word: str) -> str:
            return setting() + word

        found.append(setting())
        found.append(decorated("!"))
        with rnnfast.use_backend("numba"):
            found.append(setting())
        return [*found, setting()]

    with ThreadPoolExecutor() as threads:
        found = threads.submit(in_a_thread).result()
    assert found == ["auto", "reference", "torch!", "numba", "reference"]
    assert setting() == "auto"
    with pytest.raises(ValueError, match="got 'numbaa'"):
        rnnfast.use_backend("numbaa")


def test_a_named_backend_that_cannot_run_raises():
    layer, x = rnnfast.LSTM(3, 5), torch.zeros(2, 2, 3)
    with rnnfast.use_backend("torch"), pytest.raises(RuntimeError, match="'torch' backend cannot run this"):
        layer(x, resets=torch.zeros(2, 2, dtype=torch.bool))
    with rnnfast.use_backend("numba"), pytest.raises(RuntimeError, match=r"'numba' backend cannot run this.*meta"):
        layer.to("meta")(x.to("meta"))


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="the interpreter takes CPU tensors")
def test_triton_refuses_cpu_tensors():
    with rnnfast.use_backend("triton"), pytest.raises(RuntimeError, match="'triton' backend cannot run this"):
        rnnfast.LSTM(3, 5)(torch.zeros(2, 2, 3))


def test_auto_takes_numba_on_the_cpu_and_torch_elsewhere():
    with rnnfast.use_backend("auto"):
        assert choose("lstm", CPU, F32, False).backend == "numba"
        meta = choose("lstm", torch.device("meta"), F32, False)
        assert meta.backend == "torch"
        assert "meta" in meta.reason
        assert choose("lstm", torch.device("meta"), F32, True).backend == "reference"


def test_meta_tensors_run_on_torch():
    output, _ = rnnfast.GRU(3, 5, device="meta")(torch.zeros(2, 4, 3, device="meta"))
    assert output.shape == (2, 4, 5)


def test_explain_says_how_half_precision_is_computed():
    layer, x = rnnfast.LSTM(3, 5, dtype=torch.bfloat16), torch.zeros(2, 2, 3, dtype=torch.bfloat16)
    assert "in float32" in rnnfast.explain(layer, x).kernel
    assert ("products of bfloat16" in rnnfast.explain(layer, x).kernel) == has_bfloat16_products()
    assert "bfloat16" not in rnnfast.explain(layer.half(), x.half()).kernel


def test_explain_names_backend_kernel_and_reason():
    layer, x = rnnfast.LSTM(3, 5), torch.zeros(2, 2, 3)
    with rnnfast.use_backend("torch"):
        assert str(rnnfast.explain(layer, x)) == "torch: torch.lstm (asked for by name)"
    with rnnfast.use_backend("auto"):
        explanation = rnnfast.explain(layer, x)
    assert explanation.backend == "numba"
    assert "lstm" in explanation.kernel
    with pytest.raises(TypeError, match="expected an rnnfast RNN, LSTM, GRU or a cell of them, got Linear"):
        rnnfast.explain(torch.nn.Linear(3, 5), x)


def test_warmup_leaves_no_trace(backend):
    layer = rnnfast.LSTM(3, 5, 2, dropout=0.5)
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    rnnfast.warmup(torch.nn.Sequential(layer))
    assert torch.equal(torch.rand(3), expected)
    assert layer.training
    assert all(p.grad is None for p in layer.parameters())


def test_python_m_rnnfast_tells_the_installation():
    run = subprocess.run([sys.executable, "-m", "rnnfast"], capture_output=True, text=True, check=True)
    for word in ("torch", "numba", "triton", "backend numba", "cache of numba", "threads"):
        assert word in run.stdout
