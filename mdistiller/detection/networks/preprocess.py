"""Preprocessing of a detector's images: channel order, normalisation, padding."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models.detection.image_list import ImageList

STRIDE = 32
"""Height and width of a batch are multiples of this."""


class InputFormat(NamedTuple):
    """Channel order and normalisation of a network's input.

    Attributes:
        order: of the channels, "rgb" or "bgr".
        mean, std: of each channel in that order, in grey levels of 0 to 255.
        weights: the format that the released weights for it were trained with.
    """

    order: str
    mean: Sequence[float]
    std: Sequence[float]
    weights: str


_MEAN, _STD = (123.675, 116.28, 103.53), (58.395, 57.12, 57.375)  # ImageNet's, red first
_ONE = (1.0, 1.0, 1.0)

FORMATS = {
    "rgb": InputFormat("rgb", _MEAN, _STD, "rgb"),
    "bgr": InputFormat("bgr", _MEAN[::-1], _ONE, "bgr"),
    # The fault of the original's ResNet-18 configs. Their images are RGB, but mean and std stay in
    # BGR order. The teacher's BGR mean is subtracted before its channels are flipped, so that its
    # blue is 20.1 grey levels too low and its red 20.1 too high.
    "upstream_r18": InputFormat("rgb", _MEAN[::-1], _STD[::-1], "rgb"),
    "upstream_r18_teacher": InputFormat("bgr", _MEAN, _ONE, "bgr"),
}
"""The values of INPUT: torchvision's format, detectron2's (MSRA's weights), and the original's
faulty ones of student and teacher."""


class Preprocess(nn.Module):
    """Normalises images and pads them to one size with zeros; nothing is resized here."""

    mean: Tensor
    std: Tensor

    def __init__(self, form: InputFormat):
        super().__init__()
        self.flip = form.order == "bgr"
        for name, values in (("mean", form.mean), ("std", form.std)):
            levels = torch.tensor([value / 255 for value in values]).view(3, 1, 1)
            self.register_buffer(name, levels, persistent=False)

    def forward(self, images: Sequence[Tensor]) -> ImageList:
        """A batch of `images`, each [3, H, W] in [0, 1], RGB; with their sizes."""
        sizes = [(image.shape[-2], image.shape[-1]) for image in images]
        height, width = (-(-max(side) // STRIDE) * STRIDE for side in zip(*sizes, strict=True))
        padded = [
            F.pad(self.normalize(image), (0, width - w, 0, height - h))
            for image, (h, w) in zip(images, sizes, strict=True)
        ]
        return ImageList(torch.stack(padded), sizes)

    def normalize(self, image: Tensor) -> Tensor:
        """An image [3, H, W] in [0, 1], RGB, as the network takes it."""
        ordered = image.flip(0) if self.flip else image
        return (ordered - self.mean) / self.std
