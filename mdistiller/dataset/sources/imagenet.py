"""ImageNet: 1,000 classes, 1,281,167 training and 50,000 validation images of all sizes.

Russakovsky et al., "ImageNet Large Scale Visual Recognition Challenge", IJCV 2015,
arXiv 1409.0575. Class folders, in both splits::

    ROOT/train/WNID/*.JPEG
    ROOT/val/WNID/*.JPEG
"""

from __future__ import annotations

from pathlib import Path

from mdistiller.dataset.data_source import (
    DATASETS,
    IMAGENET_MEAN,
    IMAGENET_STD,
    Split,
    same_classes,
)
from mdistiller.dataset.files.file_set import FileSet
from mdistiller.dataset.files.folder import (
    FileSource,
    class_folders,
    is_image,
    list_class_folders,
)
from mdistiller.registry import UserError


@DATASETS.register("imagenet")
class ImageNet(FileSource):
    """Targets number the sorted WordNet ids; the validation images serve as the test set."""

    root = "data/imagenet"
    mean, std = IMAGENET_MEAN, IMAGENET_STD
    augment = "resized_crop_flip"
    keep_shape = True
    zoo = "imagenet"

    def files(self, root: Path, split: Split) -> FileSet:
        folder = root / ("train" if split == "train" else "val")
        if not folder.is_dir():
            raise UserError(
                f"ImageNet is not in {root} (no {folder.name}/); put its class folders into train/ "
                "and val/ there, or set DATASET.ROOT"
            )
        classes = class_folders(folder)
        if not classes and any(is_image(path.name) for path in folder.iterdir()):
            raise UserError(
                f"the images in {folder} are not sorted; move them into a folder of each class, "
                "as in train/"
            )
        if split == "test" and (root / "train").is_dir():
            same_classes(class_folders(root / "train"), classes, root)
        return list_class_folders(folder, classes)
