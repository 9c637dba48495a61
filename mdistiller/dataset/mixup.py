"""Random erasing, mixup and CutMix of whole batches of normalised images."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

Batch = tuple[Tensor, Tensor, Tensor]
Box = tuple[int, int, int, int]  # top, left, bottom, right; the latter two outside

_AREA, _RATIO = (0.02, 0.33), (0.3, 3.3)  # of a blanked rectangle: part of the image, height/width
_TRIES = 10  # attempts at a rectangle that fits into the image
_ERASING, _MIXING = 1, 2  # random streams, apart from the loader's


def mixup(images: Tensor, labels: Tensor, weight: float) -> tuple[Tensor, Tensor]:
    """Every image blended with the one before it in the batch, the labels likewise.

    Zhang et al., "mixup: Beyond Empirical Risk Minimization", ICLR 2018, arXiv 1710.09412.

    Args:
        images: [B, 3, H, W].
        labels: class probabilities, [B, C].
        weight: of the image itself.
    """
    return _blend(images, weight), _blend(labels, weight)


def cutmix(images: Tensor, labels: Tensor, box: Box) -> tuple[Tensor, Tensor]:
    """A patch of every image replaced by that of the one before, the labels mixed by area.

    Yun et al., "CutMix: Regularization Strategy to Train Strong Classifiers with Localizable
    Features", ICCV 2019, arXiv 1905.04899.
    """
    top, left, bottom, right = box
    patched = images.clone()
    patched[:, :, top:bottom, left:right] = images.roll(1, 0)[:, :, top:bottom, left:right]
    area = (bottom - top) * (right - left) / (images.shape[2] * images.shape[3])
    return patched, _blend(labels, 1.0 - area)


def _blend(values: Tensor, weight: float) -> Tensor:
    return torch.lerp(values.roll(1, 0), values, weight)


def erase(images: Tensor, boxes: Tensor) -> Tensor:
    """Images [B, 3, H, W] with zeros, the mean colour, in a box of each; boxes as rows [B, 4].

    Zhong et al., "Random Erasing Data Augmentation", AAAI 2020, arXiv 1708.04896.
    """
    top, left, bottom, right = boxes[:, :, None].unbind(1)
    rows = torch.arange(images.shape[2], device=images.device)
    columns = torch.arange(images.shape[3], device=images.device)
    inside = ((top <= rows) & (rows < bottom))[:, :, None]
    inside = inside & ((left <= columns) & (columns < right))[:, None, :]
    return images.masked_fill(inside[:, None], 0.0)


class BatchAugment:
    """Random erasing, mixup and CutMix of a loader's batches, on their device.

    Rectangles follow from (seed, epoch, index); the weights and patches of mixing from (seed,
    epoch, step). Images are mixed within a process's batch, whose order is random, each with the
    one before it.

    Args:
        size: (height, width) of the images.
        num_classes: C; where images are mixed, targets become probabilities, float32 [B, C].
        erasing: probability for each image.
        mixup, cutmix: alpha of the Beta distributions, 0 for none.
        teacher_view: whether the images get an attribute of that name, as they are without erasing
            and RandAugment; loaders that apply the latter give both, [B, 2, 3, H, W].
    """

    def __init__(
        self,
        size: tuple[int, int],
        num_classes: int,
        *,
        erasing: float = 0.0,
        mixup: float = 0.0,
        cutmix: float = 0.0,
        teacher_view: bool = False,
    ):
        self.height, self.width = size
        self.num_classes, self.erasing, self.teacher_view = num_classes, erasing, teacher_view
        self.alphas = {"mixup": mixup, "cutmix": cutmix}
        self.kinds = [kind for kind, alpha in self.alphas.items() if alpha]

    def __call__(
        self, batches: Iterator[Batch], num_data: int, seed: int, epoch: int, start: int = 0
    ) -> Iterator[Batch]:
        """The augmented batches of an epoch; its first `start` batches were skipped."""
        erasing, mixing = (
            np.random.default_rng([seed % 2**64, epoch, stream]) for stream in (_ERASING, _MIXING)
        )
        boxes: Tensor | None = None
        for _ in range(start if self.kinds else 0):
            self.draw_mix(mixing)
        for images, targets, index in batches:
            weak = images
            if images.dim() == 5:
                images, weak = (view.contiguous() for view in images.unbind(1))
            if self.erasing:
                if boxes is None:
                    boxes = self.draw_boxes(num_data, erasing).to(images.device)
                images = erase(images, boxes[index])
            if self.kinds:
                labels = F.one_hot(targets, self.num_classes).float()
                images, targets = self.mix(images, labels, mixing)
            if self.teacher_view:
                images.teacher_view = weak  # type: ignore[attr-defined]
            yield images, targets, index

    def mix(
        self, images: Tensor, labels: Tensor, rng: np.random.Generator
    ) -> tuple[Tensor, Tensor]:
        """Mixup or CutMix as drawn from `rng`."""
        drawn = self.draw_mix(rng)
        if isinstance(drawn, tuple):
            return cutmix(images, labels, drawn)
        return mixup(images, labels, drawn)

    def draw_mix(self, rng: np.random.Generator) -> float | Box:
        """The weight of a mixup or the patch of a CutMix, for one batch."""
        kind = self.kinds[rng.integers(len(self.kinds))]
        weight = float(rng.beta(self.alphas[kind], self.alphas[kind]))
        return weight if kind == "mixup" else self.draw_patch(weight, rng)

    def draw_patch(self, weight: float, rng: np.random.Generator) -> Box:
        """A patch of `1 - weight` of the image around a uniform centre, clipped at the edges."""
        y, x = rng.integers(self.height), rng.integers(self.width)
        half = 0.5 * math.sqrt(1.0 - weight)
        down, across = int(half * self.height), int(half * self.width)
        return (
            max(int(y) - down, 0),
            max(int(x) - across, 0),
            min(int(y) + down, self.height),
            min(int(x) + across, self.width),
        )

    def draw_boxes(self, num: int, rng: np.random.Generator) -> Tensor:
        """Boxes to erase in each of `num` images, rows (top, left, bottom, right): int32, [num, 4].

        Zeros where nothing is erased: by chance, or because no rectangle fitted.
        """
        sides = np.zeros((num, 2), dtype=np.int32)
        todo = np.flatnonzero(rng.random(num) < self.erasing)
        for _ in range(_TRIES):
            area = rng.uniform(*_AREA, len(todo)) * self.height * self.width
            ratio = np.exp(rng.uniform(math.log(_RATIO[0]), math.log(_RATIO[1]), len(todo)))
            drawn = np.stack([np.sqrt(area * ratio), np.sqrt(area / ratio)], axis=1).round()
            fits = (drawn < (self.height, self.width)).all(axis=1)
            sides[todo[fits]] = drawn[fits]
            todo = todo[~fits]
        room = np.array([self.height, self.width]) - sides
        corner = (rng.random((num, 2)) * (room + 1)).astype(np.int32)
        return torch.from_numpy(np.concatenate([corner, corner + sides], axis=1))
