"""Generated images, and an untrained distiller, for the step benchmark."""

from __future__ import annotations

import itertools
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset

from mdistiller.dataset import DATASETS, Data, DataSource, ImageSet, load_data
from mdistiller.dataset.data_source import Options
from mdistiller.distillers import Distiller, get_distiller
from mdistiller.engine.cfg import Config
from mdistiller.networks.network import build_network
from mdistiller.registry import UserError
from mdistiller.run.build import build_distiller

GENERATED = "generated_images"
SIZES = {"cifar": 32, "tiny_imagenet": 64, "imagenet": 224}
CLASSES = {"cifar10": 10, "digits": 10, "cifar": 100, "tiny_imagenet": 200, "imagenet": 1000}


def generated_data(cfg: Config, count: int, classes: int, device: torch.device) -> Data:
    """Random images in the place of the config's, read and augmented as those are.

    `cfg` is changed to name them. Without `classes`, their number is the data set's usual one.
    """
    kind = cfg.DATASET.TYPE
    source = DATASETS[kind]
    zoo = cfg.DATASET.ZOO or source.zoo
    classes = classes or CLASSES.get(kind, CLASSES[zoo])
    side = cfg.DATASET.IMAGE_SIZE or SIZES[zoo]

    class Generated(DataSource):
        root = "."
        mean, std = source.mean or (0.5,) * 3, source.std or (0.25,) * 3
        augment = source.augment

        def load(self, root: Path, split: str, options: Options) -> ImageSet:
            number = count if split == "train" else classes
            generator = torch.Generator().manual_seed(number)
            shape = (number, 3, side, side)
            images = torch.randint(256, shape, dtype=torch.uint8, generator=generator)
            return ImageSet(
                images, torch.arange(number) % classes, [str(i) for i in range(classes)]
            )

    Generated.zoo = zoo
    DATASETS.pop(GENERATED, None)
    DATASETS.add(GENERATED, Generated)
    cfg.DATASET.TYPE, cfg.DATASET.ROOT = GENERATED, ""
    return load_data(cfg, device, get_distiller(cfg.DISTILLER.TYPE).two_views)


def untrained_distiller(cfg: Config, data: Data, device: torch.device) -> Distiller:
    """The config's distiller as a run builds it. Its teacher knows the images' statistics only."""
    if not get_distiller(cfg.DISTILLER.TYPE).uses_teacher:
        return build_distiller(cfg, data, device)
    torch.manual_seed(0)
    teacher = build_network(cfg, "TEACHER", data, weights="")
    assert data.val is not None
    images = next(iter(data.val))[0].to(device)
    teacher.to(device)
    with torch.no_grad():
        for _ in range(3):
            teacher.train()(images[:64])
    teacher.cpu()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "teacher.pth"
        torch.save({"model": teacher.state_dict()}, path)
        return build_distiller(cfg, data, device, path)


class Short:
    """A loader cut to `steps` batches an epoch; going on through the data from one to the next."""

    def __init__(self, loader: Any, steps: int):
        self.loader, self.steps = loader, steps
        self.batches = endless(loader)

    def __len__(self) -> int:
        return self.steps

    def __getattr__(self, name: str) -> Any:
        if name == "set_epoch":  # the epochs are those of the whole loader
            raise AttributeError(name)
        return getattr(self.loader, name)

    def __iter__(self) -> Iterator[Any]:
        return itertools.islice(self.batches, self.steps)


def endless(loader: Any) -> Iterator[Any]:
    while True:
        yield from loader


class PillowImages(Dataset[Any]):
    """Items (transformed image, target, index) of a set in memory, through Pillow one by one."""

    def __init__(self, images: ImageSet, transform: Any):
        self.arrays = images.images.permute(0, 2, 3, 1).cpu().numpy()
        self.targets = images.targets.tolist()
        self.transform = transform

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, index: int) -> Any:
        image = self.transform(Image.fromarray(self.arrays[index]))
        return image, self.targets[index], index


def classic_loader(cfg: Config, data: Data, workers: int) -> Any:
    """A DataLoader over PIL images with version 1 of torchvision's transforms."""
    from torchvision import transforms

    height, width = data.image_size
    named: dict[str, list[Any]] = {
        "none": [],
        "crop": [transforms.RandomCrop((height, width), padding=height // 16)],
        "crop_flip": [
            transforms.RandomCrop((height, width), padding=height // 8),
            transforms.RandomHorizontalFlip(),
        ],
        "resized_crop_flip": [
            transforms.RandomResizedCrop((height, width)),
            transforms.RandomHorizontalFlip(),
        ],
    }
    kind = cfg.DATASET.AUGMENT
    kind = DATASETS[cfg.DATASET.TYPE].augment if kind == "default" else kind
    if kind not in named:
        raise UserError(f"the classic loop knows no DATASET.AUGMENT {kind}: set --loops ours bare")
    normalize = transforms.Normalize(data.mean, data.std)
    pipeline = transforms.Compose([*named[kind], transforms.ToTensor(), normalize])
    images = PillowImages(data.train.dataset, pipeline)
    return DataLoader(
        images,
        cfg.SOLVER.BATCH_SIZE,
        shuffle=True,
        num_workers=workers,
        pin_memory=data.train.dataset.images.is_cuda,
        persistent_workers=workers > 0,
    )
