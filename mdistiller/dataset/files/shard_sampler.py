"""Which samples of a long sequence, read from front to back in several streams, form each batch.

The sequence is that of all shards, in an order drawn for the epoch. Every process takes one stretch
of it and cuts that into lanes; batch `s` comes from lane `s % lanes`, within which a sample moves
by less than `window` places. So whoever reads a lane holds back few samples, and any number of
worker processes can share the lanes: best one that divides theirs, since two workers that make
batches of one lane both read it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

LANES = 16

Run = tuple[int, int, int]  # shard, first sample in it, last one (outside)


@dataclass(frozen=True)
class LaneTask:
    """The batch of a step.

    Attributes:
        index: numbers of the samples in the set, [B].
        parameters: of their views, [B, P]; None in evaluation.
        lane: where it is read.
        reading: which reading of the lane; another one starts it anew.
        runs: what the lane reads, in order.
        offsets: of the samples within the lane.
        floor: the lowest offset that is wanted after this batch.
    """

    index: Tensor
    parameters: Tensor | None
    lane: int
    reading: int
    runs: list[Run]
    offsets: list[int]
    floor: int


class Lanes:
    """The lanes of one process.

    Args:
        counts: samples of every shard, int64, [S].
        sizes: of the process's batches, in order.
        start: where its stretch of the sequence begins.
        processes: how many share the shards.
        window: see above; 0 keeps the order.
    """

    def __init__(
        self, counts: Tensor, sizes: Sequence[int], start: int, processes: int, window: int
    ):
        self.counts, self.sizes, self.start, self.window = counts, sizes, start, window
        self.first = counts.cumsum(0) - counts  # number of each shard's first sample
        self.num = max(1, min(LANES, len(counts) // processes, len(sizes)))

    def draw(self, generator: torch.Generator | None, reading: int = 0) -> list[LaneTask]:
        """The tasks of all steps, without parameters.

        Args:
            generator: shuffles shards and samples; None leaves both in order. Must be the same
                in all processes.
        """
        shards = torch.arange(len(self.counts))
        if generator is not None:
            shards = torch.randperm(len(self.counts), generator=generator)
        tasks: list[LaneTask | None] = [None] * len(self.sizes)
        start = self.start
        for lane in range(self.num):
            steps = range(lane, len(self.sizes), self.num)
            length = sum(self.sizes[step] for step in steps)
            runs, index = self._stretch(shards, start, start + length)
            offsets = torch.arange(length)
            if generator is not None:
                moved = torch.rand(length, generator=generator, dtype=torch.float64) * self.window
                offsets = (offsets + moved).argsort()
            parts = offsets.split([self.sizes[step] for step in steps])
            floor = length
            for step, part in zip(reversed(steps), reversed(parts), strict=True):
                tasks[step] = LaneTask(index[part], None, lane, reading, runs, part.tolist(), floor)
                floor = min(floor, int(part.min()))
            start += length
        return [task for task in tasks if task is not None]

    def _stretch(self, shards: Tensor, start: int, stop: int) -> tuple[list[Run], Tensor]:
        """What to read, and the numbers of the samples, from `start` to `stop` of the sequence."""
        counts = self.counts[shards]
        before = counts.cumsum(0) - counts
        low = (start - before).clamp(min=0)
        high = (stop - before).clamp(max=counts)
        touched = (high > low).nonzero().squeeze(1)
        runs = [(int(shards[k]), int(low[k]), int(high[k])) for k in touched]
        parts = [torch.arange(a, b) + self.first[shard] for shard, a, b in runs]
        return runs, torch.cat(parts) if parts else torch.empty(0, dtype=torch.int64)
