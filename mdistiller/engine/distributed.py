"""Several processes: start-up under torchrun, sums over ranks, who may print and write."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterable, Iterator
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from mdistiller.engine.run.failure import first_to_fail, watching
from mdistiller.runtime import barrier, distributed, rank, side_group, world_size

T = TypeVar("T")

__all__ = [
    "average_gradients",
    "barrier",
    "broadcast_buffers",
    "from_main_process",
    "is_main_process",
    "of_all_processes",
    "process_group",
    "rank",
    "sum_over_ranks",
    "unsynchronized",
    "unwrap",
    "world_size",
    "wrap",
]


@contextlib.contextmanager
def process_group(device: torch.device, minutes: float = 30.0) -> Iterator[None]:
    """The process group that torchrun asks for, for the duration; nothing without torchrun.

    GPUs speak NCCL, everything else gloo. A group that is up already is left alone. In here a
    process does not outlive the failure of another (see `failure.py`).

    Args:
        minutes: what processes wait for one another in a training step.
    """
    if int(os.environ.get("WORLD_SIZE", 1)) == 1 or distributed():
        yield
        return
    if device.type == "cuda":
        torch.cuda.set_device(device)
    with watching():
        timeout = timedelta(minutes=minutes)
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=timeout)
        side_group()
        try:
            yield
        except Exception:
            # Before a connection closes and makes others fail. The group is left to the exit of the
            # process: to take it down can wait for operations that the others never join.
            first_to_fail()
            raise
        dist.destroy_process_group()


def is_main_process() -> bool:
    """Whether this process prints, logs and writes files."""
    return rank() == 0


def from_main_process(find: Callable[[], T]) -> T:
    """What the first process finds, in all of them."""
    box: list[Any] = [find() if rank() == 0 else None]
    if distributed():
        dist.broadcast_object_list(box, src=0, group=side_group())
    result: T = box[0]
    return result


def of_all_processes(value: T) -> list[T]:
    """What every process has, by rank, in all of them."""
    if not distributed():
        return [value]
    values: list[Any] = [None] * world_size()
    dist.all_gather_object(values, value, group=side_group())
    return values


def sum_over_ranks(values: Tensor) -> Tensor:
    """Elementwise sum of a tensor over all processes (in place); the tensor itself without any."""
    if distributed():
        dist.all_reduce(values)
    return values


def broadcast_buffers(module: nn.Module) -> None:
    """Give every process the first one's buffers (batch-norm statistics), as its checkpoint has."""
    if distributed():
        for buffer in module.buffers():
            dist.broadcast(buffer, src=0)


def average_gradients(params: Iterable[Tensor]) -> None:
    """Average `.grad` over all processes, in place and in one message; every process has the same.

    For trainers that DistributedDataParallel cannot serve.
    """
    if not distributed():
        return
    grads = [param.grad for param in params if param.grad is not None]
    flat = torch.cat([grad.reshape(-1) for grad in grads])
    dist.all_reduce(flat)
    flat /= world_size()
    for grad, mean in zip(grads, flat.split([grad.numel() for grad in grads]), strict=True):
        grad.copy_(mean.view_as(grad))


def wrap(distiller: nn.Module, find_unused: bool = False) -> nn.Module:
    """`distiller` in DistributedDataParallel if there are several processes.

    A teacher in eval mode without trained parameters stays out of it: it is the same everywhere,
    so nothing of it needs to travel; nor do buffers that a method keeps equal itself.
    """
    if not distributed():
        return distiller
    teacher = getattr(distiller, "teacher", None)
    own_state = tuple(getattr(distiller, "own_state", ()))
    still = [name for name, _ in distiller.named_buffers() if name.startswith(own_state)]
    learnable = {id(p) for p in distiller.get_learnable_parameters()}  # type: ignore[operator]
    if isinstance(teacher, nn.Module) and learnable.isdisjoint(map(id, teacher.parameters())):
        distiller.train()
        tensors = [*teacher.named_parameters(), *teacher.named_buffers()]
        still += [f"teacher.{name}" for name, _ in tensors if not teacher.training]
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(distiller, still)
    return DistributedDataParallel(distiller, find_unused_parameters=find_unused)


def unsynchronized(distiller: nn.Module) -> contextlib.AbstractContextManager[None]:
    """Context of forward and backward passes that leave gradients to each process for now."""
    if isinstance(distiller, DistributedDataParallel):
        return distiller.no_sync()
    return contextlib.nullcontext()


def unwrap(distiller: nn.Module) -> nn.Module:
    """The distiller inside a (Distributed)DataParallel wrapper, or itself."""
    parallel = (DistributedDataParallel, nn.DataParallel)
    return distiller.module if isinstance(distiller, parallel) else distiller
