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

pytest.importorskip("triton", minversion="3.5")

TESTS = Path(__file__).parents[1]
KERNELS = ("gpu_numerics",)
LONG = "every_loop or sizes or dtypes"
# What a layer does with sequences, by the same tests as on the CPU: the smallest ones, of every cell where it matters.
LAYERS = (
    "lengths_equal_single and both_ways",
    "have_the_gradients and (lstm] or gru)",
    "resets_equal_pieces",
    "test_all_states and lengths",
    "states_of_a_packed_sequence",
    "recomputing_gives and (lstm or gru)",
    "second_derivatives_equal_the_plain_loops and (lstm or gru)",
    "chunks_equal_one_call and not any and (lstm] or gru)",
    "steps_equal_one_call and f32 and (lstm] or gru)",
)
# Takes two minutes.
LONG_LAYERS = ("first_and_second and gru and lengths and resets",)


def any_of(names):
    return " or ".join(f"({name})" for name in names)


SEQUENCES = ("sequences", "autograd", "transforms", "numerics", "stream")
PARTS = {
    "loops, sizes and dtypes": (KERNELS, LONG),
    "layouts and the rest": ((*KERNELS, "gpu_tanh"), f"not ({LONG})"),
    "programs that wait for each other": (("gpu_cooperative", "race_detector"), ""),
    "declared cells": (("declared_backends", "cells_of_any_form"), ""),
    "sequences": (SEQUENCES, any_of(LAYERS)),
    "derivatives": (SEQUENCES, any_of(LONG_LAYERS)),
}


@pytest.mark.skipif(INTERPRETED or torch.cuda.is_available(), reason="test_gpu_numerics.py itself runs here")
@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    "part", [pytest.param(part, marks=pytest.mark.long) if part == "derivatives" else part for part in PARTS]
)
def test_kernels_in_the_interpreter(part, pytestconfig):
    files, which = PARTS[part]
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", which]
    command += ["--all"] * pytestconfig.getoption("--all")
    done = subprocess.run(
        [*command, *(path for name in files for path in TESTS.glob(f"*/test_{name}.py"))],
        env={**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1", "PYTEST_ADDOPTS": ""},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout
    assert " passed" in done.stdout, done.stdout
