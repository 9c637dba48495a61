"""Masks of COCO files: polygons and run lengths to pixels, and pixels to run lengths.

Brings pycocotools, which an installation without the extra `detection` does not have: imported
where it is needed.
"""

from __future__ import annotations

import math
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
        and all(type(v) in (int, float) and math.isfinite(v) for v in part)
    ]


def rle_size(rle: Mapping[str, Any]) -> tuple[int, int] | None:
    """Height and width of run lengths that fit them; None if something is wrong with them.

    What a compressed string spells is not looked at.
    """
    size, counts = rle.get("size"), rle.get("counts")
    if not isinstance(size, Sequence) or len(size) != 2 or not all(type(s) is int for s in size):
        return None
    if isinstance(counts, list):
        right = all(type(c) is int and c >= 0 for c in counts) and sum(counts) == math.prod(size)
    else:
        right = isinstance(counts, str) and bool(counts)
    return (size[0], size[1]) if right else None


def draw_mask(segmentation: Any, height: int, width: int, size: tuple[int, int]) -> np.ndarray:
    """An object's pixels after its image was resized: uint8 [H, W], 0 or 1.

    Polygons are drawn at the new size; run lengths are decoded, then resized to the nearest pixel.

    Args:
        height, width: of the image that the segmentation is of.
        size: height and width of the mask.
    """
    api = coco_masks()
    if isinstance(segmentation, Mapping):
        return resize_nearest(_decode(api, segmentation), size)
    scale = np.array([size[1] / width, size[0] / height])
    parts = [(np.reshape(part, (-1, 2)) * scale).ravel().tolist() for part in segmentation]
    drawn: np.ndarray = api.decode(api.merge(api.frPyObjects(parts, *size)))
    return drawn


def _decode(api: Any, rle: Mapping[str, Any]) -> np.ndarray:
    packed = api.frPyObjects(rle, *rle["size"]) if isinstance(rle["counts"], list) else rle
    mask: np.ndarray = api.decode(packed)
    return mask


def resize_nearest(mask: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """A mask [H, W] at another size, each pixel that under its centre."""
    rows, columns = (
        ((np.arange(new) + 0.5) * old / new).astype(int)
        for new, old in zip(size, mask.shape, strict=True)
    )
    resized: np.ndarray = mask[rows[:, None], columns]
    return resized


def encode_mask(mask: np.ndarray) -> dict[str, Any]:
    """Compressed run lengths of a mask, uint8 [H, W], as result files have them."""
    rle = coco_masks().encode(np.asfortranarray(mask, dtype=np.uint8))
    return {"size": [int(side) for side in rle["size"]], "counts": rle["counts"].decode("ascii")}
