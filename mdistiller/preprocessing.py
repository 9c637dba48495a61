"""How a network's images are prepared for evaluation: the one place that states it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

ImageSize = int | tuple[int, int]
"""Side of square images, or (height, width), in pixels; 0: not set."""
Statistics = tuple[tuple[float, ...], tuple[float, ...]]
"""Mean and standard deviation of each channel, for images in [0, 1]."""
RESIZE = ("crop", "stretch", "pad")
"""Ways to bring an image of any shape to a square, or another shape.

crop: resize the shorter side and cut the middle out. stretch: resize both sides. pad: resize the
longer side and fill the rest. What is shorter is told by comparison with the wanted shape.
"""
INTERPOLATION = ("nearest", "bilinear", "bicubic")


@dataclass(frozen=True)
class Preprocessing:
    """The preprocessing of a network's images in evaluation.

    A field that is empty or 0 is left to the data's.

    Attributes:
        mean, std: per channel, for images in [0, 1].
        image_size: side, or (height, width) of images that are not square.
        resize: one of RESIZE; "keep": images stay as they are, all of one size.
        crop_pct: image_size as a part of the side that an image is resized to. 0 for crop is 7/8
            with the resized side rounded to the nearest pixel (256 for 224); 0 for others is 1.
        interpolation: one of INTERPOLATION, always antialiased.
        recorded: whether a checkpoint states it. Then it also counts for square images that are
            smaller than `image_size`.
    """

    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()
    image_size: ImageSize = 0
    resize: str = ""
    crop_pct: float = 0.0
    interpolation: str = ""
    recorded: bool = False

    def resized_side(self, side: int) -> int:
        """The side in pixels before the middle `side` pixels are cut out; rounds as timm does."""
        if self.crop_pct:
            return math.floor(side / self.crop_pct + 1e-6)
        return round(side * 8 / 7) if self.resize == "crop" else side

    def resized_sides(self, size: tuple[int, int]) -> tuple[int, int]:
        """:meth:`resized_side` of height and width."""
        return self.resized_side(size[0]), self.resized_side(size[1])

    def describe(self) -> str:
        """Its fields in words."""
        parts = []
        if self.mean:
            numbers = (", ".join(f"{x:g}" for x in part) for part in (self.mean, self.std))
            parts.append("mean {} and std {}".format(*(f"[{text}]" for text in numbers)))
        if self.image_size:
            size = self.image_size
            shown = size if isinstance(size, int) else f"{size[1]}x{size[0]}"
            parts.append(f"{shown} pixels")
        if self.interpolation:
            parts.append(self.interpolation)
        if self.resize:
            ratio = f", ratio {self.crop_pct:.4g}" if self.crop_pct else ""
            parts.append(f"{self.resize}{ratio}")
        return "; ".join(parts)


def input_channels(net: Any) -> int:
    """Channels of the images that a network takes: 3, unless it was built for others."""
    channels: int = getattr(net, "input_channels", 3)
    return channels


def height_width(size: ImageSize) -> tuple[int, int]:
    """Height and width of images of a size."""
    return (size, size) if isinstance(size, int) else size


def read_image_size(value: Any) -> ImageSize:
    """An image size from a config or a file: a side, or [height, width]; 0 if not set.

    Raises:
        ValueError: it is neither.
    """
    sides = value if isinstance(value, (list, tuple)) else (value, value)
    numbers = all(type(side) is int for side in sides)
    pair = isinstance(value, (list, tuple))
    if len(sides) != 2 or not numbers or min(sides) < (1 if pair else 0):
        raise ValueError(f"a side in pixels or [height, width], got {value!r}")
    return sides[0] if sides[0] == sides[1] else (sides[0], sides[1])


NOTHING_STATED = Preprocessing()
"""All is left to the data's."""


def read_preprocessing(entry: Any) -> Preprocessing | None:
    """What a checkpoint records of its images' size, resizing and interpolation; None if nothing.

    Mean and std are left empty: the checkpoint's "norm" has them. So is a bilinear interpolation:
    the default is one, and pixels then are those of training to the bit.

    Args:
        entry: a mapping of the fields of :class:`Preprocessing`, or anything else.

    Raises:
        ValueError: a field has a value that cannot be meant.
    """
    if not isinstance(entry, Mapping):
        return None
    names = ("image_size", "resize", "crop_pct", "interpolation")
    given = {name: entry[name] for name in names if name in entry}
    size = read_image_size(given.pop("image_size", 0))
    kinds = {field.name: type(field.default) for field in fields(Preprocessing)}
    for name, value in given.items():
        wanted = (int, float) if kinds[name] is float else kinds[name]
        if not isinstance(value, wanted) or isinstance(value, bool):
            raise ValueError(f"{name} {value!r}")
    preprocessing = Preprocessing(image_size=size, **given, recorded=True)
    if (
        preprocessing.resize not in ("", "keep", *RESIZE)
        or preprocessing.interpolation not in ("", *INTERPOLATION)
        or not (preprocessing.crop_pct == 0 or 0.1 <= preprocessing.crop_pct <= 2)
    ):
        raise ValueError(preprocessing.describe())
    if preprocessing.interpolation == "bilinear":
        return replace(preprocessing, interpolation="")
    return preprocessing
