"""Loaders over shards, which workers read from front to back."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from mdistiller.dataset.files.loader import Reader, WorkerEvalLoader, WorkerTrainLoader
from mdistiller.dataset.files.shard_reader import ShardStreamReader
from mdistiller.dataset.files.shard_sampler import ShardSampler
from mdistiller.dataset.memory.loader import Epoch


class ShardTrainLoader(WorkerTrainLoader):
    """Shuffled, augmented batches `(image, target, index)`; see :class:`WorkerTrainLoader`.

    The order of the shards is random; within its stream a sample moves by less than
    `dataset.window`. Indices number the samples in the order of the shards' names.
    """

    merges_last_batch = False
    _passes = 0  # iterations begun

    def _reader(self) -> Reader:
        return ShardStreamReader(self.dataset)

    def _order(self, generator: torch.Generator) -> Tensor:
        batches = self.batch_sampler
        first = [batches.batch(step)[0] for step in range(len(batches))]
        local = [batches.local_batch(step) for step in range(len(batches))]
        sampler = ShardSampler(
            self.dataset.counts,
            [stop - start for start, stop in local],
            sum(start for start, _ in local) - sum(first),  # what lower ranks take
            batches.world_size,
            self.dataset.window,
        )
        # A generator of its own: processes draw different amounts, and augmentation must not.
        seed = int(torch.randint(2**62, (1,), generator=generator))
        self._requests = sampler.draw(torch.Generator().manual_seed(seed))
        order = torch.full((self.num_data,), -1)
        for (start, stop), request in zip(local, self._requests, strict=True):
            order[start:stop] = request.index
        return order

    def _request(self, step: int, drawn: Epoch) -> Any:
        request = self._requests[step]
        parameters = drawn.parameters[request.index]
        return replace(request, parameters=parameters, pass_number=self._passes)

    def _batches(self, drawn: Epoch, start: int) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        self._passes += 1
        return super()._batches(drawn, start)


class ShardEvalLoader(WorkerEvalLoader):
    """Batches `(image, target)`; every process reads a contiguous part of the shards."""

    _passes = 0  # iterations begun

    def _reader(self) -> Reader:
        return ShardStreamReader(self.dataset)

    def _batch_requests(self) -> Iterator[Any]:
        self._passes += 1
        sizes = [stop - start for start, stop in self._slices()]
        sampler = ShardSampler(self.dataset.counts, sizes, self.start, 1, 0)
        yield from sampler.draw(None, self._passes)
