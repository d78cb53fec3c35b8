"""One of the processes of `test_distributed`: trains a model replicated, then sharded, and saves what came of it."""

import os
import sys

import torch
import torch.distributed as dist

import rnnfast
from examples.distributed import leave, spread, train
from examples.language_model import LanguageModel

LAYERS = {"LSTM": rnnfast.LSTM, "GRU": rnnfast.GRU}


def model_and_batches(name: str):
    """Return a small model and its batches, the same in every process."""
    torch.manual_seed(0)
    model = LanguageModel(LAYERS[name], 20)
    return model, list(torch.randint(20, (3, 2, 8, 4)).unbind())


def whole(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Return all parameters in full, without DistributedDataParallel's prefix."""
    full = {name: p.full_tensor() if hasattr(p, "full_tensor") else p for name, p in model.named_parameters()}
    return {name.removeprefix("module."): p.detach().cpu() for name, p in full.items()}


def trained(name: str, shard: bool) -> tuple[list[float], dict[str, torch.Tensor]]:
    """Return the losses and the parameters after them; nothing stays that holds the group."""
    model, batches = model_and_batches(name)
    model = spread(model, torch.device("cpu"), shard)
    return train(model, batches, torch.device("cpu")), whole(model)


def main(path: str) -> None:
    dist.init_process_group("gloo")
    results = {(name, shard): trained(name, shard) for name in LAYERS for shard in (False, True)}
    if dist.get_rank() == 0:
        torch.save(results, path)
    leave()
    # Python's own end is not under test: a thread of gloo that outlives the group may abort it.
    os._exit(0)


if __name__ == "__main__":
    main(sys.argv[1])
