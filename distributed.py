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
from torch.distributed.rendezvous import rendezvous


def rank() -> int:
    """The number of this process: 0, 1, ..."""
    return int(os.environ["RANK"]) if run_id() else 0


def local_rank() -> int:
    """The number of this process among those of its machine."""
    return int(os.environ["LOCAL_RANK"]) if run_id() else 0


def world_size() -> int:
    """The number of processes, on all machines together."""
    return int(os.environ["WORLD_SIZE"]) if run_id() else 1


def run_id() -> str | None:
    """What all processes of one torchrun command have in common, restarted ones too; else None."""
    name = os.environ.get("TORCHELASTIC_RUN_ID")
    return f"none-{os.getppid()}" if name == "none" else name  # torchrun's default is no name


def restarted() -> bool:
    """Whether torchrun has started this process again, after one of them had failed."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)) > 0


def start(device: torch.device) -> torch.device:
    """Join the other processes; return the device of this one.

    Raises:
        ConnectionError: some did not come within half an hour, or cannot be reached.
    """
    if world_size() == 1:
        return device
    if device.type == "cuda":
        device = torch.device("cuda", local_rank())
        torch.cuda.set_device(device)
    if not dist.is_initialized():
        attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        backend = "nccl" if device.type == "cuda" else "gloo"
        limit = datetime.timedelta(minutes=30)  # another machine may be downloading
        try:
            store, own, number = next(rendezvous("env://", timeout=limit))
            # Addresses of an earlier attempt are in the same store, and would be used.
            store = dist.PrefixStore(f"attempt {attempt}", store)
            dist.init_process_group(
                backend, store=store, rank=own, world_size=number, timeout=limit
            )
        except (RuntimeError, ValueError) as error:
            line = " ".join(str(error).split())[:200]
            raise ConnectionError(
                f"torchrun: the processes do not reach each other: {line}"
            ) from None
    return device


def wrap(model: nn.Module) -> nn.Module:
    """The model, with gradients that are averaged over the processes."""
    if world_size() == 1:
        return model
    with warnings.catch_warnings(action="ignore"):  # PyTorch 2.14 has another name for it
        # Buffers are averaged once an epoch: see `average_statistics`.
        return nn.parallel.DistributedDataParallel(model, broadcast_buffers=False)


def own_part(*tensors: torch.Tensor) -> list[torch.Tensor]:
    """This process's part of a batch, one after the other, all of the same size.

    Raises:
        ValueError: the batch cannot be divided so.
    """
    if len(tensors[0]) % world_size():
        raise ValueError(f"{len(tensors[0])} images do not divide among {world_size()} processes")
    return [tensor.chunk(world_size())[rank()] for tensor in tensors]


def summed(*tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Each tensor as the sum over the processes."""
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
