"""How a data set's images become batches: from memory, or through worker processes."""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from mdistiller.dataset.data_source import DataSource, ImageSet, Options, Split
from mdistiller.dataset.files.file_set import FileSet
from mdistiller.dataset.files.folder import FileSource, decoded_gigabytes
from mdistiller.dataset.files.resized_crop import ResizedCropFlip
from mdistiller.dataset.memory.augment import Identity
from mdistiller.dataset.memory.loader import EvalLoader, TrainLoader
from mdistiller.dataset.sources.shards import Shards
from mdistiller.preprocessing import Preprocessing, Statistics
from mdistiller.registry import UserError

if TYPE_CHECKING:
    from mdistiller.dataset.files.loader import WorkerEvalLoader, WorkerTrainLoader
    from mdistiller.dataset.files.transforms import TestView

Size = tuple[int, int]  # height, width

_SAMPLE = 1024  # images from which statistics are computed where reading all takes too long


@dataclass
class MemoryFeed:
    """Splits held in memory, whole batches per operation.

    Attributes:
        node: `DATASET`.
        source, root, options: the data set, its folder, and how to read it.
        augment: what DATASET.AUGMENT names.
        device: where batches go.
    """

    node: Mapping[str, Any]
    source: DataSource
    root: Path
    options: Options
    augment: type[Identity]
    device: torch.device

    def read(self, split: Split) -> Any:
        """A split: with a length, `targets`, `classes`, `image` and `select`."""
        return self.source.load(self.root, split, self.options)

    @property
    def preprocessing(self) -> Preprocessing:
        """How images are brought to their size."""
        return self.options.preprocessing

    def size(self, *splits: Any) -> Size:
        """The size of the images, the same in all splits."""
        shapes = [tuple(images.images.shape[2:]) for images in splits]
        if len(set(shapes)) > 1:
            (height, width), (test_height, test_width) = shapes
            raise UserError(
                f"training images are {width}x{height} and test images {test_width}x{test_height} "
                "pixels; set DATASET.IMAGE_SIZE to resize both"
            )
        return shapes[0]

    def statistics(self, train: Any) -> Statistics:
        """Mean and std of the training images."""
        statistics: Statistics = train.channel_statistics()
        return statistics

    def train_loader(
        self,
        train: Any,
        batch_size: int,
        size: Size,
        statistics: Statistics,
        two_views: bool = False,
        **options: Any,
    ) -> TrainLoader:
        """The loader of the training images, of pairs of views if wanted."""
        loader = TrainLoader
        if two_views:
            from mdistiller.dataset.memory.two_views import (
                TwoViewLoader,  # torchvision: slow to import
            )

            if options["mix"] is not None:
                raise UserError(
                    "this method makes two views of every image in its own way: set "
                    "DATASET.ERASING, MIXUP and CUTMIX to 0"
                )
            loader = TwoViewLoader
        return loader(train, batch_size, self.augment(size), *statistics, self.device, **options)

    def eval_loader(self, images: Any, size: Size, statistics: Statistics) -> EvalLoader:
        """A loader that takes every image once, as it is."""
        return EvalLoader(images, self.node["TEST"]["BATCH_SIZE"], *statistics, self.device)


