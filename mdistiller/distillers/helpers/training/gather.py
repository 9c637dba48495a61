"""The batch of all processes, for losses that relate samples to one another.

Such a loss L is evaluated in every process on the same global batch of n samples, of which the
process holds n_r (rank r a contiguous share, in rank order). Gradients with respect to the own
samples are taken from the own copy of L, so the backward pass needs no communication. Two factors
of the training loop apply to them: it multiplies the loss of a process by n_r W / n
(`BaseTrainer.loss_weight`, 1 where W processes share a batch evenly), and
DistributedDataParallel divides the sum over processes by W. Together: n_r / n. The backward pass of
:func:`gather_batch` multiplies by n / n_r, so that parameters get exactly the gradient of L on the
global batch, for any number of processes and uneven shares as well. The reported value is that of L
in every process, hence also in their weighted mean.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from functools import lru_cache
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from mdistiller.runtime import rank, world_size


def gather_batch(*parts: Tensor) -> tuple[Tensor, ...]:
    """Each tensor [n_r, ...] with the samples of all processes, [n, ...], in rank order.

    Without several processes the tensors come back as they are. All processes must call this
    together. The gradient is scaled for the training loop, see the module's text.
    """
    if world_size() == 1 or _local:
        return parts
    sizes = _sizes(len(parts[0]))
    return tuple(_Gather.apply(part, sizes) for part in parts)


_local: list[bool] = []  # not empty within `local_batches`


@contextlib.contextmanager
def local_batches() -> Iterator[None]:
    """Within the context :func:`gather_batch` leaves the batch of each process as it is.

    For evaluation, where processes may have different numbers of batches.
    """
    _local.append(True)
    try:
        yield
    finally:
        _local.pop()


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, part: Tensor, sizes: list[int]) -> Tensor:
        count = sizes[rank()]
        ctx.share = slice(sum(sizes[: rank()]), sum(sizes[: rank() + 1]))
        ctx.scale = sum(sizes) / count
        padded = part.new_zeros(max(sizes), *part.shape[1:])
        padded[:count] = part
        received = [torch.empty_like(padded) for _ in sizes]
        dist.all_gather(received, padded)
        return torch.cat([rows[:size] for rows, size in zip(received, sizes, strict=True)])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0][ctx.share] * ctx.scale, None


def _sizes(count: int) -> list[int]:
    """Number of samples of every process; exchanged between CPUs, so that no GPU waits."""
    local = torch.tensor([count])
    sizes = [torch.empty_like(local) for _ in range(world_size())]
    dist.all_gather(sizes, local, group=_cpu_group(dist.group.WORLD))
    return [int(size) for size in sizes]


@lru_cache(maxsize=1)
def _cpu_group(world: dist.ProcessGroup) -> Any:
    """A group of the same processes that moves CPU tensors; made once per process group."""
    return world if dist.get_backend(world) == "gloo" else dist.new_group(backend="gloo")
