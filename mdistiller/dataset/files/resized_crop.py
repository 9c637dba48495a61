"""ImageNet's augmentation: a random resized crop and a flip of images of any size."""

from __future__ import annotations

from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from mdistiller.dataset.memory.augment import AUGMENTS, Identity

if TYPE_CHECKING:
    from mdistiller.dataset.files.scaled_jpeg import EncodedImage

CROP_MARGIN = 1
"""A crop is decoded to at least this many times its final size."""


@AUGMENTS.register("resized_crop_flip")
class ResizedCropFlip(Identity):
    """A random crop of the image resized to its size, then a horizontal flip, p = .5.

    torchvision's ``RandomResizedCrop`` with its defaults (8 to 100 % of the area, aspect ratio 3/4
    to 4/3, times that of the wanted shape) and ``RandomHorizontalFlip``. Evaluation uses the centre
    crop.
    """

    num_views = None

    def views(self, parameters: Tensor) -> Tensor:
        return parameters.new_full((len(parameters),), -1)

    @cached_property
    def _crop(self) -> Any:
        from torchvision.transforms import v2  # a slow import that images in memory do not need

        stretch = self.width / self.height  # of the shape that crops have
        ratio = (3 / 4 * stretch, 4 / 3 * stretch)
        return v2.RandomResizedCrop((self.height, self.width), ratio=ratio, antialias=True)

    @cached_property
    def _flip(self) -> Any:
        from torchvision.transforms import v2

        return v2.RandomHorizontalFlip()

    def view(self, image: Tensor | EncodedImage, interpolation: str = "") -> Tensor:
        """A crop of a uint8 image [3, any, any], drawn from torch's generator: [3, H, W].

        The crop of a file is the same; with DATASET.JPEG_SCALING its pixels come from the smallest
        sufficient scale of a JPEG.
        """
        if interpolation:
            self._crop.interpolation = type(self._crop.interpolation)(interpolation)
        if isinstance(image, Tensor):
            part: Tensor = self._crop(image)
        else:
            part = self._crop_encoded(image, interpolation)
        view: Tensor = self._flip(part)
        return view

    def _crop_encoded(self, image: EncodedImage, interpolation: str) -> Tensor:
        size = None
        if image.scaling != "none":
            size = image.large_size(self.height, self.width, CROP_MARGIN)
        if size is None:
            whole: Tensor = self._crop(image.pixels())
            return whole
        place = self._crop.make_params([torch.empty(image.channels, *size, device="meta")])
        box = place["top"], place["left"], place["height"], place["width"]
        part = image.region(box, self.height, self.width, interpolation, CROP_MARGIN)
        return self._crop.transform(image.pixels(), place) if part is None else part
