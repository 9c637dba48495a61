"""Label spaces: the class index of each COCO category; 0 is the background."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from mdistiller.registry import UserError, suggest

LABEL_SPACES = ("contiguous", "coco91")
COCO91 = 91
"""Classes of torchvision's COCO detectors: the category ids 1..90, some of them unused."""


def label_of(categories: Iterable[int], space: str, path: Path) -> dict[int, int]:
    """Label of each category id, in their order.

    Args:
        space: contiguous (1..C) or coco91 (the ids themselves).
        path: their file, for errors.
    """
    if space not in LABEL_SPACES:
        raise UserError(
            f"DETECTION.DATA.LABEL_SPACE {space!r} is unknown{suggest(space, LABEL_SPACES)} "
            f"(known: {', '.join(LABEL_SPACES)})"
        )
    if space == "contiguous":
        return {number: label for label, number in enumerate(categories, 1)}
    odd = next((number for number in categories if not 0 < number < COCO91), None)
    if odd is not None:
        raise UserError(
            f"{path}: category id {odd} is not in 1..90; set DETECTION.DATA.LABEL_SPACE contiguous"
        )
    return {number: number for number in categories}


def class_advice(network: int, data: int, where: str) -> str:
    """What to do about a network with another class count than the data.

    Args:
        network, data: class counts, background included; data's under its LABEL_SPACE.
        where: the network's config node.
    """
    if network == COCO91 and data == 81:
        return "for torchvision's COCO detectors set DETECTION.DATA.LABEL_SPACE coco91"
    if data == COCO91:
        return "set DETECTION.DATA.LABEL_SPACE contiguous, if it is for the data's categories"
    return f"name weights for the data's classes, or start these parts anew: {where}.NEW_HEAD True"
