"""The fourteen operations of the strong view, on batches whose images have a magnitude each.

They are those of FixMatch (Sohn et al., 2020, arXiv 2001.07685), with its ranges. Results are
Pillow's to the pixel, from integer arithmetic, but for AutoContrast: it is torchvision's, within
one level of Pillow's. Magnitudes are multiples of 1/4096.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.transforms.v2 import functional as transforms

from mdistiller.dataset.memory.affine import add_border, fixed_point, resample, rotation

_BITS = 12
UNIT = 1 << _BITS


def autocontrast(images: Tensor, terms: Tensor) -> Tensor:
    """Stretch every channel to 0 .. 255."""
    return transforms.autocontrast(images)


def equalize(images: Tensor, terms: Tensor) -> Tensor:
    """Flatten the histogram of every channel."""
    return transforms.equalize(images)


def identity(images: Tensor, terms: Tensor) -> Tensor:
    """The images as they are."""
    return images


def brightness(images: Tensor, terms: Tensor) -> Tensor:
    """Towards black; 1 leaves the image."""
    return _blend(torch.zeros_like(images), images, terms)


def color(images: Tensor, terms: Tensor) -> Tensor:
    """Towards grey; 1 leaves the image."""
    return _blend(_grey(images), images, terms)


def contrast(images: Tensor, terms: Tensor) -> Tensor:
    """Towards the mean grey; 1 leaves the image."""
    grey = _grey(images)
    pixels = grey[0].numel()
    total = grey.sum(dim=(1, 2, 3), keepdim=True, dtype=torch.int64)
    return _blend(((2 * total + pixels) // (2 * pixels)).int(), images, terms)


def sharpness(images: Tensor, terms: Tensor) -> Tensor:
    """Towards a smoothed image, whose outermost pixels stay; 1 leaves the image."""
    pixels = images.int()
    rows = pixels[:, :, :-2] + pixels[:, :, 1:-1] + pixels[:, :, 2:]
    around = rows[..., :-2] + rows[..., 1:-1] + rows[..., 2:]
    smooth = pixels.clone()
    inner = smooth[:, :, 1:-1, 1:-1]
    inner.copy_((2 * (around + 4 * inner) + 13) // 26)  # weights 1 around 5, in thirteenths
    return _blend(smooth, images, terms)


def posterize(images: Tensor, terms: Tensor) -> Tensor:
    """Keep the highest 4 to 7 bits."""
    dropped = (8 - terms[:, 0]).int()[:, None, None, None]
    return ((images.int() >> dropped) << dropped).to(torch.uint8)


def solarize(images: Tensor, terms: Tensor) -> Tensor:
    """Invert the levels from a threshold on."""
    threshold = terms[:, 0].short()[:, None, None, None]
    return torch.where(images.short() < threshold, images, 255 - images)


def affine(images: Tensor, terms: Tensor) -> Tensor:
    """Pixels from elsewhere, by a matrix."""
    return resample(add_border(images), terms)


def _grey(images: Tensor) -> Tensor:
    """Luma of ITU-R 601-2, [B, 1, H, W]."""
    red, green, blue = images.int().unbind(1)
    return ((19595 * red + 38470 * green + 7471 * blue + 0x8000) >> 16)[:, None]


def _blend(other: Tensor, images: Tensor, terms: Tensor) -> Tensor:
    """`other` and `images` in the parts 1 - factor and factor, rounded down."""
    other, factor = other.int(), terms[:, 0].int()[:, None, None, None]
    mixture = other * UNIT + factor * (images.int() - other)
    return (mixture >> _BITS).to(torch.uint8)


def _whole(magnitude: Tensor, height: int, width: int) -> Tensor:
    """The magnitude, rounded down, as the first of six terms."""
    return F.pad(magnitude.long()[:, None], (0, 5))


def _factor(magnitude: Tensor, height: int, width: int) -> Tensor:
    return _whole(magnitude * UNIT, height, width)


def _turn(magnitude: Tensor, height: int, width: int) -> Tensor:
    return fixed_point(rotation(magnitude, height, width))


def _entry(magnitude: Tensor, height: int, width: int, *, place: int) -> Tensor:
    """The affine map whose matrix has the magnitude in one place; shifts are parts of a side."""
    side = {2: width, 5: height}.get(place, 1)
    matrix = magnitude.new_tensor([1, 0, 0, 0, 1, 0]).repeat(len(magnitude), 1)
    matrix[:, place] = magnitude * side
    return fixed_point(matrix)


class Operation(NamedTuple):
    """One of the fourteen.

    Attributes:
        kernel: images (uint8, [b, 3, H, W]) and their terms ([b, 6]) -> images.
        low, high: the magnitude's range.
        encode: magnitudes (float64, [n]) and an image's height and width -> terms (int64, [n, 6]).
    """

    kernel: Callable[[Tensor, Tensor], Tensor]
    low: float = 0
    high: float = 0
    encode: Callable[[Tensor, int, int], Tensor] = _whole


OPERATIONS = {
    "AutoContrast": Operation(autocontrast),
    "Brightness": Operation(brightness, 0.05, 0.95, _factor),
    "Color": Operation(color, 0.05, 0.95, _factor),
    "Contrast": Operation(contrast, 0.05, 0.95, _factor),
    "Equalize": Operation(equalize),
    "Identity": Operation(identity),
    "Posterize": Operation(posterize, 4, 8),  # rounded down: 4 to 7 bits
    "Rotate": Operation(affine, -30, 30, _turn),
    "Sharpness": Operation(sharpness, 0.05, 0.95, _factor),
    "ShearX": Operation(affine, -0.3, 0.3, partial(_entry, place=1)),
    "ShearY": Operation(affine, -0.3, 0.3, partial(_entry, place=3)),
    "Solarize": Operation(solarize, 1, 257),  # rounded down: 1 to 256
    "TranslateX": Operation(affine, -0.3, 0.3, partial(_entry, place=2)),
    "TranslateY": Operation(affine, -0.3, 0.3, partial(_entry, place=5)),
}
