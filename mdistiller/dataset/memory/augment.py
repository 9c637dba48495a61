"""Augmentation of whole batches of uint8 images, each image with parameters drawn beforehand.

An augmentation draws the parameters of all N images of an epoch at once, on the CPU, and applies
those of a batch on the device. So the view of an image is a function of (seed, epoch, index): it
depends neither on the batch nor on the device nor on the number of processes. Applying it is
integer arithmetic, hence the same bits everywhere.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from mdistiller.dataset.memory.affine import BORDER, columns, fixed_point, resample, rotation
from mdistiller.registry import Registry

AUGMENTS = Registry("augmentation (DATASET.AUGMENT)")


@AUGMENTS.register("none")
class Identity:
    """No augmentation, and the interface of the others.

    Args:
        size: (height, width) of the images, in pixels.

    Attributes:
        pad: zeros that the store wants around every image, on each side.
        num_views: how many different views an image has; None where they cannot be enumerated.
    """

    pad = 0
    num_views: int | None = 1

    def __init__(self, size: tuple[int, int]):
        self.height, self.width = size

    def store(self, images: Tensor) -> Tensor:
        """The images as `apply` wants them, [N, 3, H + 2 pad, W + 2 pad]."""
        return F.pad(images, (self.pad,) * 4) if self.pad else images

    def draw(self, num: int, generator: torch.Generator) -> Tensor:
        """Parameters of `num` images: int64, [num, P], on the CPU."""
        return torch.zeros(num, 0, dtype=torch.int64)

    def views(self, parameters: Tensor) -> Tensor:
        """Code of each image's view in 0 .. num_views - 1, or -1: int64, [N]."""
        return parameters.new_zeros(len(parameters))

    def apply(self, store: Tensor, parameters: Tensor, index: Tensor) -> Tensor:
        """Views of the images at `index`.

        Args:
            store: what `store` made of all images, uint8.
            parameters: what `draw` drew for all images, int64, [N, P].
            index: which images, int64, [B].

        Returns:
            uint8, [B, 3, H, W].
        """
        return store[index]


@AUGMENTS.register("crop")
class Crop(Identity):
    """Shift by up to 1/16 of the shorter side (2 of 32 pixels) in steps of a pixel, zeros outside.

    For images that must not be mirrored, such as digits. 25 views at 32 x 32.
    """

    part_padded = 16

    def __init__(self, size: tuple[int, int]):
        super().__init__(size)
        self.pad = max(1, min(size) // self.part_padded)
        self.shifts = 2 * self.pad + 1
        self.num_views = self.shifts**2

    def draw(self, num: int, generator: torch.Generator) -> Tensor:
        """Corner (row, column) of the window in the padded image, [num, 2]."""
        return torch.randint(self.shifts, (num, 2), generator=generator)

    def views(self, parameters: Tensor) -> Tensor:
        return parameters[:, 0] * self.shifts + parameters[:, 1]

    def apply(self, store: Tensor, parameters: Tensor, index: Tensor) -> Tensor:
        windows = store.unfold(2, self.height, 1).unfold(3, self.width, 1)  # a view, no copy
        row, column = parameters[index, :2].unbind(1)
        return windows[index, :, row, column]


@AUGMENTS.register("crop_flip")
class CropFlip(Crop):
    """Random crop of the zero-padded image (4 of 32 pixels, 1/8 of the side), then a mirror.

    torchvision's ``RandomCrop(32, padding=4)`` and ``RandomHorizontalFlip``: 9 x 9 x 2 = 162 views
    of a CIFAR image.
    """

    part_padded = 8

    def __init__(self, size: tuple[int, int]):
        super().__init__(size)
        self.num_views = 2 * self.shifts**2

    def draw(self, num: int, generator: torch.Generator) -> Tensor:
        """Row, column and mirror (0 or 1) of the window, [num, 3]."""
        corner = super().draw(num, generator)
        return torch.cat([corner, _draw_flips(num, generator)], dim=1)

    def views(self, parameters: Tensor) -> Tensor:
        return 2 * super().views(parameters) + parameters[:, 2]

    def apply(self, store: Tensor, parameters: Tensor, index: Tensor) -> Tensor:
        crops = super().apply(store, parameters, index)
        column = columns(self.width, parameters[index, 2, None, None])
        return crops.gather(3, column[:, None].expand_as(crops))


@AUGMENTS.register("rotate_flip")
class RotateFlip(Identity):
    """Rotation by a uniform angle in +-20 degrees, then a mirror, p = .5; no crop.

    torchvision's ``RandomRotation(20)`` (nearest pixel, zeros outside) and
    ``RandomHorizontalFlip``, to the pixel as Pillow does them.
    """

    degrees = 20.0
    pad = BORDER
    num_views = None

    def draw(self, num: int, generator: torch.Generator) -> Tensor:
        """What `inverse_map` gives for random angles, and mirror (0 or 1), [num, 7]."""
        angle = (2 * torch.rand(num, generator=generator) - 1) * self.degrees
        flips = _draw_flips(num, generator)
        return torch.cat([self.inverse_map(angle), flips], dim=1)

    def inverse_map(self, angle: Tensor) -> Tensor:
        """Where the pixels of images turned by `angle` degrees, [N], come from: int64, [N, 6]."""
        return fixed_point(rotation(angle, self.height, self.width))

    def views(self, parameters: Tensor) -> Tensor:
        return parameters.new_full((len(parameters),), -1)

    def apply(self, store: Tensor, parameters: Tensor, index: Tensor) -> Tensor:
        chosen = parameters[index]
        return resample(store[index], chosen[:, :6], flip=chosen[:, 6])


def _draw_flips(num: int, generator: torch.Generator) -> Tensor:
    """1 with probability 1/2, else 0: int64, [num, 1]."""
    return torch.randint(2, (num, 1), generator=generator)
