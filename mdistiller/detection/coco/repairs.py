"""Repairs by DETECTION.DATA.BAD_ANNOTATIONS fix: ids, image sizes, file names, areas."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mdistiller.dataset.files.images import UnreadableError, header_size

SLACK = 1.0  # pixels that a box may stick out, by rounding
LARGEST_SIDE = 2**31 - 1


@dataclass(frozen=True)
class ImageFiles:
    """The image files of an annotation file.

    Args:
        folder: of the images.
        upright: whether their EXIF orientation is applied.
        skip: unreadable files are left out later, so they get any size.
    """

    folder: Path
    upright: bool = True
    skip: bool = False

    def file_name(self, name: str) -> str:
        """`name`, with Windows separators replaced by / if only that leads to a file."""
        mended = name.replace("\\", "/")
        if mended == name or (self.folder / name).is_file():
            return name
        return mended if (self.folder / mended).is_file() else name

    def size(self, name: str) -> tuple[int, int]:
        """Height and width of an image as it is shown, without decoding it.

        Raises:
            UnreadableError: the file is missing or not an image.
        """
        size = header_size(self.folder / name, self.upright)
        if size is None and not self.skip:
            raise UnreadableError(f"{self.folder / name} cannot be read as an image")
        return size or (LARGEST_SIDE, LARGEST_SIDE)


def number_ids(written: Sequence[int | str]) -> dict[int | str, int]:
    """An integer for each id of a list, and for each other spelling of that id.

    Strings of digits become their numbers. If there is another string (`"img_7"`), all ids are
    numbered from 1 in sorted order, numbers before strings: the same for files with the same ids.
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
    """The integer that an id is or spells."""
    if isinstance(written, int):
        return written
    return int(written) if re.fullmatch(r"-?[0-9]{1,18}", written) else None


def area_fault(area: Any, height: int, width: int) -> str:
    """The fault of an object's area; "" if it is a number that fits the image."""
    most = (height + 2 * SLACK) * (width + 2 * SLACK)
    if type(area) in (int, float) and 0 <= area <= most:
        return ""
    return f"not a number from 0 to the image's {height * width} pixels"
