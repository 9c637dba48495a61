"""Stands in for the loader of ImageNet: its folder, read into memory, squeezed to squares."""

from mdistiller.dataset import DATASETS, Options


@DATASETS.register("imagenet_in_memory")
class ImageNetInMemory(DATASETS["imagefolder"]):
    zoo = "imagenet"
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)

    def load(self, root, split, options):
        return super().load(root, split, Options(options.image_size or 224))
