"""What DETECTION.DATA.BAD_ANNOTATIONS fix mends beside boxes: ids, sizes, file names, areas."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from mdistiller.dataset.files.images import FORMATS, UnreadableError

SLACK = 1.0  # pixels that a box may stick out, by rounding
_ORIENTATION = 0x0112  # EXIF tag; 5 to 8 exchange height and width
LARGEST_SIDE = 2**31 - 1


@dataclass(frozen=True)
class ImageFiles:
    """The image files beside an annotation file.

    Args:
        folder: of the images.
        upright: whether they are turned as their EXIF orientation says.
        skip: a file that cannot be read is left out later, so any size does for it.
    """

    folder: Path
    upright: bool = True
    skip: bool = False

    def file_name(self, name: str) -> str:
        """`name`, with / for the separators of Windows where only that leads to a file."""
        mended = name.replace("\\", "/")
        if mended == name or (self.folder / name).is_file():
            return name
        return mended if (self.folder / mended).is_file() else name

    def size(self, name: str) -> tuple[int, int]:
        """Height and width of an image as it is shown, without decoding it.

        Raises:
            UnreadableError: the file is missing or no image.
        """
        try:
            with Image.open(self.folder / name, formats=FORMATS) as file:
                width, height = file.size
                turned = self.upright and file.getexif().get(_ORIENTATION) in (5, 6, 7, 8)
        except Exception as error:  # Pillow's readers raise many kinds
            if self.skip:
                return LARGEST_SIDE, LARGEST_SIDE
            raise UnreadableError(f"{self.folder / name} cannot be read as an image") from error
        return (width, height) if turned else (height, width)


def number_ids(written: Sequence[int | str]) -> dict[int | str, int]:
    """A whole number for each id of a list, and for each other way to write that id.

    Texts of digits are the numbers that they spell. If one is not (`"img_7"`), all ids are numbered
    from 1, numbers before texts, in their order: the same for two files with the same ids.
    """
    values = {one: whole_number(one) for one in written}
    if None in values.values():
        ordered = sorted(values, key=lambda one: (isinstance(one, str), one))
        numbers = {one: position for position, one in enumerate(ordered, 1)}
    else:
        numbers = {one: value for one, value in values.items() if value is not None}
    spelled: dict[int | str, int] = {}
    for one, value in values.items():
        if value is not None:
            spelled |= {value: numbers[one], str(value): numbers[one]}
    return {**spelled, **numbers}


def whole_number(written: int | str) -> int | None:
    """The number that an id is or spells."""
    if isinstance(written, int):
        return written
    return int(written) if re.fullmatch(r"-?[0-9]{1,18}", written) else None


def area_fault(area: Any, height: int, width: int) -> str:
    """What is wrong with an object's area; nothing if it is a number that the image can hold."""
    most = (height + 2 * SLACK) * (width + 2 * SLACK)
    if type(area) in (int, float) and 0 <= area <= most:
        return ""
    return f"not a number from 0 to the image's {height * width} pixels"
