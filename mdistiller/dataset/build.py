"""Build data loaders from a config."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch

from mdistiller.dataset.classes import renumber_classes, report_empty_classes
from mdistiller.dataset.data_source import Options, Split, same_classes
from mdistiller.dataset.files.folder import FileSource
from mdistiller.dataset.files.preprocessing import choose_preprocessing
from mdistiller.dataset.memory.loader import EvalLoader, TrainLoader
from mdistiller.dataset.mixup import BatchAugment
from mdistiller.dataset.pipelines import InMemoryPipeline, Size, choose_pipeline
from mdistiller.dataset.settings import (
    augment_of,
    data_root,
    given_statistics,
    has_files,
    has_labels,
    has_no_test,
    is_balanced,
    is_labelled,
    read_node,
    source_of,
)
from mdistiller.dataset.split import hold_out
from mdistiller.preprocessing import NOTHING_STATED, ImageSize, Preprocessing, Statistics
from mdistiller.registry import UserError
from mdistiller.runtime import rank, resolve_device

TEST_SET = "test set"


@dataclass
class Data:
    """The loaders of a run and their properties.

    Without labels (DATASET.LABELS False, or a source that has none) `num_classes` is 0, `classes`
    is empty, and the targets in batches have no meaning.

    Attributes:
        train: shuffled and augmented; items (image, target, index), index in 0 .. num_data - 1.
        val: images that the best epoch is selected on: the held-out training images, or the test
            set where `DATASET.VAL_SPLIT` is 0. No augmentation; items (image, target). None without
            such images.
        test: the test set where images are held out, else None.
        train_size: of the images in `train`, if that is another.
        val_name: what the best epoch is selected on, in words: the test set, held-out training
            images, or without either the training images.
        num_data: number of images in `train`.
        num_classes: number of classes.
        classes: their names, by target.
        zoo: matching model zoo, "cifar", "tiny_imagenet" or "imagenet".
        image_size: (height, width) in pixels.
        mean, std: normalisation constants per channel, for images in [0, 1].
        preprocessing: the whole preprocessing for evaluation.
        plain: returns a loader of the images in `train` in order, without augmentation; items
            (image, target). Given indices (int64), of these alone.
    """

    train: TrainLoader
    val: EvalLoader | None
    test: EvalLoader | None
    num_data: int
    num_classes: int
    classes: list[str]
    zoo: str
    image_size: tuple[int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    preprocessing: Preprocessing = NOTHING_STATED
    plain: Callable[..., EvalLoader] | None = None
    val_name: str = TEST_SET
    train_size: tuple[int, int] | None = None

    def close(self) -> None:
        """End the worker processes, if any."""
        for loader in (self.train, self.val, self.test):
            close = getattr(loader, "close", None)
            if close is not None:
                close()


def get_dataset(cfg: Any) -> tuple[TrainLoader, EvalLoader | None, int, int]:
    """The original's entry point: (train_loader, val_loader, num_data, num_classes)."""
    data = load_data(cfg)
    return data.train, data.val, data.num_data, data.num_classes


