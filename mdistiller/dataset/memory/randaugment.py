"""The strong one of two views: random changes of colour and shape on top of crop and mirror.

Two of the fourteen operations, drawn uniformly and with replacement, each with a uniform magnitude
and always applied; then always a square of one colour cut out. So multi-level logit distillation
does it (Jin et al., CVPR 2023), after RandAugment (Cubuk et al., 2020, arXiv 1909.13719).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from mdistiller.dataset.memory.augment import Identity
from mdistiller.dataset.memory.operations import OPERATIONS, UNIT

_NUM_OPERATIONS = 2  # operations on each image
_PARAMETERS = 7  # of each operation: its number, six terms
_EDGES = slice(_NUM_OPERATIONS * _PARAMETERS, _NUM_OPERATIONS * _PARAMETERS + 4)
_BASE = slice(_EDGES.stop, None)
_LARGEST_CUT = 0.5  # side of the square, in widths of the image
_CUT_COLOUR = (125, 123, 114)


@dataclass(frozen=True)
class OperationGroups:
    """Which images of a batch each operation applies to, computed before the batch.

    Attributes:
        order: for each of the two operations, positions in the batch sorted by kind, [2, B].
        counts: for each of the two, the number of images of each kind.
    """

    order: Tensor
    counts: list[list[int]]

    def to(self, device: torch.device) -> OperationGroups:
        """The same with `order` on `device`."""
        return OperationGroups(self.order.to(device), self.counts)


class StrongAugmentation:
    """The changes described above, on top of another augmentation's crop and mirror.

    Args:
        base: drawn anew, independently of the weak view; the images come from its store.
    """

    def __init__(self, base: Identity):
        self.base = base
        self.height, self.width = base.height, base.width

    def draw(self, num: int, generator: torch.Generator) -> Tensor:
        """Parameters of `num` images, int64, [num, P], on the CPU.

        In order: operation and six terms, twice; left, top, right and bottom edge of the square
        (the latter two outside); what the base draws.
        """
        operations = torch.randint(len(OPERATIONS), (num, _NUM_OPERATIONS), generator=generator)
        position = torch.rand(num, _NUM_OPERATIONS, generator=generator, dtype=torch.float64)
        drawn = [
            torch.cat([operations[:, t, None], self.encode(operations[:, t], position[:, t])], 1)
            for t in range(_NUM_OPERATIONS)
        ]
        square = self._draw_square(num, generator)
        return torch.cat([*drawn, square, self.base.draw(num, generator)], dim=1)

    def encode(self, operations: Tensor, position: Tensor) -> Tensor:
        """Terms [num, 6] of operations [num] with magnitudes at [num] places in their ranges."""
        terms = position.new_zeros(len(position), 6, dtype=torch.int64)
        for number, operation in enumerate(OPERATIONS.values()):
            chosen = operations == number
            magnitude = operation.low + (operation.high - operation.low) * position[chosen]
            magnitude = (magnitude * UNIT).trunc() / UNIT
            terms[chosen] = operation.encode(magnitude, self.height, self.width)
        return terms

    def _draw_square(self, num: int, generator: torch.Generator) -> Tensor:
        side, x, y = torch.rand(3, num, generator=generator, dtype=torch.float64)
        half = side * (_LARGEST_CUT * self.width / 2)
        x, y = x * self.width, y * self.height
        edges = torch.stack([x - half, y - half, x + half, y + half], dim=1)
        return edges.round().long()  # of the pixels whose centres are inside

    @staticmethod
    def group(parameters: Tensor) -> OperationGroups:
        """The groups of a batch, from the parameters of its images, [B, P], on the CPU."""
        operations = parameters[:, : _EDGES.start : _PARAMETERS].T
        order = operations.sort(dim=1, stable=True).indices
        counts = [row.bincount(minlength=len(OPERATIONS)).tolist() for row in operations]
        return OperationGroups(order, counts)

    def apply(
        self, store: Tensor, parameters: Tensor, index: Tensor, groups: OperationGroups
    ) -> Tensor:
        """Views of the images at `index`, uint8, [B, 3, H, W]; see :meth:`Identity.apply`.

        Args:
            groups: of `parameters[index]`, with `order` on the device. They are computed before,
                since the CPU would otherwise wait for the device.
        """
        images = self.base.apply(store, parameters[:, _BASE], index)
        chosen = parameters[index]
        for k, counts in enumerate(groups.counts):
            order, first = groups.order[k], k * _PARAMETERS
            terms = chosen[order, first + 1 : first + _PARAMETERS].split(counts)
            parts = images[order].split(counts)
            changed = [
                operation.kernel(part, term)
                for operation, part, term in zip(OPERATIONS.values(), parts, terms, strict=True)
                if len(part)
            ]
            images = torch.empty_like(images).index_copy_(0, order, torch.cat(changed))
        return cut_out(images, chosen[:, _EDGES])


def cut_out(images: Tensor, edges: Tensor) -> Tensor:
    """Fill a rectangle of each image with a dull brown.

    Args:
        images: uint8, [B, 3, H, W].
        edges: left, top, right, bottom; the latter two outside; [B, 4].
    """
    left, top, right, bottom = edges[:, :, None].unbind(1)
    x, y = (torch.arange(side, device=images.device) for side in (images.shape[3], images.shape[2]))
    columns, rows = (left <= x) & (x < right), (top <= y) & (y < bottom)
    inside = rows[:, :, None] & columns[:, None, :]
    channels = zip(images.unbind(1), _CUT_COLOUR, strict=True)
    return torch.stack([channel.masked_fill(inside, level) for channel, level in channels], dim=1)
