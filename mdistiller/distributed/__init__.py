"""Distributed training: start-up under torchrun, collectives, DistributedDataParallel."""

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

from mdistiller.distributed.failure import first_to_fail, watching
from mdistiller.runtime import (
    barrier,
    distributed,
    fail_together,
    rank,
    side_group,
    world_size,
)

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
    """Context with the process group of a torchrun launch; does nothing without torchrun.

    GPUs use NCCL, everything else gloo. An existing group is used as it is. When one process fails
    in this context, all end (see `failure.py`).

    Args:
        minutes: timeout of collectives in a training step.
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
    """Call `find` on rank 0 and broadcast its result, or raise its error in all processes."""
    box: list[Any] = [None]
    error: Exception | None = None
    try:
        box = [find() if rank() == 0 else None]
    except Exception as raised:
        error = raised
    fail_together(error)
    if distributed():
        dist.broadcast_object_list(box, src=0, group=side_group())
    result: T = box[0]
    return result


def of_all_processes(value: T) -> list[T]:
    """Gather a value from all processes, by rank."""
    if not distributed():
        return [value]
    values: list[Any] = [None] * world_size()
    dist.all_gather_object(values, value, group=side_group())
    return values


def sum_over_ranks(values: Tensor) -> Tensor:
    """All-reduce: elementwise sum of a tensor over all processes, in place."""
    if distributed():
        dist.all_reduce(values)
    return values


def broadcast_buffers(module: nn.Module) -> None:
    """Broadcast rank 0's buffers (batch-norm statistics), which are those of the checkpoint."""
    if distributed():
        for buffer in module.buffers():
            dist.broadcast(buffer, src=0)


def average_gradients(params: Iterable[Tensor]) -> None:
    """Average `.grad` over all processes, in place, in one all-reduce.

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

    The tensors of a frozen teacher are not synchronised, as they are the same everywhere; nor are
    buffers that a method keeps equal itself.
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
    """Context of forward and backward passes without gradient synchronisation (DDP's `no_sync`)."""
    if isinstance(distiller, DistributedDataParallel):
        return distiller.no_sync()
    return contextlib.nullcontext()


def unwrap(distiller: nn.Module) -> nn.Module:
    """The distiller inside a (Distributed)DataParallel wrapper, or itself."""
    parallel = (DistributedDataParallel, nn.DataParallel)
    return distiller.module if isinstance(distiller, parallel) else distiller
