"""A split of a data set as a list of image files."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

if TYPE_CHECKING:
    from mdistiller.dataset.files.scaled_jpeg import EncodedImage


@dataclass
class FileSet:
    """A split as image files that are read on demand.

    Attributes:
        folder: root of the files.
        names: paths below it, as an array of bytes, whose memory worker processes share.
        targets: class indices, int64, [N].
        classes: class names.
        upright: rotate images by their EXIF orientation.
        scale_16_bit: scale grey images of 16 bits to 8.
        jpeg_scaling: DATASET.JPEG_SCALING, see :class:`EncodedImage`.
        channels: of the images, DATASET.CHANNELS.
        left_out: what the split leaves out of the folder, and why.
    """

    folder: Path
    names: np.ndarray
    targets: Tensor
    classes: list[str]
    upright: bool = True
    scale_16_bit: bool = False
    jpeg_scaling: str = "none"
    channels: int = 3
    left_out: tuple[str, ...] = ()

    @classmethod
    def of(
        cls, folder: Path, names: Iterable[str], targets: Sequence[int], classes: Sequence[str]
    ) -> FileSet:
        """The files `names` below `folder`."""
        encoded = np.array([os.fsencode(name) for name in names], dtype=np.bytes_)
        return cls(folder, encoded, torch.tensor(targets), list(classes))

    def __len__(self) -> int:
        return len(self.names)

    def path(self, index: int) -> Path:
        """The file at a position."""
        return self.folder / os.fsdecode(self.names[index])

    def image(self, index: int) -> Tensor:
        """The image at a position: uint8, [C, H, W], of any size."""
        from mdistiller.dataset.files.images import read_image

        return read_image(self.path(index), self.upright, self.scale_16_bit, self.channels)

    def encoded(self, index: int) -> EncodedImage:
        """The image at a position, not decoded yet."""
        from mdistiller.dataset.files.scaled_jpeg import read_encoded

        settings = self.upright, self.scale_16_bit, self.jpeg_scaling, self.channels
        return read_encoded(self.path(index), *settings)

    def select(self, indices: Tensor) -> FileSet:
        """The files at `indices` (int64, [M]), as a new set."""
        return replace(self, names=self.names[indices.numpy()], targets=self.targets[indices])


def image_name(images: Any, index: int) -> str:
    """Name of an image in errors: its file, or its number where the set is not files."""
    return str(images.path(index)) if isinstance(images, FileSet) else f"image {index}"
