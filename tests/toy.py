"""Data sets for tests, registered from outside the package: 160 + 60 real digits."""

import functools

import torch

from mdistiller.dataset import DATASETS, DataSource, ImageSet


@functools.cache
def _digits(split, step):
    """The first digits of a split, every `step`-th of their 32 x 32 pixels."""
    digits = DATASETS["digits"]().load(".", split, {})
    count = 160 if split == "train" else 60
    images = digits.images[:count, :, ::step, ::step].contiguous()
    return ImageSet(images, digits.targets[:count], digits.classes)


@DATASETS.register("toy")
class Toy(DataSource):
    root = "."
    mean, std = (0.3, 0.3, 0.3), (0.4, 0.4, 0.4)
    augment = "crop"
    zoo = "cifar"
    step = 1

    def load(self, root, split, options):
        digits = _digits(split, self.step)
        return ImageSet(digits.images.clone(), digits.targets.clone(), list(digits.classes))


@DATASETS.register("tiny16")
class Tiny16(Toy):
    """The same at 16 x 16 pixels: an epoch takes a third of the time."""

    step = 2


@DATASETS.register("few")
class Few(Toy):
    """The first 64 + 20 of them."""

    def load(self, root, split, options):
        count = 64 if split == "train" else 20
        return super().load(root, split, options).select(torch.arange(count))


@DATASETS.register("toy_imagenet")
class ToyImageNet(Toy):
    """The same for networks of the ImageNet zoo."""

    zoo = "imagenet"
