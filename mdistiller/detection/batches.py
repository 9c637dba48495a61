"""Loaders of detection: endless and shuffled for training, in order for validation."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from mdistiller import runtime
from mdistiller.dataset.files.loader import WorkerPool
from mdistiller.dataset.sampler import rank_slice
from mdistiller.detection.coco.dataset import CocoDetectionSet, View
from mdistiller.detection.sampler import AspectRatioSampler, BatchRequests
from mdistiller.registry import UserError

Batch = tuple[list[Tensor], list[dict[str, Any]]]
"""Images, float32 [3, H, W] in 0..1, RGB, of different sizes; and the target of each (`item`)."""


@dataclass
class _CollatedBatch:
    """A collated batch from a worker, before it goes to the device."""

    images: list[Tensor]  # uint8
    targets: list[dict[str, Any]]

    def _each(self, move: Any) -> _CollatedBatch:
        return _CollatedBatch(*tree_map_only(Tensor, move, (self.images, self.targets)))

    def pin_memory(self) -> _CollatedBatch:
        return self._each(Tensor.pin_memory)

    def to(self, device: torch.device, non_blocking: bool = False) -> _CollatedBatch:
        return self._each(lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def batch(self) -> Batch:
        return [image.float().div_(255) for image in self.images], self.targets


@dataclass
class _BatchBuilder:
    """Reads and collates batches in the workers."""

    dataset: CocoDetectionSet

    def __getitem__(self, request: Sequence[View]) -> _CollatedBatch | str:
        try:
            items = [self.dataset.item(view) for view in request]
        except UserError as error:  # the worker would lose its text
            return str(error)
        return _CollatedBatch([image for image, _ in items], [target for _, target in items])


class _Batches:
    """The base of both loaders.

    Args:
        dataset: the images.
        batch_size: of each process.
        device: where batches go.
        num_workers: processes that read images; 0: the main process reads.
        timeout: seconds to wait for a worker; 0: for ever.
        rank, world_size: as torch.distributed says by default.
    """

    def __init__(
        self,
        dataset: CocoDetectionSet,
        batch_size: int,
        device: torch.device | str = "cpu",
        num_workers: int = 0,
        timeout: float = 0,
        rank: int | None = None,
        world_size: int | None = None,
    ):
        self.dataset, self.batch_size = dataset, batch_size
        self.rank = runtime.rank() if rank is None else rank
        self.world_size = runtime.world_size() if world_size is None else world_size
        self._workers = WorkerPool(
            _BatchBuilder(dataset), num_workers, torch.device(device), timeout
        )

    def close(self) -> None:
        """End the worker processes; another iteration starts new ones."""
        self._workers.close()


class TrainBatches(_Batches):
    """Endless training batches of this process; iterating continues where it stopped.

    Global batches are made of `batch_size * world_size` images of one orientation and split in
    order, so the number of processes changes nothing else. The view of an image follows from the
    seed and its position in the stream.

    Args:
        min_sizes, max_size, flip, grouping: see `data.DATA`.
        seed: of order and views; the same in all processes.
        common: `device`, `num_workers`, `timeout`, `rank`, `world_size` of :class:`_Batches`.
    """

    def __init__(
        self,
        dataset: CocoDetectionSet,
        batch_size: int,
        *,
        min_sizes: Sequence[int] = (800,),
        max_size: int = 1333,
        flip: float = 0.5,
        grouping: bool = True,
        seed: int = 0,
        **common: Any,
    ):
        if batch_size < 1:
            raise UserError(f"SOLVER.BATCH_SIZE {batch_size} must be at least 1")
        super().__init__(dataset, batch_size, **common)
        portrait = dataset.portrait if grouping else np.zeros(len(dataset), bool)
        sampler = AspectRatioSampler(portrait, batch_size * self.world_size, seed)
        part = slice(self.rank * batch_size, (self.rank + 1) * batch_size)
        self.requests = BatchRequests(sampler, part, min_sizes, max_size, flip)

    def __iter__(self) -> Iterator[Batch]:
        for made in self._workers.batches(self.requests):
            self.requests.mark_yielded()
            yield made.batch()

    def state_dict(self) -> dict[str, Any]:
        """The position as plain values; loading it reproduces the following batches, in any
        process."""
        return {**self.requests.state, **self._facts()}

    def _facts(self) -> dict[str, Any]:
        """Settings without which a saved position is meaningless."""
        sampler = self.requests.sampler
        return {
            "images": len(self.dataset),
            "batch_size": sampler.batch_size,
            "seed": sampler.seed,
            "grouped": bool(sampler.portrait.any()),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue after the batch where `state` was taken, from the next `iter()` on.

        Raises:
            UserError: it is of other data, another global batch size or another seed.
        """
        for name, value in self._facts().items():
            if state.get(name) != value:
                raise UserError(
                    f"the run's data were at {name} {state.get(name)!r}, now it is {value!r}: "
                    "resuming would give other batches; start a new run"
                )
        self.requests.state = {"position": state["position"], "waiting": state["waiting"]}


class ValBatches(_Batches):
    """This process's share of the images, each once and in order, without repeats.

    Args:
        min_size, max_size: of every image, in pixels.
        common: `device`, `num_workers`, `timeout`, `rank`, `world_size` of :class:`_Batches`.
    """

    def __init__(
        self,
        dataset: CocoDetectionSet,
        batch_size: int = 1,
        *,
        min_size: int = 800,
        max_size: int = 1333,
        **common: Any,
    ):
        super().__init__(dataset, batch_size, **common)
        self.min_size, self.max_size = min_size, max_size
        self.start, self.stop = rank_slice(len(dataset), self.rank, self.world_size)

    def __len__(self) -> int:
        return -(-(self.stop - self.start) // self.batch_size)

    def _requests(self) -> list[list[View]]:
        sizes = (self.min_size, self.max_size)
        views = [View(i, *sizes, masks=False) for i in range(self.start, self.stop)]
        return [views[k : k + self.batch_size] for k in range(0, len(views), self.batch_size)]

    def __iter__(self) -> Iterator[Batch]:
        for made in self._workers.batches(self._requests()):
            yield made.batch()
