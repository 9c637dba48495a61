"""A data set for tests, registered from outside the package: 160 + 60 real digits."""

from mdistiller.dataset import DATASETS, DataSource, ImageSet


@DATASETS.register("toy")
class Toy(DataSource):
    root = "."
    mean, std = (0.3, 0.3, 0.3), (0.4, 0.4, 0.4)
    augment = "crop"
    zoo = "cifar"

    def load(self, root, split, options):
        digits = DATASETS["digits"]().load(root, split, options)
        count = 160 if split == "train" else 60
        return ImageSet(digits.images[:count], digits.targets[:count], digits.classes)


@DATASETS.register("tiny16")
class Tiny16(Toy):
    """The same at 16 x 16 pixels."""

    def load(self, root, split, options):
        whole = super().load(root, split, options)
        return ImageSet(whole.images[:, :, ::2, ::2].contiguous(), whole.targets, whole.classes)


@DATASETS.register("toy_imagenet")
class ToyImageNet(Toy):
    """The same for networks of the ImageNet zoo."""

    zoo = "imagenet"
