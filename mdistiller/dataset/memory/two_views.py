"""The loader of two views of every image, for methods that compare them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from mdistiller.dataset.memory.loader import Epoch, TrainLoader
from mdistiller.dataset.memory.randaugment import OperationGroups, StrongAugmentation

_BLOCK_BYTES = 2**24
"""Bytes of images for which strong views are made at a time: fewer, larger operations."""


@dataclass(frozen=True)
class _TwoViewEpoch(Epoch):
    """Also the strong view's parameters, [N, P], and its groups, one for each block."""

    strong: Tensor
    groups: list[OperationGroups]


class TwoViewLoader(TrainLoader):
    """Shuffled batches `((weak, strong), target, index)`: two views, drawn independently.

    The weak views are those that :class:`TrainLoader` gives with the same arguments, in the same
    order; `views` and `num_views` speak of them. The strong ones add to a crop and mirror of their
    own what :class:`StrongAugmentation` describes. Both are float32 [B, 3, H, W], normalised.
    """

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.strong = StrongAugmentation(self.augment)
        self._split_blocks()

    def merge_last_batch(self) -> None:
        super().merge_last_batch()
        self._split_blocks()

    def _split_blocks(self) -> None:
        """Which steps have their strong views made together."""
        batch_bytes = self.batch_size * self.dataset.images[0].numel()
        steps, size = len(self.batch_sampler), max(1, _BLOCK_BYTES // batch_bytes)
        self._blocks = [range(k, min(k + size, steps)) for k in range(0, steps, size)]

    def _draw(self, generator: torch.Generator) -> _TwoViewEpoch:
        drawn, device = super()._draw(generator), self._store.device
        strong = self.strong.draw(self.num_data, generator)
        rows = torch.arange(self.num_data) if self.balanced else drawn.order.cpu()
        groups = [
            self.strong.group(strong[self._block_index(rows, block)]).to(device)
            for block in self._blocks
        ]
        return _TwoViewEpoch(drawn.order, drawn.parameters, drawn.views, strong.to(device), groups)

    def _block_index(self, order: Tensor, block: range) -> Tensor:
        """The images of this process in several steps."""
        return torch.cat([order[slice(*self.batch_sampler.local_batch(step))] for step in block])

    def _batches(self, drawn: Epoch, start: int) -> Iterator[tuple[Any, Tensor, Tensor]]:
        assert isinstance(drawn, _TwoViewEpoch)
        weak_batches = super()._batches(drawn, start)
        for block, groups in zip(self._blocks, drawn.groups, strict=True):
            rest = range(max(block.start, start), block.stop)
            if not rest:
                continue
            index = self._block_index(drawn.order, block)
            store, parameters = self._store, drawn.strong
            if self.balanced:
                each = torch.arange(self.num_data, device=index.device)
                store, parameters = store[index], parameters[self._block_index(each, block)]
                index = each[: len(index)]
            views = self.strong.apply(store, parameters, index, groups)
            views = views[len(views) - len(self._block_index(drawn.order, rest)) :]
            for weak, target, batch in islice(weak_batches, len(rest)):
                strong, views = views[: len(batch)], views[len(batch) :]
                yield (weak, self.normalize(strong)), target, batch
