"""Base class and registry of data sets, a split in memory, and the config defaults."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from mdistiller.preprocessing import ImageSize, Preprocessing
from mdistiller.registry import Registry, UserError

DATASETS = Registry("data set")

Split = Literal["train", "test"]

DATASET_CONFIG: dict[str, Any] = {
    "TYPE": "cifar100",
    "ZOO": "",  # model zoo: cifar, tiny_imagenet or imagenet; empty: the data set's
    "LOADER": "auto",  # memory; workers: decode files in every epoch; auto: memory where possible
    "NUM_WORKERS": 2,  # worker processes per rank, or threads that decode into memory at the start
    "WORKER_TIMEOUT": 1800,  # seconds to wait for a batch before the run ends; 0: no limit
    "ROOT": "",  # empty: the data set's default folder under data/
    "VAL_SPLIT": 0,  # training images held out for model selection; the test set is then used once
    "VAL_SEED": 0,  # seed of that split, and of FRACTION; independent of EXPERIMENT.SEED
    "FRACTION": 1.0,  # train on this share of the images of each class, after VAL_SPLIT
    "LABELS": True,  # False: train without the labels of the data
    "CLASSES": [],  # class order: names, a file with one a line, or natural (as timm sorts them)
    "IMAGE_SIZE": 0,  # image folders: resize to this side, or [height, width]; 0: as they are
    "CHANNELS": 3,  # of the images: 1 grey, 3 RGB, 4 RGBA
    "RESIZE": "auto",  # crop, stretch or pad to that size; auto: crop, unless all are square
    "CROP_PCT": 0.0,  # IMAGE_SIZE divided by the side before the centre crop; 0: 7/8 where cropped
    "INTERPOLATION": "auto",  # nearest, bilinear, bicubic; auto: bilinear, or the network's
    "EXIF": True,  # rotate images by their EXIF orientation
    "SCALE_16_BIT": False,  # scale grey images of 16 bits to 8; else they are unreadable
    "JPEG_SCALING": "train",  # decode large JPEGs at reduced scale: none; train: random crops; all
    "AUGMENT": "default",  # default, none, crop, crop_flip, rotate_flip or resized_crop_flip
    "RANDAUGMENT": [],  # [operations, magnitude of 0 to 30], such as [2, 9]; empty: none
    "ERASING": 0.0,  # probability of random erasing
    "MIXUP": 0.0,  # alpha of the Beta distribution of mixing weights; 0: no mixing
    "CUTMIX": 0.0,  # alpha of CutMix; with both, each batch gets one of the two at random
    "MEAN": [],  # per channel, images in [0, 1]; empty: the data set's constants
    "STD": [],
    "MAX_MEMORY_GB": 16.0,  # image files that decode to more are read by workers
    "SKIP_CORRUPT": False,  # skip and list unreadable images; else stop
    "SAMPLER": "default",  # each image once an epoch; balanced: each class equally often
    "DROP_LAST": False,  # drop the last, incomplete batch of an epoch
    "TEST": {"BATCH_SIZE": 64},
    "SHARDS": {  # TYPE webdataset: patterns ({0000..0099}, * and ?) below ROOT, or URLs
        "TRAIN": "train*.tar",
        "VAL": "val*.tar",
        "IMAGE": "jpg;jpeg;png;webp",  # suffix of the image in a sample; the first one present
        "TARGET": "cls",  # suffix of its class number; empty: no labels
        "CLASSES": 0,  # number of classes; 0: the largest class number plus 1
        "SHUFFLE": 1000,  # shuffling distance of a sample within its stream
    },
}

CHANNELS = (1, 3, 4)
"""Values of DATASET.CHANNELS."""

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@dataclass
class ImageSet:
    """A whole split in memory.

    Attributes:
        images: uint8, [N, C, H, W], of DATASET.CHANNELS C.
        targets: class indices, int64, [N].
        classes: class names; ``classes[t]`` is the name of target ``t``.
        left_out: what the split leaves out of the data set, and why.
    """

    images: Tensor
    targets: Tensor
    classes: list[str]
    left_out: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        shape = tuple(self.images.shape)
        if self.images.dtype != torch.uint8 or len(shape) != 4 or shape[1] not in CHANNELS:
            raise UserError(
                f"images must be uint8 [N, 3, H, W], got {self.images.dtype} {list(shape)}; "
                "repeat a grey channel three times, and do not scale to [0, 1]"
            )
        if self.targets.dtype != torch.int64 or tuple(self.targets.shape) != shape[:1]:
            raise UserError(
                f"targets must be int64 [{shape[0]}], one for each image, "
                f"got {self.targets.dtype} {list(self.targets.shape)}"
            )
        if len(self) and not 0 <= self.targets.min() <= self.targets.max() < len(self.classes):
            low, high = int(self.targets.min()), int(self.targets.max())
            raise UserError(
                f"targets run from {low} to {high}, but {len(self.classes)} classes need 0 to "
                f"{len(self.classes) - 1}"
            )

    def __len__(self) -> int:
        return len(self.targets)

    def image(self, index: int) -> Tensor:
        """The image at a position: uint8, [3, H, W]."""
        return self.images[index]

    def select(self, indices: Tensor) -> ImageSet:
        """The images at `indices` (int64, [M]), as a new set."""
        return replace(self, images=self.images[indices], targets=self.targets[indices])

    def to(self, device: torch.device) -> ImageSet:
        """The same set on `device`."""
        return replace(self, images=self.images.to(device), targets=self.targets.to(device))

    def channel_statistics(self) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """Mean and standard deviation of each channel over all pixels, for images in [0, 1]."""
        levels = torch.arange(256, dtype=torch.float64) / 255
        means, stds = [], []
        for channel in self.images.cpu().unbind(1):
            counts = torch.zeros(256, dtype=torch.int64)  # exact for sets of any size
            for part in channel.split(4096):
                counts += torch.bincount(part.flatten(), minlength=256)
            weights = counts.double() / channel.numel()
            mean = float(weights @ levels)
            means.append(mean)
            variance = float(weights @ (levels - mean) ** 2)
            stds.append(math.sqrt(variance) or 1.0)  # a constant channel is only shifted
        return tuple(means), tuple(stds)


STRETCH = Preprocessing(resize="stretch")


@dataclass(frozen=True)
class Options:
    """Config values for reading image files; sets without files ignore them.

    Attributes:
        image_size: side in pixels to resize to, or (height, width); 0: the size of the files.
        workers: decoding threads.
        max_memory_gb: largest size of a decoded split, in 1e9 bytes.
        shards: `DATASET.SHARDS`.
        skip_corrupt: skip images that cannot be read.
        preprocessing: how images are resized to `image_size`.
        upright: rotate images by their EXIF orientation.
        scale_16_bit: scale grey images of 16 bits to 8.
        channels: `DATASET.CHANNELS`.
        jpeg_scaling: where large JPEGs are decoded at a reduced scale: "none", "train" or "all".
    """

    image_size: ImageSize = 0
    workers: int = 2
    max_memory_gb: float = 16.0
    shards: Mapping[str, Any] = field(default_factory=dict)
    skip_corrupt: bool = False
    preprocessing: Preprocessing = STRETCH
    upright: bool = True
    scale_16_bit: bool = False
    jpeg_scaling: str = "none"
    channels: int = 3


class DataSource:
    """Base of a registered data set: constants, and `load`, which reads one split into memory.

    For your own data set, write a file like this one and list it under ``IMPORTS``::

        import numpy as np
        import torch
        from mdistiller.dataset import DATASETS, DataSource, ImageSet

        @DATASETS.register("shells")
        class Shells(DataSource):
            root = "data/shells"
            augment = "crop_flip"

            def load(self, root, split, options):
                file = np.load(root / f"{split}.npz")  # uint8 [N, 3, H, W] and int64 [N]
                images, targets = torch.from_numpy(file["x"]), torch.from_numpy(file["y"])
                return ImageSet(images, targets, classes=["cockle", "limpet", "whelk"])

    Attributes:
        root: default folder, relative to the checkout; None if `DATASET.ROOT` is required.
        mean, std: per channel, for images in [0, 1]; empty: computed from the training images.
        augment: meaning of `DATASET.AUGMENT: default` (a name in `augment.AUGMENTS`).
        keep_shape: crop images to a square, never stretch them.
        zoo: matching model zoo, "cifar", "tiny_imagenet" or "imagenet".
        labels: False for images without classes: `load` gives them all target 0, and there is no
            split "test".
    """

    root: str | None = "data"
    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()
    augment: str = "crop_flip"
    keep_shape: bool = False
    zoo: str = "cifar"
    labels: bool = True

    def load(self, root: Path, split: Split, options: Options) -> ImageSet:
        """Read one split.

        Args:
            root: `DATASET.ROOT`, or the default folder.
            split: "train" or "test".
            options: for reading image files.

        Raises:
            UserError: the data are missing or broken; the text explains what to do.
        """
        raise NotImplementedError

    def has_test(self, root: Path) -> bool:
        """Whether there are test images; without, DATASET.VAL_SPLIT holds out some for that."""
        return True


def same_classes(train: list[str], test: list[str], where: Path | str) -> None:
    """Raise UserError where the class names of two splits differ."""
    if train == test:
        return
    only_train, only_test = sorted(set(train) - set(test)), sorted(set(test) - set(train))
    parts = [
        f"only in {name}: {', '.join(names[:3])}{' ...' if len(names) > 3 else ''}"
        for name, names in (("train", only_train), ("test/val", only_test))
        if names
    ]
    raise UserError(
        f"the classes of the two splits of {where} differ ({'; '.join(parts) or 'other order'}); "
        "give both the same class names"
    )
