"""Masks of COCO files: decode polygons and run lengths to pixels, encode pixels as run lengths.

pycocotools is imported lazily: only the extra `detection` installs it.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from mdistiller.registry import UserError


def coco_masks() -> Any:
    """The module pycocotools.mask."""
    try:
        from pycocotools import mask
    except ImportError as error:
        raise UserError(
            "COCO's masks and average precision need the package pycocotools: "
            "pip install mdistiller[detection]"
        ) from error
    return mask


def polygon_parts(segmentation: Any) -> list[list[float]]:
    """The polygons [x, y, x, y, ...] with at least three points; others are left out."""
    if not isinstance(segmentation, Sequence):
        return []
    return [
        part
        for part in segmentation
        if isinstance(part, list)
        and len(part) >= 6
        and len(part) % 2 == 0
        and all(map(finite_number, part))
    ]


def finite_number(value: Any) -> bool:
    """Whether a JSON value is a number that a float can hold; NaN and Infinity are not."""
    return type(value) in (int, float) and abs(value) <= sys.float_info.max


def rle_counts(rle: Mapping[str, Any]) -> list[int] | None:
    """Decode run lengths (alternately outside and inside, column by column), also from strings.

    None if they do not add up to `size` or are invalid, which pycocotools does not check.
    """
    size, counts = rle.get("size"), rle.get("counts")
    if not isinstance(size, Sequence) or len(size) != 2 or not all(type(s) is int for s in size):
        return None
    if isinstance(counts, str):
        counts = _unpack(counts)
    if not isinstance(counts, list) or not all(type(c) is int and c >= 0 for c in counts):
        return None
    return counts if sum(counts) == math.prod(size) else None


def _unpack(text: str) -> list[int]:
    """Decode COCO's packed run lengths: five bits per character, deltas to the second-last one."""
    counts: list[int] = []
    value = shift = 0
    for character in text:
        code = ord(character) - 48
        value |= (code & 31) << shift
        shift += 5
        if not code & 32:  # the last character of a number
            value -= (code & 16) << (shift - 4)  # which was negative
            counts.append(value + (counts[-2] if len(counts) > 2 else 0))
            value = shift = 0
    return counts


def draw_mask(segmentation: Any, height: int, width: int, size: tuple[int, int]) -> np.ndarray:
    """An object's mask in the resized image: uint8 [H, W], 0 or 1.

    Polygons are drawn at the new size; run lengths are decoded, then resized to the nearest pixel.

    Args:
        height, width: of the original image.
        size: height and width of the mask.
    """
    if isinstance(segmentation, Mapping):
        counts = rle_counts(segmentation)
        assert counts is not None  # checked when the file was read
        runs = np.repeat(np.arange(len(counts), dtype=np.uint8) % 2, counts)
        return resize_nearest(runs.reshape(width, height).T, size)
    api = coco_masks()
    scale = np.array([size[1] / width, size[0] / height])
    parts = [(np.reshape(part, (-1, 2)) * scale).ravel().tolist() for part in segmentation]
    drawn: np.ndarray = api.decode(api.merge(api.frPyObjects(parts, *size)))
    return drawn


def resize_nearest(mask: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Resize a mask [H, W] by nearest neighbour, sampled at pixel centres."""
    rows, columns = (
        ((np.arange(new) + 0.5) * old / new).astype(int)
        for new, old in zip(size, mask.shape, strict=True)
    )
    resized: np.ndarray = mask[rows[:, None], columns]
    return resized


def encode_mask(mask: np.ndarray) -> dict[str, Any]:
    """Encode a mask, uint8 [H, W], as the compressed run lengths of COCO result files."""
    rle = coco_masks().encode(np.asfortranarray(mask, dtype=np.uint8))
    return {"size": [int(side) for side in rle["size"]], "counts": rle["counts"].decode("ascii")}
