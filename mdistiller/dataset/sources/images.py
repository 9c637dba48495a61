"""Pictures without classes: all images below a folder, at any depth.

``DATASET.TYPE: images`` and ``DATASET.ROOT`` are all it takes, for methods that need no labels
(docs/foundation.md). Folders have no meaning here; hidden ones are left out. There is no test set:
DATASET.VAL_SPLIT holds out images, on which the loss is measured.
"""

from __future__ import annotations

import os
from collections import Counter
from pathlib import Path

from mdistiller.dataset.data_source import DATASETS, Split
from mdistiller.dataset.files.file_set import FileSet
from mdistiller.dataset.files.folder import FileSource, list_images, print_once, report_skipped
from mdistiller.registry import UserError


@DATASETS.register("images")
class Images(FileSource):
    """All images are of one nameless class, which no part of the library reads."""

    root = None
    augment = "crop_flip"
    labels = False

    def has_test(self, root: Path) -> bool:
        return False

    def files(self, root: Path, split: Split) -> FileSet:
        if split == "test":
            raise UserError(
                f"{root} (DATASET.TYPE images) has no labels to evaluate on: name a labelled data "
                "set, or judge the features by mdistiller eval RUN --probe knn --labelled FOLDER"
            )
        if not root.is_dir():
            raise UserError(f"DATASET.ROOT {root} is not a folder; name one with images in it")
        skipped: Counter[str] = Counter()
        names = [name for name in list_images(root, "", skipped) if not is_hidden(name)]
        if not names:
            raise UserError(f"{root} (DATASET.ROOT) has no images, in it or in folders below it")
        report_skipped(root, skipped)
        if (root / "train").is_dir() and any((root / name).is_dir() for name in ("val", "test")):
            print_once(
                f"WARNING: {root} (DATASET.ROOT) is split, and DATASET.TYPE images reads its test "
                f"images as well; name {root / 'train'} to leave them out"
            )
        return FileSet.of(root, names, [0] * len(names), ["images"])


def is_hidden(name: str) -> bool:
    """Whether a path leads through a hidden folder, or one of macOS's archives."""
    return any(part.startswith(".") or part == "__MACOSX" for part in name.split(os.sep))
