"""The character language model on several processes, by `torch.distributed`; the recurrent layers need nothing special.

    torchrun --nproc-per-node 2 -m examples.distributed
    torchrun --nproc-per-node 2 -m examples.distributed --shard

Each process takes its share of every batch. Plainly, each holds the whole model (DistributedDataParallel); with
`--shard` each holds a part of every weight (FSDP2). On two machines of eight GPUs, the launch line on both is

    torchrun --nnodes 2 --nproc-per-node 8 --rdzv-backend c10d --rdzv-endpoint HOST:29500 -m examples.distributed
"""

import argparse

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import rnnfast
from examples.language_model import Corpus, LanguageModel


def spread(model: nn.Module, device: torch.device, shard: bool) -> nn.Module:
    """Let the processes train one model together: a copy in each, or a part of every weight in each."""
    model = model.to(device)
    if shard:
        return fully_shard(model, mesh=init_device_mesh(device.type, (dist.get_world_size(),)))
    return DistributedDataParallel(model)


def share(tensor: torch.Tensor, dim: int) -> torch.Tensor:
    """Return this process's part of a batch."""
    return tensor.chunk(dist.get_world_size(), dim)[dist.get_rank()]


def train(model: nn.Module, batches, device: torch.device, rate: float = 1e-3) -> list[float]:
    """Train on this process's part of each batch; return the losses, averaged over the processes."""
    optimizer = torch.optim.Adam(model.parameters(), rate)
    losses = []
    for given, wanted in batches:
        logits, _ = model(share(given, 1).to(device))
        loss = nn.functional.cross_entropy(logits.flatten(0, 1), share(wanted, 1).to(device).flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        total = loss.detach().clone()
        dist.all_reduce(total)
        losses.append(total.item() / dist.get_world_size())
    return losses


def leave() -> None:
    """End this process's part in the group, once nothing of DistributedDataParallel is left that holds it.

    gloo's thread may still be letting go of the last gradients. It needs Python's lock for that, and the process would
    hang or abort where the group is torn down with the lock held, or after Python's end. Hence the barrier, too.
    """
    dist.barrier()
    dist.destroy_process_group()


def main() -> None:
    """Train for some batches and print the loss."""
    parser = argparse.ArgumentParser(description="Train the language model on several processes.")
    parser.add_argument("--shard", action="store_true", help="FSDP2 rather than DistributedDataParallel")
    parser.add_argument("--batches", type=int, default=20, help="how many batches to train (default 20)")
    options = parser.parse_args()
    on_gpu = torch.cuda.is_available()
    dist.init_process_group("nccl" if on_gpu else "gloo")
    device = torch.device("cuda", dist.get_rank() % torch.cuda.device_count()) if on_gpu else torch.device("cpu")
    if on_gpu:
        torch.cuda.set_device(device)
    torch.manual_seed(0)
    corpus = Corpus()
    model = LanguageModel(rnnfast.LSTM, len(corpus.characters))
    losses = train(spread(model, device, options.shard), corpus.batches(options.batches), device)
    if dist.get_rank() == 0:
        print(f"{dist.get_world_size()} processes, loss {losses[0]:.3f} -> {losses[-1]:.3f}")
    leave()


if __name__ == "__main__":
    main()
