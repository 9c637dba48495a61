"""A data set of your own: train.npz and test.npz, each with x, uint8 [N, H, W, 3], and y, [N]."""

import numpy as np
import torch

from mdistiller.dataset import DATASETS, DataSource, ImageSet
from mdistiller.registry import UserError


@DATASETS.register("shells")
class Shells(DataSource):
    root = None  # DATASET.ROOT has to name the folder
    augment = "crop_flip"  # what DATASET.AUGMENT default means; or crop, rotate_flip, none
    mean, std = (), ()  # computed from the training images

    def load(self, root, split, options):  # split: "train" or "test"
        path = root / f"{split}.npz"
        if not path.is_file():
            raise UserError(f"{path} is missing; draw_shells.py makes it")
        file = np.load(path)
        images = torch.from_numpy(file["x"]).permute(0, 3, 1, 2).contiguous()
        targets = torch.from_numpy(file["y"]).long()
        return ImageSet(images, targets, classes=["cockle", "limpet", "whelk"])
