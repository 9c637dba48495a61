"""Which samples of a set of shards form each batch, where shards are read from front to back.

The samples of all shards form one sequence; the order of the shards is drawn for each epoch. Every
process takes a contiguous part of it and cuts that into streams. Batch `s` comes from stream
`s % num_streams`, within which shuffling moves a sample by less than `window` places, so a reader
buffers few samples. Any number of worker processes can share the streams. Best is a divisor of the
number of streams: two workers that build batches of one stream both read it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

MAX_STREAMS = 16

ShardRange = tuple[int, int, int]  # shard, its first sample, its last one (exclusive)


@dataclass(frozen=True)
class ShardBatchRequest:
    """The batch of one step.

    Attributes:
        index: positions of the samples in the set, [B].
        parameters: of their augmentation, [B, P]; None in evaluation.
        stream: the stream that holds the samples.
        pass_number: number of the pass over the shards; a new one restarts the stream.
        shard_ranges: what the stream reads, in order.
        offsets: of the samples within the stream.
        oldest_needed: the lowest offset that later batches need.
    """

    index: Tensor
    parameters: Tensor | None
    stream: int
    pass_number: int
    shard_ranges: list[ShardRange]
    offsets: list[int]
    oldest_needed: int


class ShardSampler:
    """The streams of one process.

    Args:
        counts: samples of every shard, int64, [S].
        sizes: of the process's batches, in order.
        start: first position of the process's part of the sequence.
        processes: number of processes that share the shards.
        window: shuffling distance, see above; 0 keeps the order.
    """

    def __init__(
        self, counts: Tensor, sizes: Sequence[int], start: int, processes: int, window: int
    ):
        self.counts, self.sizes, self.start, self.window = counts, sizes, start, window
        self.first = counts.cumsum(0) - counts  # position of each shard's first sample
        self.num_streams = max(1, min(MAX_STREAMS, len(counts) // processes, len(sizes)))

    def draw(
        self, generator: torch.Generator | None, pass_number: int = 0
    ) -> list[ShardBatchRequest]:
        """The requests of all steps, without parameters.

        Args:
            generator: shuffles shards and samples; None leaves both in order. It must be the same
                in all processes.
        """
        shards = torch.arange(len(self.counts))
        if generator is not None:
            shards = torch.randperm(len(self.counts), generator=generator)
        requests: dict[int, ShardBatchRequest] = {}
        start = self.start
        for stream in range(self.num_streams):
            steps = range(stream, len(self.sizes), self.num_streams)
            length = sum(self.sizes[step] for step in steps)
            ranges, index = self._ranges(shards, start, start + length)
            offsets = torch.arange(length)
            if generator is not None:
                moved = torch.rand(length, generator=generator, dtype=torch.float64) * self.window
                offsets = (offsets + moved).argsort()
            parts = offsets.split([self.sizes[step] for step in steps])
            oldest = length
            for step, part in zip(reversed(steps), reversed(parts), strict=True):
                requests[step] = ShardBatchRequest(
                    index[part], None, stream, pass_number, ranges, part.tolist(), oldest
                )
                oldest = min(oldest, int(part.min()))
            start += length
        return [requests[step] for step in range(len(self.sizes))]

    def _ranges(self, shards: Tensor, start: int, stop: int) -> tuple[list[ShardRange], Tensor]:
        """Ranges of shards and positions of samples from `start` to `stop` of the sequence."""
        counts = self.counts[shards]
        before = counts.cumsum(0) - counts
        low = (start - before).clamp(min=0)
        high = (stop - before).clamp(max=counts)
        touched = (high > low).nonzero().squeeze(1)
        ranges = [(int(shards[k]), int(low[k]), int(high[k])) for k in touched]
        parts = [torch.arange(a, b) + self.first[shard] for shard, a, b in ranges]
        return ranges, torch.cat(parts) if parts else torch.empty(0, dtype=torch.int64)
