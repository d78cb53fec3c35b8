"""Layers in other processes, the folder that processes share, and memory over many calls."""

import multiprocessing
import os
import subprocess
import sys
import textwrap

import pytest
import torch
from rnnfast_kernels.cpu.runtime import compiled
from torch.utils.data import DataLoader, Dataset

import rnnfast


def trained_bytes() -> list[bytes]:
    """Run a layer forward and backward; return its results and gradients bit by bit."""
    generator = torch.Generator().manual_seed(0)
    layer = rnnfast.LSTM(64, 65)
    with torch.no_grad():
        for weight in layer.parameters():
            weight.copy_(torch.randn(weight.shape, generator=generator) / 8)
    x = torch.randn(60, 32, 64, generator=generator).requires_grad_()
    output, finals = layer(x)
    gradients = torch.autograd.grad(output, [x, *layer.parameters()], torch.ones_like(output))
    return [t.detach().numpy().tobytes() for t in (output, *finals, *gradients)]


def answer(queue) -> None:
    """Be a child process."""
    queue.put(trained_bytes())


class Trained(Dataset):
    """Examples that a layer makes, forward and backward, in the process that loads them."""

    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int) -> list[bytes]:
        return trained_bytes()


@pytest.fixture
def two_threads():
    """Have torch use two threads for the length of the test."""
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(threads)


METHODS = multiprocessing.get_all_start_methods()
LONG = (pytest.mark.long,)


@pytest.mark.parametrize(
    "method", [pytest.param(m, marks=LONG * (m != "spawn")) for m in ("spawn", "forkserver") if m in METHODS]
)
def test_a_started_process_trains_as_this_one(method):
    context = multiprocessing.get_context(method)
    queue = context.Queue()
    child = context.Process(target=answer, args=(queue,))
    child.start()
    assert queue.get(timeout=200) == trained_bytes()
    child.join()
    assert child.exitcode == 0


# After this process has used its threads, which a forked worker does not have.
@pytest.mark.parametrize(
    "method", [pytest.param(m, marks=LONG * (m != "fork")) for m in ("fork", "spawn") if m in METHODS]
)
@pytest.mark.filterwarnings(
    "ignore:This process.*multi-threaded:DeprecationWarning", "ignore:This DataLoader will create 2 worker:UserWarning"
)
def test_workers_of_a_data_loader_train_as_this_process(method, two_threads):
    expected = trained_bytes()
    loader = DataLoader(Trained(), batch_size=None, num_workers=2, multiprocessing_context=method, timeout=200)
    assert [each == expected for each in loader] == [True] * 4


def test_a_full_disk_costs_a_warning_and_leaves_no_part_of_a_file(tmp_path, monkeypatch):
    resource = pytest.importorskip("resource", reason="no limits of file sizes on this platform")
    monkeypatch.setenv("NUMBA_CACHE_DIR", str(tmp_path))
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    try:
        with pytest.warns(RuntimeWarning, match="cannot keep compiled kernels on disk"):
            compiled.write("kernel.bin", bytes(100_000))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert list((tmp_path / "rnnfast").iterdir()) == []
    compiled.write("kernel.bin", bytes(100_000))
    assert compiled.read("kernel.bin") == bytes(100_000)


def start(code: str, **environment: str) -> subprocess.Popen:
    """Start a Python process that finds what this one finds."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))} | environment
    return subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(code)], env=environment, stderr=subprocess.PIPE, text=True
    )


def succeed(*processes: subprocess.Popen) -> None:
    """Wait for processes to end well."""
    for process in processes:
        _, errors = process.communicate(timeout=200)
        assert process.returncode == 0, errors


def test_processes_that_keep_the_same_kernel_at_once_read_it_whole(tmp_path):
    code = """
        from rnnfast_kernels.cpu.runtime import compiled
        for turn in range(100):
            compiled.write("kernel.bin", bytes(range(256)) * 4000)
            assert compiled.read("kernel.bin") == bytes(range(256)) * 4000
    """
    succeed(*(start(code, NUMBA_CACHE_DIR=str(tmp_path)) for _ in range(4)))
    assert [path.name for path in (tmp_path / "rnnfast").iterdir()] == ["kernel.bin"]


@pytest.mark.skipif(not os.path.exists("/proc/self/statm"), reason="no /proc on this platform")
def test_new_lengths_and_batch_sizes_keep_memory():
    code = """
        import random, resource, torch, rnnfast

        def resident():
            with open("/proc/self/statm") as file:
                return int(file.read().split()[1]) * resource.getpagesize() / 2**20

        def train(times):
            for _ in range(times):
                x = torch.randn(random.randint(1, 60), random.randint(1, 16), 8)
                layer(x)[0].sum().backward()
                with torch.no_grad():
                    layer(x)

        random.seed(0)
        layer = rnnfast.LSTM(8, 32, 2, bidirectional=True)
        train(50)
        before = resident()
        train(500)
        grown = resident() - before
        assert grown < 50, f"{grown:.0f} MB more after 500 calls"
    """
    succeed(start(code))
