"""The order of an epoch's images, and how it is divided into batches and between processes."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
from torch import Tensor

from mdistiller.registry import UserError


def rank_slice(num: int, rank: int, world_size: int) -> tuple[int, int]:
    """Start and stop of the contiguous part of `num` items of `rank`; sizes differ by at most 1."""
    small, larger = divmod(num, world_size)
    start = rank * small + min(rank, larger)
    return start, start + small + (rank < larger)


def balanced_order(targets: Tensor, generator: torch.Generator) -> Tensor:
    """A random order of N images in which classes are equally frequent: int64, [N].

    The numbers of two classes differ by at most 1; which ones are larger is random. Within a class,
    images are taken in turn, so that their numbers differ by at most 1 as well.

    Args:
        targets: class indices, int64, [N], on the CPU.
    """
    members = targets.argsort(stable=True).split(targets.unique(return_counts=True)[1].tolist())
    share, rest = divmod(len(targets), len(members))
    chosen = []
    for rank, images in zip(
        torch.randperm(len(members), generator=generator), members, strict=True
    ):
        num = share + int(rank < rest)
        turns = torch.rand(-(-num // len(images)), len(images), generator=generator).argsort()
        chosen.append(images[turns.flatten()[:num]])
    order = torch.cat(chosen)
    return order[torch.randperm(len(order), generator=generator)]


@dataclass(frozen=True)
class DistributedBatchSampler:
    """Which positions of an epoch's order form the batch of each step and process.

    A global batch has `world_size * batch_size` consecutive positions, split evenly. The last one
    is smaller; with fewer than `min_per_rank` for each process it is merged into the one before.
    Every position occurs exactly once, and every process has at least `min_per_rank` in each step.
    """

    num_data: int
    batch_size: int
    rank: int = 0
    world_size: int = 1
    drop_last: bool = False
    min_per_rank: int = 1

    def __post_init__(self) -> None:
        if self.batch_size < 1:
            raise UserError(f"SOLVER.BATCH_SIZE {self.batch_size} must be at least 1")
        if self.batch_size * self.world_size > self.num_data:
            raise UserError(
                f"SOLVER.BATCH_SIZE {self.batch_size} x {self.world_size} process(es) is more than "
                f"the {self.num_data} training images; lower SOLVER.BATCH_SIZE"
            )

    def __len__(self) -> int:
        full, rest = divmod(self.num_data, self.batch_size * self.world_size)
        return full + (rest >= self.min_per_rank * self.world_size and not self.drop_last)

    @property
    def smallest(self) -> int:
        """The smallest batch of any process in any step."""
        start, stop = self.batch(len(self) - 1)
        return min(self.batch_size, (stop - start) // self.world_size)

    def batch(self, step: int) -> tuple[int, int]:
        """Start and stop of the global batch of `step` (from 0)."""
        size = self.batch_size * self.world_size
        if step == len(self) - 1 and not self.drop_last:
            return step * size, self.num_data
        return step * size, (step + 1) * size

    def local_batch(self, step: int) -> tuple[int, int]:
        """Start and stop of this process's part of that batch."""
        start, stop = self.batch(step)
        first, last = rank_slice(stop - start, self.rank, self.world_size)
        return start + first, start + last

    @functools.cached_property
    def local_slices(self) -> list[slice]:
        """This process's part of every batch."""
        return [slice(*self.local_batch(step)) for step in range(len(self))]

    def loss_weight(self, step: int, accumulate: int = 1) -> float:
        """Factor for this process's mean loss that makes gradients averaged over processes exact.

        n_local * world_size / n_global: 1.0 wherever the batch divides evenly.

        Args:
            step: from 0.
            accumulate: number of accumulation steps; n_global is then that of the whole group,
                which may be shorter at the end of an epoch.
        """
        begin = step - step % accumulate
        end = min(begin + accumulate, len(self)) - 1
        first, last = self.local_batch(step)
        size = self.batch(end)[1] - self.batch(begin)[0]
        return (last - first) * self.world_size / size