def load_data(
    cfg: Any,
    device: torch.device | None = None,
    two_views: bool = False,
    train_size: Size | None = None,
    teacher_view: bool = False,
) -> Data:
    """Read the data set of `cfg.DATASET` and build its loaders.

    Args:
        cfg: config; uses DATASET, SOLVER.BATCH_SIZE (per process), EXPERIMENT.SEED and DEVICE.
        device: overrides DEVICE.
        two_views: training items are ((weak, strong), target, index), see `memory/two_views.py`.
        train_size: make training images of this size, if that is larger than the evaluation's and
            they are files, whose pixels are worth it.
        teacher_view: training images have an attribute `teacher_view`, [B, 3, H, W]: the same crops
            without RandAugment and erasing.

    Raises:
        UserError: a key is invalid, or the data are missing or broken.
    """
    node = read_node(cfg)
    pipeline = _pipeline(node, "train", _device(cfg, device))
    labelled = is_labelled(node, pipeline.source)
    balanced = is_balanced(node, pipeline.source)
    splits = _read_splits(node, pipeline, labelled)
    size = pipeline.size(*splits)
    statistics = given_statistics(node, pipeline.source) or pipeline.statistics(splits[0])
    feed, train, feed_size = pipeline, splits[0], size
    if train_size and math.prod(train_size) > math.prod(size) and has_files(pipeline.source):
        feed = _pipeline({**node, "IMAGE_SIZE": train_size}, "train", _device(cfg, device))
        feed_size, train = train_size, renumber_classes(feed.read("train"), node["CLASSES"])
    train = _images_to_train(node, train)
    evaluated, val_name = _images_to_evaluate(node, pipeline.root, splits, labelled)
    loaders = [pipeline.eval_loader(images, size, statistics) for images in evaluated]
    classes = train.classes if labelled else []
    mix = _mix(node, feed_size, len(train.classes), teacher_view)
    options = {"balanced": balanced, "two_views": two_views, "mix": mix}
    return Data(
        train=_train_loader(cfg, node, feed, train, feed_size, statistics, **options),
        val=loaders[0] if loaders else None,
        test=loaders[1] if labelled and len(loaders) > 1 else None,
        num_data=len(train),
        num_classes=len(classes),
        classes=classes,
        zoo=node["ZOO"] or pipeline.source.zoo,
        image_size=size,
        mean=statistics[0],
        std=statistics[1],
        preprocessing=_full_preprocessing(pipeline, size, statistics),
        plain=lambda indices=None: feed.eval_loader(
            train if indices is None else train.select(indices), feed_size, statistics
        ),
        train_size=feed_size,
        val_name=val_name,
    )


def _read_splits(node: dict[str, Any], pipeline: InMemoryPipeline, labelled: bool) -> list[Any]:
    """The training images and, if the data have them, the test images, of DATASET.CLASSES."""
    train = pipeline.read("train")
    splits = [renumber_classes(train, node["CLASSES"])]
    if has_labels(node, pipeline.source) and not has_no_test(node, pipeline.source):
        test = pipeline.read("test")
        same_classes(train.classes, test.classes, pipeline.root)
        splits.append(renumber_classes(test, node["CLASSES"]))
    classes = splits[0].classes
    if node["CLASSES"]:
        report_empty_classes(splits[0], pipeline.root)
    if labelled and len(classes) < 2:
        raise UserError(
            f"{pipeline.root} has only one class ({classes[0]}); at least two are required"
        )
    return splits


def _images_to_train(node: dict[str, Any], images: Any) -> Any:
    """What DATASET.VAL_SPLIT and FRACTION leave of the training images."""
    if node["VAL_SPLIT"]:
        images = _hold_out(images, node)[0]
    return _fraction(images, node) if node["FRACTION"] < 1 else images


def _images_to_evaluate(
    node: dict[str, Any], root: Path, splits: list[Any], labelled: bool
) -> tuple[list[Any], str]:
    """Those that the best epoch is selected on, in words as well, then those of the test."""
    if not node["VAL_SPLIT"]:
        return splits[1:], TEST_SET if splits[1:] else "training images"
    held = _hold_out(splits[0], node)[1]
    if labelled and len(splits) == 1 and rank() == 0:
        print(
            f"{root} has no test images (val/ or test/): the {len(held)} held-out training images "
            "(DATASET.VAL_SPLIT) serve for selection and evaluation",
            flush=True,
        )
    return [held, *splits[1:]], f"{len(held)} held-out training images"


def _train_loader(
    cfg: Any,
    node: dict[str, Any],
    pipeline: InMemoryPipeline,
    images: Any,
    size: Size,
    statistics: Statistics,
    **options: Any,
) -> TrainLoader:
    return pipeline.train_loader(
        images,
        cfg.SOLVER.BATCH_SIZE,
        size,
        statistics,
        seed=int(cfg.get("EXPERIMENT", {}).get("SEED", 0)),
        drop_last=node["DROP_LAST"],
        **options,
    )


def _full_preprocessing(
    pipeline: InMemoryPipeline, size: Size, statistics: Statistics
) -> Preprocessing:
    """The whole preprocessing for evaluation."""
    how = pipeline.preprocessing
    side: ImageSize = size[0] if size[0] == size[1] else how.image_size
    interpolation = how.interpolation or "bilinear"
    mean, std = statistics
    return replace(how, mean=mean, std=std, image_size=side, interpolation=interpolation)


