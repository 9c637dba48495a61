"""Loaders over image sets that live on the device: no worker processes, no per-sample Python.

All randomness of an epoch comes from (seed, epoch) through one CPU generator: the order of the
images and the view of each. Processes of a distributed run draw the same and take their shares.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from mdistiller import runtime
from mdistiller.dataset.data_source import ImageSet
from mdistiller.dataset.memory.augment import Identity
from mdistiller.dataset.mixup import BatchAugment
from mdistiller.dataset.sampler import DistributedBatchSampler, balanced_order, rank_slice
from mdistiller.registry import UserError


class Normalize:
    """uint8 images to float32 (x / 255 - mean) / std, as one multiply and add.

    Args:
        mean, std: one value for each channel, for images in [0, 1].
        device: where the images are.
    """

    def __init__(self, mean: Sequence[float], std: Sequence[float], device: torch.device):
        scale = [1 / (255 * s) for s in std]
        shift = [-m / s for m, s in zip(mean, std, strict=True)]
        self.scale = torch.tensor(scale, device=device).view(-1, 1, 1)
        self.shift = torch.tensor(shift, device=device).view(-1, 1, 1)

    def __call__(self, images: Tensor) -> Tensor:
        """[B, 3, H, W] uint8 -> [B, 3, H, W] float32."""
        return images.float().mul_(self.scale).add_(self.shift)


@dataclass(frozen=True)
class Epoch:
    """All that is drawn for an epoch, on the device: order [N], parameters [N, P], views [N].

    Parameters are of the images; with a balanced order, which repeats images, of its positions.
    """

    order: Tensor
    parameters: Tensor
    views: Tensor


class TrainLoader:
    """Shuffled, augmented batches `(image, target, index)`.

    image: float32 [B, 3, H, W], normalised; target: int64 [B]; index: int64 [B], the positions in
    the set; all on the device. Changing them in place does not change the data.

    Every iteration is a new epoch, counting from 1; `set_epoch` chooses the one that comes next
    (to resume, or to see an epoch again), and where in it to begin.

    Args:
        dataset: the training images.
        batch_size: of each process.
        augment: from `augment.AUGMENTS`.
        mean, std: per channel, for images in [0, 1].
        device: where the images are kept and the batches made.
        seed: with the epoch, decides order and views. Must be the same in all processes.
        drop_last: leave out the images that do not fill a batch.
        balanced: classes are equally frequent, see :func:`balanced_order`.
        mix: what is done to whole batches; where it mixes images, target is float32 [B, C].
        rank, world_size: of the process; as torch.distributed says by default.

    Attributes:
        dataset: the images on the device, in uint8.
        num_data: their number.
        num_views: how many views each has, None if they cannot be enumerated.
        epoch: the epoch being iterated.

    Class attributes:
        makes_images: whether :meth:`images` can make any image of an epoch at any time.
        merges_last_batch: whether there is :meth:`merge_last_batch`.
    """

    makes_images = True
    merges_last_batch = True

    def __init__(
        self,
        dataset: ImageSet,
        batch_size: int,
        augment: Identity,
        mean: Sequence[float],
        std: Sequence[float],
        device: torch.device,
        *,
        seed: int = 0,
        drop_last: bool = False,
        balanced: bool = False,
        mix: BatchAugment | None = None,
        rank: int | None = None,
        world_size: int | None = None,
    ):
        self.batch_sampler = DistributedBatchSampler(
            len(dataset),
            batch_size,
            runtime.rank() if rank is None else rank,
            runtime.world_size() if world_size is None else world_size,
            drop_last,
        )
        self.batch_size, self.num_data, self.seed = batch_size, len(dataset), seed
        self.augment, self.mix = augment, mix
        self.balanced, self._classes = balanced, dataset.targets.cpu()
        self.num_views = None if mix is not None or balanced else augment.num_views
        self.normalize = Normalize(mean, std, device)
        self._place_images(dataset, device)
        self.epoch = 0
        self._drawn: Epoch | None = None
        self._start = 0  # batches of the drawn epoch that are left out
        self._begun = True  # whether the drawn epoch has been iterated

    def _place_images(self, dataset: ImageSet, device: torch.device) -> None:
        """Put the images where the batches are made from."""
        augment = self.augment
        self._store = augment.store(dataset.images.to(device))
        inner = self._store[:, :, augment.pad :, augment.pad :]  # shares memory with the store
        inner = inner[:, :, : augment.height, : augment.width]
        self.dataset = replace(dataset, images=inner, targets=dataset.targets.to(device))

    def __len__(self) -> int:
        return len(self.batch_sampler)

    def merge_last_batch(self) -> None:
        """From now on, an epoch's last batch joins the one before if a process had one image."""
        self.batch_sampler = replace(self.batch_sampler, min_per_rank=2)
        self._drawn, self.epoch, self._start, self._begun = None, 0, 0, True

    def set_epoch(self, epoch: int, start: int = 0) -> None:
        """Draw `epoch` (from 1), to be iterated next, its first `start` batches left out.

        What follows is the same as without; the batches that are left out are not made.
        """
        self.epoch, self._start, self._begun = epoch, start, False
        seed = np.random.SeedSequence([self.seed % 2**64, epoch]).generate_state(1, np.uint64)[0]
        generator = torch.Generator().manual_seed(int(seed))
        self._drawn = self._draw(generator)

    def _draw(self, generator: torch.Generator) -> Epoch:
        order = self._order(generator)
        parameters = self.augment.draw(self.num_data, generator)
        views = self.augment.views(parameters)
        device = self._store.device
        return Epoch(order.to(device), parameters.to(device), views.to(device))

    def _order(self, generator: torch.Generator) -> Tensor:
        """Order of the epoch, [N], of all processes."""
        if self.balanced:
            return balanced_order(self._classes, generator)
        return torch.randperm(self.num_data, generator=generator)

    @property
    def views(self) -> Tensor:
        """Code of the view of every image in this epoch: int64 [N], on the device.

        A batch's are `loader.views[index]`. Two epochs in which an image has the same code give
        the same pixels, so (index, code) is an exact key for remembering what a frozen teacher
        says. Codes are 0 .. num_views - 1, or -1 where views cannot be enumerated.
        """
        views = self._epoch_drawn().views
        return views if self.num_views else torch.full_like(views, -1)

    def batches(self) -> list[Tensor]:
        """Positions in the set that this process's batches of the epoch take: int64, on the CPU."""
        order = self._epoch_drawn().order.cpu()
        return [order[part] for part in self.batch_sampler.local_slices]

    def images(self, index: Tensor, parameters: Tensor | None = None) -> Tensor:
        """The epoch's views of the images at `index` (int64 [B], on the device), as in a batch.

        Args:
            parameters: of other views, for all images: what `augment.draw` gives, on the device.
        """
        if parameters is None:
            parameters = self._epoch_drawn().parameters
        return self.normalize(self.augment.apply(self._store, parameters, index))

    def _epoch_drawn(self) -> Epoch:
        if self._drawn is None:
            self.set_epoch(1)
        assert self._drawn is not None
        return self._drawn

    def loss_weight(self, step: int, accumulate: int = 1) -> float:
        """See :meth:`DistributedBatchSampler.loss_weight`; `step` counts from 0."""
        return self.batch_sampler.loss_weight(step, accumulate)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        if self._begun:
            self.set_epoch(self.epoch + 1)
        self._begun = True
        batches = self._batches(self._epoch_drawn(), self._start)
        if self.mix is None:
            return batches
        return self.mix(batches, self.num_data, self.seed, self.epoch, self._start)

    def _batches(self, drawn: Epoch, start: int) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        for part in self.batch_sampler.local_slices[start:]:
            index = drawn.order[part]
            if self.balanced:
                each = torch.arange(len(index), device=index.device)
                pixels = self.augment.apply(self._store[index], drawn.parameters[part], each)
                images = self.normalize(pixels)
            else:
                images = self.images(index, drawn.parameters)
            yield images, self.dataset.targets[index], index


