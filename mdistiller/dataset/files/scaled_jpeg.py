"""Image files that are decoded when their use is known, so that large JPEGs are decoded in part.

A JPEG decoder can give 1/2, 1/4 or 1/8 of each side from a part of every 8 x 8 block: less
arithmetic than all pixels, which a resize would throw away. Pillow's ``draft`` does so. What is
left of the time is reading the Huffman codes. Imports torchvision, which is slow.
"""

from __future__ import annotations

import contextlib
import io
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from PIL import Image, ImageOps
from torch import Tensor

from mdistiller.dataset.files.images import (
    FORMATS,
    MODES,
    ORIENTATION,
    check_pixels,
    crop_or_pad,
    decode,
    jpeg_size,
    pixels_of,
    read_bytes,
    resize_to_size,
    resized_shape,
)
from mdistiller.preprocessing import Preprocessing

Box = tuple[int, int, int, int]  # top, left, height, width

MIN_PIXELS = 1_000_000
"""Smaller images are decoded in full, which takes 5 ms at most."""
WHOLE_MARGIN = 2
"""Whole images are decoded to at least this many times their final size: pixels differ little."""
_PADDED = {2: (1, 0), 3: (1, 1), 4: (0, 1), 6: (1, 0), 7: (1, 1), 8: (0, 1)}
"""EXIF orientations that bring the padding of the last blocks to the left and to the top."""


@dataclass
class EncodedImage:
    """The bytes of an image file.

    Attributes:
        data: uint8, [bytes].
        name: of the file, for errors.
        upright, scale_16_bit: see :func:`mdistiller.dataset.files.images.decode`.
        scaling: DATASET.JPEG_SCALING: "none", "train" or "all".
        channels: DATASET.CHANNELS.
    """

    data: Tensor
    name: Path | str
    upright: bool = False
    scale_16_bit: bool = False
    scaling: str = "none"
    channels: int = 3

    def pixels(self) -> Tensor:
        """The whole image: uint8, [channels, H, W]."""
        return decode(self.data, self.name, self.upright, self.scale_16_bit, self.channels)

    def resized(self, size: tuple[int, int], how: Preprocessing) -> Tensor:
        """The image as :func:`resize_to_size` makes it; scaled only with "all"."""
        whole = self.large_size(*size, WHOLE_MARGIN) if self.scaling == "all" else None
        if whole is not None:
            shape = resized_shape(*whole, size, how)
            image = self.region((0, 0, *whole), *shape, how.interpolation, WHOLE_MARGIN)
            if image is not None:
                return crop_or_pad(image, size)
        return resize_to_size(self.pixels(), size, how)

    def large_size(self, height: int, width: int, margin: int) -> tuple[int, int] | None:
        """(H, W) of a large JPEG with at least 2 `margin` times the needed size; else None."""
        stored = jpeg_size(self.data)
        if stored is None or min(stored) < 2 * margin * min(height, width):
            return None
        wide, high = stored
        check_pixels(wide, high, self.name)
        if wide * high < MIN_PIXELS:
            return None
        if self._orientation is None:
            return None
        return (wide, high) if self._orientation >= 5 else (high, wide)

    def region(
        self, box: Box, height: int, width: int, interpolation: str, margin: int
    ) -> Tensor | None:
        """A part of the image at another size, from pixels of the smallest sufficient scale.

        Args:
            box: in pixels of the whole image; its size is that of :meth:`large_size`.
            height, width: of the result.
            interpolation: as of Pillow, "" for bilinear.
            margin: the decoded part has at least this many times `height` and `width`.

        Returns:
            uint8, [C, height, width]; None where all pixels are needed, or the file is broken.
        """
        ratio = min(box[2] // (margin * height), box[3] // (margin * width))
        scale = next((scale for scale in (8, 4, 2) if scale <= ratio), 1)
        if scale == 1:
            return None
        method = Image.Resampling[(interpolation or "bilinear").upper()]
        with contextlib.suppress(Exception):  # Pillow raises many kinds; `pixels` reports them
            image, left, top = self._reduced(scale)
            y, x = top + box[0] / scale, left + box[1] / scale
            exact = (x, y, x + box[3] / scale, y + box[2] / scale)
            return pixels_of(image.resize((width, height), method, box=exact))
        return None

    @cached_property
    def _orientation(self) -> int | None:
        """The EXIF orientation to apply; None where EXIF is damaged."""
        if not self.upright:
            return 1
        with contextlib.suppress(Exception), self._open() as file:
            return int(file.getexif().get(ORIENTATION, 1))
        return None

    def _open(self) -> Image.Image:
        return Image.open(io.BytesIO(self.data.numpy().data), formats=FORMATS)

    def _reduced(self, scale: int) -> tuple[Image.Image, float, float]:
        """The image at 1 / `scale`, and where in it the first column and row of pixels begin."""
        with self._open() as file:
            wide, high = file.size
            file.draft("RGB", (wide // scale, high // scale))
            if file.size != (-(-wide // scale), -(-high // scale)):
                raise ValueError("the decoder cannot scale this file")
            missing = file.size[0] - wide / scale, file.size[1] - high / scale
            image = ImageOps.exif_transpose(file) if self.upright else file
            image = image.convert(MODES[self.channels])
        orientation = self._orientation or 1
        if orientation >= 5:
            missing = missing[::-1]
        left, top = _PADDED.get(orientation, (0, 0))
        return image, left * missing[0], top * missing[1]


def read_encoded(
    path: Path,
    upright: bool = False,
    scale_16_bit: bool = False,
    scaling: str = "none",
    channels: int = 3,
) -> EncodedImage:
    """The image file at `path`, not decoded yet.

    Raises:
        UnreadableError: it cannot be read.
    """
    return EncodedImage(read_bytes(path), path, upright, scale_16_bit, scaling, channels)