class WorkerFeed(MemoryFeed):
    """Images that worker processes read in every epoch: files, or a set in memory."""

    def read(self, split: Split) -> Any:
        if isinstance(self.source, FileSource):
            return self.source.usable(self.root, split, self.options)
        return super().read(split)

    def size(self, *splits: Any) -> Size:
        side = self.preprocessing.image_size
        if side:
            return side, side
        height, width = splits[0].image(0).shape[1:]
        return height, width

    def statistics(self, train: Any) -> Statistics:
        fit = self._fit(train, self.size(train))
        chosen = torch.linspace(0, len(train) - 1, min(_SAMPLE, len(train))).long().tolist()

        def image(i: int) -> torch.Tensor:
            return fit(train.image(i), _name(train, i))

        with ThreadPoolExecutor(self.options.workers) as pool:
            images = torch.stack(list(pool.map(image, chosen)))
        return ImageSet(images, train.targets[chosen], train.classes).channel_statistics()

    def train_loader(
        self,
        train: Any,
        batch_size: int,
        size: Size,
        statistics: Statistics,
        two_views: bool = False,
        **options: Any,
    ) -> TrainLoader:
        from mdistiller.dataset.files.transforms import TrainView

        if two_views:
            raise UserError(
                "this method trains on two views of every image, which are made of images held in "
                "memory only: set DATASET.LOADER memory (and MAX_MEMORY_GB), or take another method"
            )

        view = TrainView(
            self.augment(size), self._fit(train, size), tuple(self.node["RANDAUGMENT"])
        )
        options |= {
            "num_workers": self.node["NUM_WORKERS"],
            "timeout": self.node["WORKER_TIMEOUT"],
        }
        loader = self._loaders()[0]
        return loader(train, batch_size, view, *statistics, self.device, **options)

    def eval_loader(self, images: Any, size: Size, statistics: Statistics) -> EvalLoader:
        return self._loaders()[1](
            images,
            self.node["TEST"]["BATCH_SIZE"],
            self._fit(images, size),
            *statistics,
            self.device,
            num_workers=self.node["NUM_WORKERS"],
            timeout=self.node["WORKER_TIMEOUT"],
        )

    def _loaders(self) -> tuple[type[WorkerTrainLoader], type[WorkerEvalLoader]]:
        from mdistiller.dataset.files import loader as _workers

        return _workers.WorkerTrainLoader, _workers.WorkerEvalLoader

    def _fit(self, images: Any, size: Size) -> TestView:
        from mdistiller.dataset.files.transforms import (
            TestView,  # brings torchvision: a slow import
        )

        return TestView(size, self.preprocessing, _name(images, 0))


class ShardFeed(WorkerFeed):
    """Images in shards, which workers read from front to back."""

    def read(self, split: Split) -> Any:
        assert isinstance(self.source, Shards)
        return self.source.shards(self.root, split, self.options)

    def _loaders(self) -> tuple[type[WorkerTrainLoader], type[WorkerEvalLoader]]:
        from mdistiller.dataset.files import shard_loader as _shard_loaders

        return _shard_loaders.ShardTrainLoader, _shard_loaders.ShardEvalLoader


def _name(images: Any, index: int) -> str:
    """What an error calls an image."""
    return str(images.path(index)) if isinstance(images, FileSet) else f"image {index}"


def choose_feed(node: Mapping[str, Any], split: Split, *args: Any) -> MemoryFeed:
    """The feed that DATASET.LOADER asks for, or with "auto" the one that can.

    Args:
        split: which one has to fit into memory.
        args: as for :class:`MemoryFeed`, behind its `node`.
    """
    memory = MemoryFeed(node, *args)
    workers = (ShardFeed if isinstance(memory.source, Shards) else WorkerFeed)(node, *args)
    kind, reason = node["LOADER"], _only_workers(memory)
    if kind not in ("auto", "memory", "workers"):
        raise UserError(f"DATASET.LOADER must be auto, memory or workers, got {kind!r}")
    if kind == "memory" and reason:
        raise UserError(f"{reason} needs DATASET.LOADER workers (or auto)")
    if kind == "workers" or reason:
        return workers
    if kind == "auto" and isinstance(memory.source, FileSource):
        side = memory.options.image_size
        files = memory.source.usable(memory.root, split, memory.options)
        height, width = (side, side) if side else files.image(0).shape[1:]
        if decoded_gigabytes(files, height, width) > memory.options.max_memory_gb:
            return workers
    return memory


def _only_workers(feed: MemoryFeed) -> str:
    """What cannot be done in memory, or ""."""
    if feed.source.keep_shape:
        return f"DATASET.TYPE {feed.node['TYPE']}"
    if issubclass(feed.augment, ResizedCropFlip):
        return "DATASET.AUGMENT resized_crop_flip"
    if feed.node["RANDAUGMENT"]:
        return "DATASET.RANDAUGMENT"
    return ""
