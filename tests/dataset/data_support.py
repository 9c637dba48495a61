"""Configs, loaders and image files that the tests of this folder share."""

import numpy as np
import torch
from PIL import Image
from yacs.config import CfgNode

from mdistiller.dataset import DATASET_CONFIG, ImageSet
from mdistiller.dataset.memory.augment import AUGMENTS
from mdistiller.dataset.memory.loader import EvalLoader, TrainLoader

CPU = torch.device("cpu")
MEAN, STD = (0.5071, 0.4867, 0.4408), (0.2675, 0.2565, 0.2761)


def config(kind, batch_size=4, seed=0, **dataset):
    """A config node with the defaults of DATASET and the given keys."""
    cfg = CfgNode(
        {
            "DATASET": DATASET_CONFIG,
            "SOLVER": {"BATCH_SIZE": batch_size},
            "EXPERIMENT": {"SEED": seed},
            "DEVICE": "cpu",
        }
    )
    cfg.DATASET.TYPE = kind
    for key, value in dataset.items():
        cfg.DATASET[key] = str(value) if key == "ROOT" else value
    return cfg


def random_images(num, size=(32, 32), seed=0):
    """uint8 [num, 3, H, W]: smooth shapes with noise, never 0, unlike padding."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(num, 3, 5, 5, generator=generator) * 200 + 20
    smooth = torch.nn.functional.interpolate(coarse, size=size, mode="bicubic")
    noise = torch.rand(num, 3, *size, generator=generator) * 20
    return (smooth + noise).clamp(1, 255).to(torch.uint8)


def image_set(num, classes=4, size=(32, 32)):
    return ImageSet(
        random_images(num, size), torch.arange(num) % classes, list("abcdefghij")[:classes]
    )


def train_loader(
    num=50, batch_size=8, augment="crop_flip", size=(32, 32), kind=TrainLoader, **options
):
    data = image_set(num, size=size)
    return kind(data, batch_size, AUGMENTS[augment](size), MEAN, STD, CPU, **options)


def eval_loader(num=50, batch_size=8, **options):
    return EvalLoader(image_set(num), batch_size, MEAN, STD, CPU, **options)


def collect(loader):
    """All batches of one iteration joined: (images, targets, index)."""
    return [torch.cat(parts) for parts in zip(*loader, strict=True)]


def write_image(path, pixels):
    """Save uint8 [H, W, 3] (or [H, W], grey) at `path`, making its folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.asarray(pixels, dtype=np.uint8)).save(path)
    return path


def flat(colour, size=(8, 8)):
    """An image of one colour: uint8 [H, W, 3]."""
    return np.full((*size, 3), colour, dtype=np.uint8)


def write_folders(root, per_class=3, classes=("cat", "dog"), test="val", size=(8, 8)):
    """ROOT/train/CLASS/*.png and ROOT/val/CLASS/*.png; the red level is 10 * class + number."""
    for split in ("train", test):
        for label, name in enumerate(classes):
            for k in range(per_class):
                write_image(
                    root / split / name / f"{k}.png", flat((10 * label + k, 100, 200), size)
                )
    return root


def one_line(error):
    """The text of a UserError, which must be a single line."""
    text = str(error.value)
    assert "\n" not in text
    return text
