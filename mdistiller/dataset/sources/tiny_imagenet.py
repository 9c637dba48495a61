"""Tiny-ImageNet: 200 classes of ImageNet, 100,000 training and 10,000 validation images, 64 x 64.

Le and Yang, "Tiny ImageNet Visual Recognition Challenge", CS 231N, 2015. Both layouts are read:

* as published: ``train/WNID/images/*.JPEG``, ``val/images/*.JPEG``, ``val/val_annotations.txt``;
* class folders: ``train/WNID/*.JPEG``, ``val/WNID/*.JPEG``.
"""

from __future__ import annotations

from pathlib import Path

from mdistiller.dataset.data_source import DATASETS, Split, same_classes
from mdistiller.dataset.files.file_set import FileSet
from mdistiller.dataset.files.folder import FileSource, class_folders, list_class_folders
from mdistiller.files import Limits, move_in, unpacked
from mdistiller.registry import UserError
from mdistiller.runtime import local_rank_zero_first

_NAME = "tiny-imagenet-200.zip"
_URL = f"http://cs231n.stanford.edu/{_NAME}"  # its publisher gives no hash: not downloaded


@DATASETS.register("tiny_imagenet")
class TinyImageNet(FileSource):
    """Targets number the sorted WordNet ids; the validation images serve as the test set."""

    root = "data/tiny-imagenet-200"
    mean, std = (0.4802, 0.4481, 0.3975), (0.2302, 0.2265, 0.2262)
    augment = "rotate_flip"
    zoo = "tiny_imagenet"

    def files(self, root: Path, split: Split) -> FileSet:
        folder = root / ("train" if split == "train" else "val")
        with local_rank_zero_first():
            _unpack(root)
        if not folder.is_dir():
            raise UserError(
                f"Tiny-ImageNet is not in {root} (no {folder.name}/); put {_URL} beside it, "
                "or set DATASET.ROOT"
            )
        if split == "train":
            return list_class_folders(folder, class_folders(folder))
        classes = class_folders(folder, ignore={"images"})
        test = list_class_folders(folder, classes) if classes else _annotated(folder)
        if (root / "train").is_dir():
            same_classes(class_folders(root / "train"), test.classes, root)
        return test


def _unpack(root: Path) -> None:
    """Unpack the published zip file, if it lies beside the folder that is missing."""
    archive = root.parent / _NAME
    if archive.is_file() and not root.exists():
        with unpacked(archive, root.parent, "Tiny-ImageNet", Limits(bytes=2 * 10**9)) as folder:
            move_in(folder / archive.stem, root)


def _annotated(folder: Path) -> FileSet:
    """The validation images as published: a line of the table gives file name, class and a box."""
    table = folder / "val_annotations.txt"
    if not table.is_file():
        raise UserError(f"{folder} has neither class folders nor {table.name}; unpack {_URL} again")
    rows = [line.split("\t")[:2] for line in table.read_text().splitlines() if line.strip()]
    if not rows or any(len(row) != 2 for row in rows):
        raise UserError(
            f"{table} does not list 'file <tab> class' in its lines; unpack {_URL} again"
        )
    classes = sorted({wnid for _, wnid in rows})
    number = {wnid: target for target, wnid in enumerate(classes)}
    names, targets = [name for name, _ in rows], [number[wnid] for _, wnid in rows]
    return FileSet.of(folder / "images", names, targets, classes)
