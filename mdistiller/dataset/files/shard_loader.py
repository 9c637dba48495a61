"""Loaders over shards: who reads what in which order, and what is shuffled."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from mdistiller.dataset.files.loader import Reader, WorkerEvalLoader, WorkerTrainLoader
from mdistiller.dataset.files.shard_reader import StreamReader
from mdistiller.dataset.files.shard_sampler import Lanes
from mdistiller.dataset.memory.loader import Epoch


class ShardTrainLoader(WorkerTrainLoader):
    """Shuffled, augmented batches `(image, target, index)`; see :class:`WorkerTrainLoader`.

    The order of the shards is random; within its lane a sample moves by less than `dataset.window`.
    Indices number the samples in the order of the shards' names.
    """

    joins_last = False
    _reading = 0  # iterations begun

    def _reader(self) -> Reader:
        return StreamReader(self.dataset)

    def _order(self, generator: torch.Generator) -> Tensor:
        plan = self.plan
        steps = [(plan.batch(step)[0], *plan.local_batch(step)) for step in range(len(plan))]
        lanes = Lanes(
            self.dataset.counts,
            [stop - start for _, start, stop in steps],
            sum(start - first for first, start, _ in steps),  # what the processes before it take
            plan.world_size,
            self.dataset.window,
        )
        # Of its own: how much is drawn differs between processes, and views must not.
        seed = int(torch.randint(2**62, (1,), generator=generator))
        self._lane_tasks = lanes.draw(torch.Generator().manual_seed(seed))
        order = torch.full((self.num_data,), -1)
        for (_, start, stop), task in zip(steps, self._lane_tasks, strict=True):
            order[start:stop] = task.index
        return order

    def _task(self, step: int, drawn: Epoch) -> Any:
        task = self._lane_tasks[step]
        return replace(task, parameters=drawn.parameters[task.index], reading=self._reading)

    def _batches(self, drawn: Epoch, start: int) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        self._reading += 1
        return super()._batches(drawn, start)


class ShardEvalLoader(WorkerEvalLoader):
    """Batches `(image, target)`; every process reads a stretch of the shards."""

    _reading = 0  # iterations begun

    def _reader(self) -> Reader:
        return StreamReader(self.dataset)

    def _tasks(self) -> Iterator[Any]:
        self._reading += 1
        sizes = [stop - start for start, stop in self._shares()]
        lanes = Lanes(self.dataset.counts, sizes, self.start, 1, 0)
        yield from lanes.draw(None, self._reading)
