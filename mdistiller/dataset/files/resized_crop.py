"""ImageNet's augmentation: a random resized crop and a flip of images of any size."""

from __future__ import annotations

from functools import cached_property
from typing import Any

from torch import Tensor

from mdistiller.dataset.memory.augment import AUGMENTS, Identity


@AUGMENTS.register("resized_crop_flip")
class ResizedCropFlip(Identity):
    """A random crop of the image resized to a square, then a horizontal flip, p = .5.

    torchvision's ``RandomResizedCrop`` with its defaults (8 to 100 % of the area, aspect ratio 3/4
    to 4/3) and ``RandomHorizontalFlip``. Evaluation uses the centre crop.
    """

    num_views = None

    def views(self, parameters: Tensor) -> Tensor:
        return parameters.new_full((len(parameters),), -1)

    @cached_property
    def _crop(self) -> Any:
        from torchvision.transforms import v2  # a slow import that images in memory do not need

        return v2.RandomResizedCrop((self.height, self.width), antialias=True)

    @cached_property
    def _flip(self) -> Any:
        from torchvision.transforms import v2

        return v2.RandomHorizontalFlip()

    def view(self, image: Tensor, interpolation: str = "") -> Tensor:
        """A crop of a uint8 image [3, any, any], drawn from torch's generator: [3, H, W]."""
        if interpolation:
            self._crop.interpolation = type(self._crop.interpolation)(interpolation)
        view: Tensor = self._flip(self._crop(image))
        return view
