"""The Triton kernels without a GPU: their tests again, in processes of their own that interpret instead of compiling.

Triton reads TRITON_INTERPRET when it is imported, so this process cannot do both.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import INTERPRETED

FOLDER = Path(__file__).parent
LONG = "every_loop or sizes or dtypes"
HALVES = {"loops, sizes and dtypes": LONG, "layouts and the rest": f"not ({LONG})"}


@pytest.fixture(scope="module")
def interpreters():
    """Both halves, started together."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", FOLDER / "test_gpu_numerics.py", "-k"]
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    running = {
        half: subprocess.Popen(
            [*command, which], env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        for half, which in HALVES.items()
    }
    yield running
    for process in running.values():
        process.kill()


@pytest.mark.skipif(INTERPRETED or torch.cuda.is_available(), reason="test_gpu_numerics.py itself runs here")
@pytest.mark.timeout(900)
@pytest.mark.parametrize("half", HALVES)
def test_kernels_in_the_interpreter(half, interpreters):
    said = interpreters[half].communicate()[0]
    assert interpreters[half].returncode == 0, said
    assert " passed" in said, said
