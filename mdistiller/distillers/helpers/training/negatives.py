"""The draw of positives and negatives for contrastive methods, on the device."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn

from mdistiller.registry import UserError

DRAW_BLOCK = 2**26
"""Most random numbers that are held at once while negatives are drawn."""


class Negatives(nn.Module):
    """Draws positives and negatives for labelled samples, on the device.

    Negatives are K distinct samples of other classes, every set of K equally likely; where fewer
    than K exist, they are drawn with replacement.

    Args:
        targets: classes of the training images, int64 [n]; None: each image is its own class.
        num_data: n.
        k: negatives for each sample.
    """

    targets: Tensor
    order: Tensor
    place: Tensor
    start: Tensor
    count: Tensor

    def __init__(self, targets: Tensor | None, num_data: int, k: int):
        super().__init__()
        self.has_classes = targets is not None
        if targets is None:
            targets = torch.arange(num_data)
        targets = torch.as_tensor(targets, dtype=torch.int64).cpu()
        if tuple(targets.shape) != (num_data,):
            raise UserError(f"CRD: expected {num_data} training targets, got {list(targets.shape)}")
        _, targets = targets.unique(return_inverse=True)
        count = targets.bincount()
        if len(count) < 2:
            raise UserError("CRD needs training images of at least two classes")
        self.k = k
        others = num_data - count
        self.some_distinct = bool((others >= k).any())
        self.all_distinct = bool((others >= k).all())
        order = targets.argsort(stable=True)
        tables = {
            "targets": targets,
            "order": order,  # the images by class ...
            "place": order.argsort(),  # ... the place of each in there ...
            "start": count.cumsum(0) - count,  # ... where each class begins in there ...
            "count": count,  # ... and its size
        }
        for name, table in tables.items():
            self.register_buffer(name, table, persistent=False)

    @torch.no_grad()
    def draw(self, index: Tensor, out: Tensor | None = None) -> Tensor:
        """Negatives of the images `index` [N]: their numbers, int64 [N, K], written to `out`."""
        if out is None:
            out = torch.empty(len(index), self.k, dtype=torch.int64, device=index.device)
        repeated = None if self.all_distinct else self._repeated(index)
        if repeated is not None and not self.some_distinct:
            return out.copy_(repeated)
        self._distinct(index, out)
        if repeated is not None:
            few = len(self.targets) - self.count[self.targets[index]] < self.k
            out.copy_(torch.where(few[:, None], repeated, out))
        return out

    def _distinct(self, index: Tensor, out: Tensor) -> None:
        (self._chosen if index.device.type == "cpu" else self._by_keys)(index, out)

    def _chosen(self, index: Tensor, out: Tensor) -> None:
        """By numpy, image by image: on a CPU 5 times as fast as random keys for a whole batch."""
        generator = np.random.default_rng(int(torch.randint(2**62, ())))  # repeats with torch's
        classes = self.targets[index]
        order = self.order.numpy()
        bounds = zip(self.start[classes].tolist(), self.count[classes].tolist(), strict=True)
        for row, (start, count) in zip(out.numpy(), bounds, strict=True):
            if len(order) - count < self.k:
                row[:] = 0  # drawn with replacement elsewhere
                continue
            # as `_others`, but a row at a time, which stays in the cache
            place = generator.choice(len(order) - count, self.k, replace=False, shuffle=False)
            place += count * (place >= start)
            row[:] = order[place]

    def _by_keys(self, index: Tensor, out: Tensor) -> None:
        """The K largest of random keys, own class last; many rows at once, without a sync."""
        rows = max(1, DRAW_BLOCK // len(self.targets))
        for part, to in zip(index.split(rows), out.split(rows), strict=True):
            to.copy_(self._largest_keys(part))

    def _largest_keys(self, index: Tensor) -> Tensor:
        keys = torch.rand(len(index), len(self.targets), device=index.device)
        keys.masked_fill_(self.targets == self.targets[index, None], -1.0)
        return keys.topk(self.k, dim=1, sorted=False).indices

    def _repeated(self, index: Tensor) -> Tensor:
        """Each uniform over the images of other classes."""
        others = len(self.targets) - self.count[self.targets[index, None]]
        return self._others(index, random_below(others.expand(-1, self.k)))

    def _others(self, index: Tensor, place: Tensor) -> Tensor:
        """The images at `place` [N, K] of the list, by class, without the own class's."""
        classes = self.targets[index, None]
        return self.order[place + self.count[classes] * (place >= self.start[classes])]

    @torch.no_grad()
    def same_class(self, index: Tensor) -> Tensor:
        """Another image of its class for each of `index` [N]; itself where the class has one."""
        if not self.has_classes:
            raise UserError("CRD.MODE relax needs the classes of the training images")
        classes = self.targets[index]
        start, count = self.start[classes], self.count[classes]
        shift = random_below((count - 1).clamp(min=1)) + 1
        offset = self.place[index] - start + shift * (count > 1)
        return self.order[start + offset % count]


def random_below(bound: Tensor) -> Tensor:
    """Uniform whole numbers in [0, bound), elementwise; int64."""
    return torch.randint(2**62, bound.shape, device=bound.device) % bound
