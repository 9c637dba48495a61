"""From a data set to loaders: over images in memory, files read by workers, or shards."""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from mdistiller.dataset.data_source import DataSource, ImageSet, Options, Split
from mdistiller.dataset.files.file_set import image_name
from mdistiller.dataset.files.folder import FileSource, decoded_gigabytes
from mdistiller.dataset.files.resized_crop import ResizedCropFlip
from mdistiller.dataset.memory.augment import Identity
from mdistiller.dataset.memory.loader import EvalLoader, TrainLoader
from mdistiller.dataset.sources.shards import Shards
from mdistiller.preprocessing import Preprocessing, Statistics, height_width
from mdistiller.registry import UserError

if TYPE_CHECKING:
    from mdistiller.dataset.files.loader import WorkerEvalLoader, WorkerTrainLoader
    from mdistiller.dataset.files.transforms import EvalTransform

Size = tuple[int, int]  # height, width

_SAMPLE = 1024  # images for mean and std where reading all takes too long


def luminance(images: torch.Tensor) -> torch.Tensor:
    """RGB images in grey as Pillow makes it: uint8, [N, 3, H, W] to [N, 1, H, W]."""
    red, green, blue = images.split(1, dim=1)
    total = 19595 * red.int() + 38470 * green.int() + 7471 * blue.int()
    return ((total + 0x8000) >> 16).to(torch.uint8)


@dataclass
class InMemoryPipeline:
    """Splits held in memory on the device and augmented in whole batches.

    Attributes:
        node: `DATASET`.
        source, root, options: the data set, its folder, and the options for reading it.
        augment: class of the augmentation that DATASET.AUGMENT names.
        device: of the batches.
    """

    node: Mapping[str, Any]
    source: DataSource
    root: Path
    options: Options
    augment: type[Identity]
    device: torch.device

    def read(self, split: Split) -> Any:
        """A split: an object with a length, `targets`, `classes`, `image` and `select`.

        Raises:
            UserError: the images have other channels than DATASET.CHANNELS, and are not RGB.
        """
        images = self.source.load(self.root, split, self.options)
        wanted, channels = self.options.channels, images.images.shape[1]
        if channels == wanted:
            return images
        if (channels, wanted) != (3, 1):
            raise UserError(
                f"the images of DATASET.TYPE {self.node['TYPE']} have {channels} channels, and "
                f"DATASET.CHANNELS is {wanted}: set it to {channels}"
            )
        return replace(images, images=luminance(images.images))

    @property
    def preprocessing(self) -> Preprocessing:
        """How images are resized."""
        return self.options.preprocessing

    def size(self, *splits: Any) -> Size:
        """Size of the images, which must be the same in all splits."""
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
        """The training loader; with `two_views` its images are pairs of views."""
        loader = TrainLoader
        if two_views:
            from mdistiller.dataset.memory.two_views import TwoViewLoader  # torchvision is slow

            if self.options.channels != 3:
                raise UserError(
                    "this method changes the colours of one of its two views, which needs "
                    f"DATASET.CHANNELS 3, not {self.options.channels}; choose another method"
                )
            if options["mix"] is not None:
                raise UserError(
                    "this method trains on two views of every image, which cannot be mixed or "
                    "erased: set DATASET.ERASING, MIXUP and CUTMIX to 0"
                )
            loader = TwoViewLoader
        return loader(train, batch_size, self.augment(size), *statistics, self.device, **options)

    def eval_loader(self, images: Any, size: Size, statistics: Statistics) -> EvalLoader:
        """A loader that visits every image once, without augmentation."""
        return EvalLoader(images, self.node["TEST"]["BATCH_SIZE"], *statistics, self.device)