class EvalLoader:
    """Batches `(image, target)` in the order of the set, without augmentation.

    Under several processes each takes a contiguous share, and none pads it: summed over the
    processes every image counts exactly once. A process may have no batch at all.

    Args: as for :class:`TrainLoader`. `dataset` stays the whole set, whatever the share.
    """

    def __init__(
        self,
        dataset: ImageSet,
        batch_size: int,
        mean: Sequence[float],
        std: Sequence[float],
        device: torch.device,
        *,
        rank: int | None = None,
        world_size: int | None = None,
    ):
        if batch_size < 1:
            raise UserError(f"DATASET.TEST.BATCH_SIZE {batch_size} must be at least 1")
        self._place_images(dataset, device)
        self.batch_size, self.num_data = batch_size, len(dataset)
        self.normalize = Normalize(mean, std, device)
        rank = runtime.rank() if rank is None else rank
        world_size = runtime.world_size() if world_size is None else world_size
        self.start, self.stop = rank_slice(len(dataset), rank, world_size)

    def _place_images(self, dataset: ImageSet, device: torch.device) -> None:
        """Put the images where the batches are made from."""
        self.dataset = dataset.to(device)

    def __len__(self) -> int:
        return -(-(self.stop - self.start) // self.batch_size)

    def _slices(self) -> Iterator[tuple[int, int]]:
        """Start and stop of every batch."""
        for start in range(self.start, self.stop, self.batch_size):
            yield start, min(start + self.batch_size, self.stop)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for start, stop in self._slices():
            images, targets = self.dataset.images[start:stop], self.dataset.targets[start:stop]
            yield self.normalize(images), targets.clone()
