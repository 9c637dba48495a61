"""Data of a detection run: config keys, training and validation set, loaders.

Keys with the same meaning as in classification keep their place: SOLVER.BATCH_SIZE (images of each
process), EXPERIMENT.SEED, DATASET.NUM_WORKERS, DATASET.WORKER_TIMEOUT and DATASET.SKIP_CORRUPT.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from mdistiller.detection.batches import TrainBatches, ValBatches
from mdistiller.detection.coco.dataset import CocoDetectionSet
from mdistiller.detection.coco.packages import coco_api
from mdistiller.registry import UserError
from mdistiller.runtime import project_root

__all__ = [
    "DATA",
    "CocoDetectionSet",
    "build_set",
    "check_same_classes",
    "train_batches",
    "val_loader",
]

DATA: dict[str, Any] = {
    "TRAIN_IMAGES": "data/coco/train2017",  # folders, and annotation files; relative to the
    "TRAIN_ANNOTATIONS": "data/coco/annotations/instances_train2017.json",  # checkout
    "VAL_IMAGES": "data/coco/val2017",
    "VAL_ANNOTATIONS": "data/coco/annotations/instances_val2017.json",
    # Labels: contiguous (1..C in the order of the category ids) or coco91 (the ids themselves, as
    # torchvision's detectors for COCO have them); 0 is the background.
    "LABEL_SPACE": "contiguous",
    "MIN_SIZES": [640, 672, 704, 736, 768, 800],  # of the shorter side in training: one is drawn
    "MAX_SIZE": 1333,  # that the longer side may get, in training and testing
    "TEST_MIN_SIZE": 800,
    "TEST_BATCH_SIZE": 1,  # images that are padded to one size and tested together
    "FLIP": 0.5,  # probability of a horizontal flip
    "ASPECT_GROUPING": True,  # batches of landscape images, or of portrait ones
    "KEEP_EMPTY": False,  # train on images without objects, too
    "BAD_ANNOTATIONS": "error",  # or fix: clip what sticks out, leave out what has no area; counted
    "EXIF": True,  # turn images as their EXIF orientation says before the boxes are applied
}


def build_set(cfg: Any, split: str, masks: bool | None = None) -> CocoDetectionSet:
    """The training ("TRAIN") or validation ("VAL") set of a config.

    No image of the validation set is left out: that would change the average precision.

    Args:
        masks: whether objects need masks; by default, if the student has them.
    """
    node, train = cfg.DETECTION.DATA, split == "TRAIN"
    check_keys(node)
    images, annotations = (
        project_root() / Path(node[f"{split}_{what}"]).expanduser()
        for what in ("IMAGES", "ANNOTATIONS")
    )
    return CocoDetectionSet(
        images,
        annotations,
        label_space=node.LABEL_SPACE,
        masks=bool(cfg.DETECTION.STUDENT.MASK) if masks is None else masks,
        mend=node.BAD_ANNOTATIONS == "fix",
        keep_empty=not train or node.KEEP_EMPTY,
        exif=node.EXIF,
        skip_corrupt=train and cfg.DATASET.SKIP_CORRUPT,
        threads=max(1, cfg.DATASET.NUM_WORKERS),
        split=split,
    )


def check_keys(node: Any) -> None:
    """Refuse invalid values of DETECTION.DATA."""
    for key in ("MAX_SIZE", "TEST_MIN_SIZE", "TEST_BATCH_SIZE"):
        if node[key] < 1:
            raise UserError(f"DETECTION.DATA.{key} {node[key]} must be at least 1")
    sizes = node.MIN_SIZES
    if not sizes or not all(type(size) is int and size > 0 for size in sizes):
        raise UserError(f"DETECTION.DATA.MIN_SIZES {sizes} must be a list of pixels above 0")
    if not 0 <= node.FLIP <= 1:
        raise UserError(f"DETECTION.DATA.FLIP {node.FLIP} is a probability, 0..1")
    if node.BAD_ANNOTATIONS not in ("error", "fix"):
        raise UserError(
            f"DETECTION.DATA.BAD_ANNOTATIONS {node.BAD_ANNOTATIONS!r} is unknown; use error or fix"
        )


def check_same_classes(train: CocoDetectionSet, val: CocoDetectionSet) -> None:
    """Refuse training and validation sets with different classes."""
    one, other = (data.annotations.categories for data in (train, val))
    differ = [number for number in {**one, **other} if one.get(number) != other.get(number)]
    if differ:
        number = differ[0]
        raise UserError(
            f"{train.annotations.path} and {val.annotations.path} name different categories: id "
            f"{number} is {one.get(number)!r} and {other.get(number)!r}"
        )


def train_batches(cfg: Any, device: torch.device | str = "cpu") -> TrainBatches:
    """Training batches of a config; `.dataset` is the set."""
    node = cfg.DETECTION.DATA
    return TrainBatches(
        build_set(cfg, "TRAIN"),
        cfg.SOLVER.BATCH_SIZE,
        min_sizes=node.MIN_SIZES,
        max_size=node.MAX_SIZE,
        flip=node.FLIP,
        grouping=node.ASPECT_GROUPING,
        seed=cfg.EXPERIMENT.SEED,
        device=device,
        num_workers=cfg.DATASET.NUM_WORKERS,
        timeout=cfg.DATASET.WORKER_TIMEOUT,
    )


def val_loader(
    cfg: Any, device: torch.device | str = "cpu", masks: bool | None = None
) -> ValBatches:
    """Validation batches of a config; `.dataset` is the set. Their targets have no masks.

    Args:
        masks: whether objects need masks, for mask AP; see :func:`build_set`.

    Raises:
        UserError: also if the package of DETECTION.EVALUATOR is not installed.
    """
    node = cfg.DETECTION.DATA
    coco_api(cfg.DETECTION.EVALUATOR)
    return ValBatches(
        build_set(cfg, "VAL", masks),
        node.TEST_BATCH_SIZE,
        min_size=node.TEST_MIN_SIZE,
        max_size=node.MAX_SIZE,
        device=device,
        num_workers=cfg.DATASET.NUM_WORKERS,
        timeout=cfg.DATASET.WORKER_TIMEOUT,
    )
