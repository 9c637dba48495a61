"""From a config to loaders."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch

from mdistiller.dataset._base import (
    DATASET_CONFIG,
    DATASETS,
    DataSource,
    ImageSet,
    Options,
    same_classes,
)
from mdistiller.dataset._split import hold_out
from mdistiller.dataset.augment import AUGMENTS
from mdistiller.dataset.loader import EvalLoader, TrainLoader
from mdistiller.registry import UserError
from mdistiller.runtime import project_root, resolve_device

Statistics = tuple[tuple[float, ...], tuple[float, ...]]  # mean and std of each channel


@dataclass
class Data:
    """The loaders of a run and what they hold.

    Attributes:
        train: shuffled and augmented; items (image, target, index), index in 0 .. num_data - 1.
        val: what the best epoch is selected on. With `DATASET.VAL_SPLIT` 0 the test set, else the
            held-out training images, without augmentation; items (image, target).
        test: the test set if images are held out, else None.
        num_data: number of images in `train`.
        num_classes: number of classes.
        classes: their names, by target.
        zoo: model zoo that fits, "cifar" or "tiny_imagenet".
        image_size: (height, width) in pixels.
        mean, std: what images are normalised with, per channel, for images in [0, 1].
    """

    train: TrainLoader
    val: EvalLoader
    test: EvalLoader | None
    num_data: int
    num_classes: int
    classes: list[str]
    zoo: str
    image_size: tuple[int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]


def get_dataset(cfg: Any) -> tuple[TrainLoader, EvalLoader, int, int]:
    """The original's entry point: (train_loader, val_loader, num_data, num_classes)."""
    data = load_data(cfg)
    return data.train, data.val, data.num_data, data.num_classes


def load_data(cfg: Any, device: torch.device | None = None, two_views: bool = False) -> Data:
    """Read the data set that `cfg.DATASET` names and put it on the device.

    Args:
        cfg: read are DATASET, SOLVER.BATCH_SIZE (of each process), EXPERIMENT.SEED and DEVICE.
        device: in place of what DEVICE says.
        two_views: training items are ((weak, strong), target, index), see `_two_views.py`.

    Raises:
        UserError: a key cannot be satisfied, or the data are missing or broken.
    """
    node, device = _node(cfg), _device(cfg, device)
    source, root, options = _source(node)
    augment = AUGMENTS[source.augment if node["AUGMENT"] == "default" else node["AUGMENT"]]
    train, test = source.load(root, "train", options), source.load(root, "test", options)
    same_classes(train.classes, test.classes, root)
    if len(train.classes) < 2:
        raise UserError(f"{root} has one class only ({train.classes[0]}); two are needed")
    size = _common_size(train, test)
    mean, std = _statistics(node, source) or train.channel_statistics()
    eval_size = node["TEST"]["BATCH_SIZE"]
    val, test_loader = EvalLoader(test, eval_size, mean, std, device), None
    if node["VAL_SPLIT"]:
        train, held = _hold_out(train, node)
        val, test_loader = EvalLoader(held, eval_size, mean, std, device), val
    train_loader = _train_loader(two_views)(
        train,
        cfg.SOLVER.BATCH_SIZE,
        augment(size),
        mean,
        std,
        device,
        seed=int(cfg.get("EXPERIMENT", {}).get("SEED", 0)),
        drop_last=node["DROP_LAST"],
    )
    return Data(
        train=train_loader,
        val=val,
        test=test_loader,
        num_data=len(train),
        num_classes=len(train.classes),
        classes=train.classes,
        zoo=source.zoo,
        image_size=size,
        mean=mean,
        std=std,
    )


def _train_loader(two_views: bool) -> type[TrainLoader]:
    if not two_views:
        return TrainLoader
    from mdistiller.dataset._two_views import TwoViewLoader  # brings torchvision: a slow import

    return TwoViewLoader