def _mix(
    node: dict[str, Any], size: tuple[int, int], num_classes: int, teacher_view: bool
) -> BatchAugment | None:
    chances = {name: node[name.upper()] for name in ("erasing", "mixup", "cutmix")}
    if not (teacher_view or any(chances.values())):
        return None
    return BatchAugment(size, num_classes, teacher_view=teacher_view, **chances)


class TestData(NamedTuple):
    """The test set alone: its loader, and properties as in :class:`Data`; `name` as `val_name`."""

    loader: EvalLoader
    num_classes: int
    zoo: str
    classes: list[str]
    image_size: tuple[int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    preprocessing: Preprocessing = NOTHING_STATED
    name: str = TEST_SET


def load_test_loader(
    cfg: Any,
    device: torch.device | None = None,
    network: Preprocessing | None = None,
    split: Split = "test",
) -> TestData:
    """The test set alone, for evaluation; without one, the images of DATASET.VAL_SPLIT.

    Or the training images, without augmentation.

    Training images are read only to compute the mean and std of an image folder for which neither
    DATASET.MEAN and STD nor `network` give them.

    Args:
        network: preprocessing of the network to evaluate, for keys that the config leaves open;
            see :func:`choose_preprocessing`.
    """
    node = read_node(cfg)
    source = source_of(node)
    held_out = split == "test" and has_labels(node, source) and has_no_test(node, source)
    split = "train" if held_out else split
    pipeline = _pipeline(node, split, _device(cfg, device), network)
    statistics = given_statistics(node, pipeline.source)
    channels = node["CHANNELS"]
    if statistics is None and network is not None and len(network.mean) == channels:
        statistics = network.mean, network.std
    if statistics is None:
        statistics = _training_statistics(pipeline)
    test = renumber_classes(pipeline.read(split), node["CLASSES"])
    size = pipeline.size(test)
    test = _hold_out(test, node)[1] if held_out else test
    loader = pipeline.eval_loader(test, size, statistics)
    zoo = node["ZOO"] or pipeline.source.zoo
    return TestData(
        loader,
        len(test.classes),
        zoo,
        test.classes,
        size,
        *statistics,
        preprocessing=_full_preprocessing(pipeline, size, statistics),
        name=f"{len(test)} held-out training images" if held_out else TEST_SET,
    )


def _device(cfg: Any, device: torch.device | None) -> torch.device:
    return resolve_device(cfg.get("DEVICE", "auto")) if device is None else device


def _pipeline(
    node: dict[str, Any], split: Split, device: torch.device, network: Preprocessing | None = None
) -> InMemoryPipeline:
    """The pipeline of the configured data set."""
    source = source_of(node)
    root = data_root(node, source)
    augment = augment_of(node, source)
    how = choose_preprocessing(node, source, root, augment, network)
    options = Options(
        how.image_size if isinstance(source, FileSource) else node["IMAGE_SIZE"],
        max(1, node["NUM_WORKERS"]),
        node["MAX_MEMORY_GB"],
        node["SHARDS"],
        node["SKIP_CORRUPT"],
        how,
        node["EXIF"],
        node["SCALE_16_BIT"],
        node["JPEG_SCALING"],
        node["CHANNELS"],
    )
    return choose_pipeline(node, split, source, root, options, augment, device)


def _training_statistics(pipeline: InMemoryPipeline) -> Statistics:
    """Mean and std of training images, read for this alone."""
    try:
        return pipeline.statistics(pipeline.read("train"))
    except UserError as error:
        raise UserError(f"{error}; or set DATASET.MEAN and DATASET.STD as in training") from error


def _hold_out(train: Any, node: dict[str, Any]) -> tuple[Any, Any]:
    """(remaining training images, images held out for model selection)."""
    try:
        kept, held = hold_out(train.targets, node["VAL_SPLIT"], node["VAL_SEED"])
    except ValueError as error:
        raise UserError(
            f"DATASET.VAL_SPLIT {node['VAL_SPLIT']} of {len(train)} training images: {error}"
        ) from None
    return train.select(kept), train.select(held)


def _fraction(train: Any, node: dict[str, Any]) -> Any:
    """DATASET.FRACTION of the images of each class, at least one; a part of larger fractions."""
    classes = len(train.targets.unique())
    num = max(classes, round(node["FRACTION"] * len(train)))
    return train.select(hold_out(train.targets, len(train) - num, node["VAL_SEED"])[0])
