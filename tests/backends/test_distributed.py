"""Two processes over gloo train as one: DistributedDataParallel and FSDP2, without a warning."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from closeness import assert_all_close
from distributed_worker import LAYERS, model_and_batches
from torch import nn
from torch_releases import needs

# On CPUs fully_shard of torch 2.6 asks for streams that have no events.
SHARDS = torch.__version__ >= "2.7"
ROOT = Path(__file__).parents[2]
TORCHRUN = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")


def launch(*command: str) -> str:
    """Run a command under torchrun with two processes; return what it printed."""
    paths = os.pathsep.join((str(ROOT), str(ROOT / "kernels"), str(ROOT / "tests")))
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": paths}
    done = subprocess.run((*TORCHRUN, *command), cwd=ROOT, env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    # FSDP2 remarks that the model's last linear layer returns a view, as every linear layer over [T, B, *] does.
    warned = [line for line in done.stderr.splitlines() if "Warning:" in line and "returned a view tensor" not in line]
    assert not warned
    return done.stdout


def alone(name: str) -> tuple[list[float], dict[str, torch.Tensor]]:
    """Train in this process on whole batches."""
    model, batches = model_and_batches(name)
    optimizer, losses = torch.optim.Adam(model.parameters(), 1e-3), []
    for given, wanted in batches:
        loss = nn.functional.cross_entropy(model(given)[0].flatten(0, 1), wanted.flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses, {name: p.detach() for name, p in model.named_parameters()}


@pytest.mark.skipif(not torch.distributed.is_available(), reason="this torch is built without torch.distributed")
@needs(SHARDS, "shards on GPUs alone")
def test_two_processes_train_as_one(tmp_path):
    launch("tests/distributed_worker.py", str(tmp_path / "results"))
    results = torch.load(tmp_path / "results")
    for name in LAYERS:
        losses, parameters = alone(name)
        for shard in (False, True):
            got_losses, got = results[name, shard]
            assert got_losses == pytest.approx(losses, rel=1e-5)
            # Adam divides by a gradient's size: its first steps turn rounding of small gradients into more.
            assert_all_close(parameters, got, 1e-4)


@pytest.mark.skipif(not torch.distributed.is_available(), reason="this torch is built without torch.distributed")
@pytest.mark.parametrize("words", [(), ("--shard",)][: 1 + SHARDS], ids=["replicated", "sharded"][: 1 + SHARDS])
def test_the_example_runs_under_torchrun(words):
    assert "2 processes, loss" in launch("-m", "examples.distributed", "--batches", "2", *words)
