"""The handwritten digits that come with scikit-learn: real data without a download.

1,797 images of 8 x 8 pixels in 17 grey levels (UCI "Optical Recognition of Handwritten Digits"),
here enlarged to 32 x 32 x 3 and split, always alike, into 1,437 training and 360 test images with
the classes in proportion. The split is by image, so writers occur on both sides: a small set to
try things on, not a benchmark.
"""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F

from mdistiller.dataset.data_source import DATASETS, DataSource, ImageSet, Options, Split
from mdistiller.dataset.split import hold_out

_NUM_TEST = 360


@DATASETS.register("digits")
class Digits(DataSource):
    """Ten classes; augmented by shifts of up to 2 pixels and never mirrored (a 2 is not an S)."""

    augment = "crop"
    zoo = "cifar"
    mean, std = (0.3059, 0.3059, 0.3059), (0.3241, 0.3241, 0.3241)  # of the training images

    def load(self, root: Path, split: Split, options: Options) -> ImageSet:
        from sklearn.datasets import load_digits

        grey, labels = load_digits(return_X_y=True)
        small = torch.from_numpy(grey).float().view(-1, 1, 8, 8) * (255 / 16)
        large = F.interpolate(small, size=(32, 32), mode="bilinear", align_corners=False)
        images = large.round().to(torch.uint8).expand(-1, 3, -1, -1)
        targets = torch.from_numpy(labels).long()
        train, test = hold_out(targets, _NUM_TEST, seed=0)
        digits = ImageSet(images, targets, [str(digit) for digit in range(10)])
        return digits.select(train if split == "train" else test)
