"""Your own images: one folder for each class.

::

    ROOT/train/CLASS/*.jpg
    ROOT/val/CLASS/*.jpg        or ROOT/test/CLASS/*.jpg; or neither, with ``DATASET.VAL_SPLIT``

``DATASET.TYPE: imagefolder`` and ``DATASET.ROOT`` are all it takes. Images that fit in memory are
decoded once, larger sets by worker processes when they are needed; either way they must have one
size or get it from ``DATASET.IMAGE_SIZE``, by a resize and a cut that stretch nothing unless
``DATASET.RESIZE`` asks for that. Unless ``DATASET.MEAN`` and ``DATASET.STD`` are given, both are
computed from images in train/.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path

from mdistiller.dataset.data_source import DATASETS, Split, same_classes
from mdistiller.dataset.files.file_set import FileSet
from mdistiller.dataset.files.folder import (
    FileSource,
    class_folders,
    list_class_folders,
    report_skipped,
)
from mdistiller.registry import UserError


@DATASETS.register("imagefolder")
class ImageFolder(FileSource):
    """Classes are the sorted folder names, which must be the same in both splits."""

    root = None
    augment = "crop_flip"

    def has_test(self, root: Path) -> bool:
        return (root / "val").is_dir() or (root / "test").is_dir()

    def files(self, root: Path, split: Split) -> FileSet:
        train = root / "train"
        test = root / "val" if (root / "val").is_dir() else root / "test"
        if split == "test" and not test.is_dir():
            raise UserError(
                f"{root} (DATASET.ROOT) has neither val/ nor test/: make one of them, or set "
                "DATASET.VAL_SPLIT to the number of training images to hold out for evaluation"
            )
        if split == "train" and not train.is_dir():
            raise UserError(f"{root} (DATASET.ROOT) has no folder train/; put class folders in it")
        if train.is_dir() and test.is_dir():
            same_classes(class_folders(train), class_folders(test), root)
        folder = train if split == "train" else test
        skipped: Counter[str] = Counter()
        files = list_class_folders(folder, class_folders(folder), skipped)
        report_skipped(folder, skipped)
        count = skipped.total()
        return replace(files, left_out=(f"{count} without an image suffix",) * (count > 0))
