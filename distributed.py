"""Many processes, as `torchrun` starts them: each has a copy of the network and a part of a batch.

Every process makes the same batches and takes its own part of each. `DistributedDataParallel`
averages the gradients. So the weights stay the same in all, and the first process (rank 0) alone
writes and prints. Without torchrun there is one process, and these functions change nothing.
"""

import datetime
import os
import warnings

import torch
import torch.distributed as dist
from torch import nn

from stopping import UserError


def run_id() -> str | None:
    """What the processes of one torchrun command share, also restarted ones; None without it."""
    name = os.environ.get("TORCHELASTIC_RUN_ID")
    return f"none-{os.getppid()}" if name == "none" else name  # "none" is torchrun's default


def rank() -> int:
    """The number of this process: 0, 1, ..."""
    return int(os.environ["RANK"]) if run_id() else 0


def local_rank() -> int:
    """The number of this process among those of its machine."""
    return int(os.environ["LOCAL_RANK"]) if run_id() else 0


def world_size() -> int:
    """The number of processes, on all machines together."""
    return int(os.environ["WORLD_SIZE"]) if run_id() else 1


def restarts() -> int:
    """How often torchrun has started all processes again, because one had failed."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0))


def start(device: torch.device) -> torch.device:
    """Join the other processes; return the device of this one. UserError: they do not come."""
    if world_size() == 1 or dist.is_initialized():
        return device
    here = int(os.environ.get("LOCAL_WORLD_SIZE", 1))  # so all of a machine are refused
    if device.type == "mps" or (device.type == "cuda" and here > torch.cuda.device_count()):
        raise UserError("torchrun: each process needs a GPU of its own; use fewer, or --device cpu")
    if device.type == "cuda":
        device = torch.device("cuda", local_rank())
        torch.cuda.set_device(device)
    from torch.distributed.rendezvous import rendezvous  # not in every build of PyTorch

    limit = datetime.timedelta(minutes=30)  # another machine may be downloading
    try:
        store, own, number = next(rendezvous("env://", timeout=limit))
        # The store still has the addresses from before a restart: they must not be used.
        store = dist.PrefixStore(f"attempt {restarts()}", store)
        backend = "nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, store=store, rank=own, world_size=number, timeout=limit)
    except (RuntimeError, ValueError) as error:
        line = " ".join(str(error).split())[:200]
        raise UserError(f"torchrun: the processes cannot connect to each other ({line})") from None
    return device


def check_same(number: int) -> None:
    """Raise UserError if the processes have different numbers of steps behind them."""
    numbers = [None] * world_size()
    if world_size() > 1:
        dist.all_gather_object(numbers, number)
    if len(set(numbers)) > 1:
        raise UserError(
            "torchrun: the processes start at different steps: --out-dir must be on a disk that "
            "all machines share, and --rdzv-id must be given"
        )


def wrap(model: nn.Module) -> nn.Module:
    """The model, with gradients that are averaged over the processes."""
    if world_size() == 1 or isinstance(model, nn.parallel.DistributedDataParallel):
        return model
    with warnings.catch_warnings(action="ignore"):  # PyTorch 2.14 has another name for it
        # Buffers are averaged once an epoch: see `average_statistics`.
        return nn.parallel.DistributedDataParallel(model, broadcast_buffers=False)


def check_divides(batch_size: int) -> None:
    """Raise UserError if a batch cannot be divided evenly among the processes."""
    if batch_size % world_size():
        size = f"a batch of {batch_size} images is not divisible by {world_size()} processes"
        advice = "choose another --batch-size (in a DataLoader of your own also drop_last=True)"
        raise UserError(f"torchrun: {size}: {advice}")


def own_part(*tensors: torch.Tensor) -> list[torch.Tensor]:
    """This process's part of each tensor of a batch. UserError: it does not divide."""
    check_divides(len(tensors[0]))
    return [tensor.chunk(world_size())[rank()] for tensor in tensors]


def summed(*tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Each tensor, changed in place to the sum over the processes."""
    for tensor in tensors if world_size() > 1 else ():
        dist.all_reduce(tensor)
    return tensors


def average_statistics(*networks: nn.Module | None) -> None:
    """Make the buffers (statistics of batch norm) the mean over the processes."""
    for buffer in (b for network in networks if network is not None for b in network.buffers()):
        if world_size() > 1 and buffer.is_floating_point():
            dist.all_reduce(buffer)
            buffer /= world_size()


def is_lost(error: RuntimeError) -> bool:
    """Whether an error says that another process has gone."""
    return isinstance(error, dist.DistError) or (world_size() > 1 and "gloo" in str(error))