class FilePipeline(InMemoryPipeline):
    """Images that worker processes read in every epoch from files, or from a set in memory."""

    def read(self, split: Split) -> Any:
        if isinstance(self.source, FileSource):
            return self.source.readable_files(self.root, split, self.options)
        return super().read(split)

    def size(self, *splits: Any) -> Size:
        if self.preprocessing.image_size:
            return height_width(self.preprocessing.image_size)
        height, width = splits[0].image(0).shape[1:]
        return height, width

    def statistics(self, train: Any) -> Statistics:
        transform = self._eval_transform(train, self.size(train))
        chosen = torch.linspace(0, len(train) - 1, min(_SAMPLE, len(train))).long().tolist()

        def image(i: int) -> torch.Tensor:
            return transform(train.image(i), image_name(train, i))

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
        from mdistiller.dataset.files.transforms import TrainTransform

        if two_views:
            raise UserError(
                "this method trains on two views of every image, which needs images in memory: set "
                "DATASET.LOADER memory (and MAX_MEMORY_GB), or choose another method"
            )

        transform = TrainTransform(
            self.augment(size),
            self._eval_transform(train, size),
            tuple(self.node["RANDAUGMENT"]),
            both=options["mix"] is not None and options["mix"].teacher_view,
        )
        loader, options = self._loaders()[0], options | self._workers()
        return loader(train, batch_size, transform, *statistics, self.device, **options)

    def eval_loader(self, images: Any, size: Size, statistics: Statistics) -> EvalLoader:
        loader, batch_size = self._loaders()[1], self.node["TEST"]["BATCH_SIZE"]
        transform, options = self._eval_transform(images, size), self._workers()
        return loader(images, batch_size, transform, *statistics, self.device, **options)

    def _workers(self) -> dict[str, Any]:
        return {"num_workers": self.node["NUM_WORKERS"], "timeout": self.node["WORKER_TIMEOUT"]}

    def _loaders(self) -> tuple[type[WorkerTrainLoader], type[WorkerEvalLoader]]:
        from mdistiller.dataset.files.loader import WorkerEvalLoader, WorkerTrainLoader

        return WorkerTrainLoader, WorkerEvalLoader

    def _eval_transform(self, images: Any, size: Size) -> EvalTransform:
        from mdistiller.dataset.files.transforms import EvalTransform  # torchvision is slow

        return EvalTransform(size, self.preprocessing, image_name(images, 0))


class ShardPipeline(FilePipeline):
    """Images in tar shards, which workers read from front to back."""

    def read(self, split: Split) -> Any:
        assert isinstance(self.source, Shards)
        return self.source.shards(self.root, split, self.options)

    def _loaders(self) -> tuple[type[WorkerTrainLoader], type[WorkerEvalLoader]]:
        from mdistiller.dataset.files.shard_loader import ShardEvalLoader, ShardTrainLoader

        return ShardTrainLoader, ShardEvalLoader


def choose_pipeline(node: Mapping[str, Any], split: Split, *args: Any) -> InMemoryPipeline:
    """The pipeline for DATASET.LOADER; "auto" takes memory where that is possible.

    Args:
        split: the split that must fit into memory.
        args: those of :class:`InMemoryPipeline` after `node`.
    """
    memory = InMemoryPipeline(node, *args)
    workers = (ShardPipeline if isinstance(memory.source, Shards) else FilePipeline)(node, *args)
    kind, reason = node["LOADER"], _needs_workers(memory)
    if kind not in ("auto", "memory", "workers"):
        raise UserError(f"DATASET.LOADER must be auto, memory or workers, got {kind!r}")
    if kind == "memory" and reason:
        raise UserError(f"{reason} needs DATASET.LOADER workers (or auto)")
    if kind == "workers" or reason:
        return workers
    if kind == "auto" and isinstance(memory.source, FileSource):
        size = memory.options.image_size
        files = memory.source.readable_files(memory.root, split, memory.options)
        height, width = height_width(size) if size else files.image(0).shape[1:]
        if decoded_gigabytes(files, height, width) > memory.options.max_memory_gb:
            return workers
    return memory


def _needs_workers(pipeline: InMemoryPipeline) -> str:
    """The setting that needs workers, or ""."""
    if pipeline.source.keep_shape:
        return f"DATASET.TYPE {pipeline.node['TYPE']}"
    if issubclass(pipeline.augment, ResizedCropFlip):
        return "DATASET.AUGMENT resized_crop_flip"
    if pipeline.node["RANDAUGMENT"]:
        return "DATASET.RANDAUGMENT"
    return ""
