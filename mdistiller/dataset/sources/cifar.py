"""CIFAR-10 and CIFAR-100: 50,000 training and 10,000 test images of 32 x 32 pixels.

Krizhevsky, "Learning Multiple Layers of Features from Tiny Images", 2009.
The archive is downloaded on first use and must have the md5 that torchvision knows.
"""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import torch

from mdistiller.dataset.data_source import DATASETS, DataSource, ImageSet, Options, Split
from mdistiller.files import Limits, fetch, move_in, unpacked
from mdistiller.registry import UserError
from mdistiller.runtime import local_rank_zero_first


class _CIFAR(DataSource):
    """What both share; `dataset` is the name of torchvision's class."""

    dataset: str
    zoo = "cifar"
    augment = "crop_flip"

    def load(self, root: Path, split: Split, options: Options) -> ImageSet:
        from torchvision import datasets  # a slow import that other data sets do not need

        reader = getattr(datasets, self.dataset)
        with local_rank_zero_first():
            data = self._read(reader, root, split == "train")
        images = torch.from_numpy(data.data).permute(0, 3, 1, 2).contiguous()
        return ImageSet(images, torch.tensor(data.targets), list(data.classes))

    def _read(self, reader: Any, root: Path, train: bool) -> Any:
        """The data set as torchvision reads it, downloaded if it is not there.

        Its files are pickles: torchvision opens none whose md5 is not that of the published one.
        """
        with contextlib.suppress(RuntimeError):  # not there, or its md5 differs
            return reader(str(root), train=train, download=False)
        archive = root / reader.filename
        fetch(
            reader.url,
            archive,
            f"{self.dataset}, which is not in {root},",
            md5=reader.tgz_md5,
            advice=f"get {reader.url} and put {reader.filename}, or its folder "
            f"{reader.base_folder}, there, or set DATASET.ROOT",
        )
        with unpacked(archive, root, self.dataset, Limits(bytes=10**9, files=100)) as folder:
            move_in(folder / reader.base_folder, root / reader.base_folder)
        try:
            return reader(str(root), train=train, download=False)
        except RuntimeError as error:
            raise UserError(
                f"{self.dataset} in {root / reader.base_folder} is not as published ({error})"
            ) from error


@DATASETS.register("cifar100")
class CIFAR100(_CIFAR):
    """100 classes, 500 training images each; mean and std of the original mdistiller."""

    dataset = "CIFAR100"
    mean, std = (0.5071, 0.4867, 0.4408), (0.2675, 0.2565, 0.2761)


@DATASETS.register("cifar10")
class CIFAR10(_CIFAR):
    """10 classes, 5,000 training images each."""

    dataset = "CIFAR10"
    mean, std = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)
