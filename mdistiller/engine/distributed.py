"""Several processes: start-up under torchrun, sums over ranks, who may print and write."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from mdistiller.runtime import distributed, local_rank, rank, world_size

__all__ = [
    "barrier",
    "is_main_process",
    "process_group",
    "rank",
    "sum_over_ranks",
    "unwrap",
    "world_size",
    "wrap",
]


@contextlib.contextmanager
def process_group(device: torch.device) -> Iterator[None]:
    """The process group that torchrun asks for, for the duration; nothing without torchrun.

    GPUs speak NCCL, everything else gloo. A group that is up already is left alone.
    """
    if int(os.environ.get("WORLD_SIZE", 1)) == 1 or distributed():
        yield
        return
    if device.type == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    try:
        yield
    finally:
        dist.destroy_process_group()


def is_main_process() -> bool:
    """Whether this process prints, logs and writes files."""
    return rank() == 0


def is_local_main_process() -> bool:
    """Whether this process is the first of its machine."""
    return local_rank() == 0


def barrier() -> None:
    """Wait for all processes."""
    if distributed():
        dist.barrier()


def sum_over_ranks(values: Tensor) -> Tensor:
    """Elementwise sum of a tensor over all processes (in place); the tensor itself without any."""
    if distributed():
        dist.all_reduce(values)
    return values


def wrap(distiller: nn.Module, find_unused: bool = False) -> nn.Module:
    """`distiller` in DistributedDataParallel if there are several processes.

    The frozen teacher stays out of it: its parameters get no gradient and its buffers are the same
    everywhere, so nothing of it needs to travel; nor do buffers that a method keeps equal itself.
    """
    if not distributed():
        return distiller
    still = ("teacher.", *getattr(distiller, "own_state", ()))
    frozen = [
        name
        for name, _ in [*distiller.named_parameters(), *distiller.named_buffers()]
        if name.startswith(still)
    ]
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(distiller, frozen)
    return DistributedDataParallel(distiller, find_unused_parameters=find_unused)


def unwrap(distiller: nn.Module) -> nn.Module:
    """The distiller inside a (Distributed)DataParallel wrapper, or itself."""
    parallel = (DistributedDataParallel, nn.DataParallel)
    return distiller.module if isinstance(distiller, parallel) else distiller
