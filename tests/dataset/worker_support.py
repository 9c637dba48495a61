"""ImageNet's layout in small, and its data as one process or another sees them."""

import numpy as np
import pytest
from data_support import config, write_image
from PIL import Image

from mdistiller.dataset import load_data

STATISTICS = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
WNIDS = ("n01440764", "n01443537", "n01484850")


def photo(seed, size=(70, 90)):
    """uint8 [H, W, 3]: smooth colours with some noise."""
    rng = np.random.default_rng(seed)
    small = Image.fromarray(rng.integers(30, 226, (5, 6, 3), dtype=np.uint8))
    smooth = np.asarray(small.resize(size[::-1], Image.Resampling.BICUBIC), dtype=np.int16)
    return (smooth + rng.integers(-9, 10, smooth.shape)).clip(0, 255).astype(np.uint8)


def write_imagenet(root, train=8, val=3):
    """3 classes of training and validation JPEGs of many sizes; returns `root`."""
    for split, number in (("train", train), ("val", val)):
        for label, wnid in enumerate(WNIDS):
            for k in range(number):
                size = (60 + 7 * k, 100 - 9 * k)
                path = root / split / wnid / f"{wnid}_{k}.JPEG"
                write_image(path, photo(100 * label + k, size))
    return root


def imagenet(folder, workers=0, rank=None, world_size=None, **keys):
    """Data of that folder at 32 pixels; as one of several processes if a rank is given."""
    keys = {"NUM_WORKERS": workers, "IMAGE_SIZE": 32, **keys}
    with pytest.MonkeyPatch.context() as patch:
        if rank is not None:
            patch.setattr("mdistiller.runtime.rank", lambda: rank)
            patch.setattr("mdistiller.runtime.world_size", lambda: world_size)
        return load_data(config("imagenet", ROOT=folder, **keys))