class TestData(NamedTuple):
    """The test set alone: its loader, number of classes, and the model zoo that fits it."""

    loader: EvalLoader
    num_classes: int
    zoo: str


def load_test_loader(cfg: Any, device: torch.device | None = None) -> TestData:
    """The test set alone, for evaluation.

    The training images are not read, with one exception: an image folder without DATASET.MEAN and
    STD is normalised with statistics of its training images, so these must be there.
    """
    node, device = _node(cfg), _device(cfg, device)
    source, root, options = _source(node)
    statistics = _statistics(node, source)
    if statistics is None:
        statistics = _training_statistics(source, root, options)
    test = source.load(root, "test", options)
    loader = EvalLoader(test, node["TEST"]["BATCH_SIZE"], *statistics, device)
    return TestData(loader, len(test.classes), source.zoo)


def _node(cfg: Any) -> dict[str, Any]:
    """cfg.DATASET over the defaults, so that a node written for the original will do."""
    node = {**DATASET_CONFIG, **cfg.DATASET}
    for key in ("VAL_SPLIT", "IMAGE_SIZE", "NUM_WORKERS"):
        if node[key] < 0:
            raise UserError(f"DATASET.{key} {node[key]} must not be negative")
    return node


def _device(cfg: Any, device: torch.device | None) -> torch.device:
    return resolve_device(cfg.get("DEVICE", "auto")) if device is None else device


def _source(node: dict[str, Any]) -> tuple[DataSource, Path, Options]:
    """The registered data set, its folder, and how to read it."""
    entry = DATASETS[node["TYPE"]]
    source = entry() if isinstance(entry, type) else entry
    options = Options(node["IMAGE_SIZE"], max(1, node["NUM_WORKERS"]), node["MAX_MEMORY_GB"])
    if node["ROOT"]:
        root = Path(node["ROOT"]).expanduser()
        return source, root if root.exists() else project_root() / root, options
    if source.root is None:
        raise UserError(f"DATASET.TYPE {node['TYPE']} needs DATASET.ROOT, the folder of the data")
    return source, project_root() / source.root, options


def _statistics(node: dict[str, Any], source: DataSource) -> Statistics | None:
    """Mean and std of the config, else of the data set; None if they must be computed."""
    mean, std = tuple(node["MEAN"]), tuple(node["STD"])
    if not mean and not std:
        return (source.mean, source.std) if source.mean else None
    if len(mean) != 3 or len(std) != 3 or max(*mean, *std) > 1 or min(std) <= 0:
        raise UserError(
            f"DATASET.MEAN {list(mean)} and DATASET.STD {list(std)} must both have three values up "
            "to 1 (images in [0, 1]), those of STD above 0, or both be empty"
        )
    return mean, std


def _training_statistics(source: DataSource, root: Path, options: Options) -> Statistics:
    """Mean and std of training images that are read for nothing else."""
    try:
        return source.load(root, "train", options).channel_statistics()
    except UserError as error:
        raise UserError(f"{error}; or set DATASET.MEAN and DATASET.STD as in training") from error


def _common_size(train: ImageSet, test: ImageSet) -> tuple[int, int]:
    """(height, width), the same in both splits."""
    height, width = train.images.shape[2:]
    test_height, test_width = test.images.shape[2:]
    if (height, width) != (test_height, test_width):
        raise UserError(
            f"training images are {width}x{height} and test images {test_width}x{test_height} "
            "pixels; set DATASET.IMAGE_SIZE to resize both"
        )
    return height, width


def _hold_out(train: ImageSet, node: dict[str, Any]) -> tuple[ImageSet, ImageSet]:
    """(training images that remain, images held out for selection)."""
    try:
        kept, held = hold_out(train.targets, node["VAL_SPLIT"], node["VAL_SEED"])
    except ValueError as error:
        raise UserError(
            f"DATASET.VAL_SPLIT {node['VAL_SPLIT']} of {len(train)} training images: {error}"
        ) from None
    return train.select(kept), train.select(held)
