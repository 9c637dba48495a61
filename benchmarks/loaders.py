"""The benchmark of loaders: ImageNet's training pipeline, ours against torchvision's plain one."""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from mdistiller.files.tables import markdown_table

IMAGES, CLASSES, SIZE = 500, 10, (500, 400)  # JPEGs of that width and height
QUALITY = 90


def write_images(root: Path) -> None:
    """Generated JPEGs, smooth shapes with noise, in the layout of ImageNet."""
    import torch
    import torch.nn.functional as F
    from PIL import Image

    width, height = SIZE
    for i in range(IMAGES):
        generator = torch.Generator().manual_seed(i)
        coarse = torch.rand(1, 3, 12, 10, generator=generator) * 220 + 15
        smooth = F.interpolate(coarse, size=(height, width), mode="bicubic")[0]
        pixels = smooth + 8 * torch.randn(3, height, width, generator=generator)
        folder = root / ("val" if i < CLASSES else "train") / f"n{i % CLASSES:08d}"
        folder.mkdir(parents=True, exist_ok=True)
        image = Image.fromarray(pixels.clamp(0, 255).byte().permute(1, 2, 0).numpy())
        image.save(folder / f"{i}.JPEG", quality=QUALITY)


def reference(root: Path, batch: int, workers: int, device: str) -> Iterable[Any]:
    """torchvision's ImageFolder, Pillow and version 1 of the transforms, and a DataLoader."""
    from torch.utils.data import DataLoader
    from torchvision import datasets, transforms

    pipeline = transforms.Compose(
        [
            transforms.RandomResizedCrop(224),
            transforms.RandomHorizontalFlip(),
            transforms.ToTensor(),
            transforms.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
        ]
    )
    return DataLoader(
        datasets.ImageFolder(root / "train", pipeline),
        batch,
        shuffle=True,
        num_workers=workers,
        pin_memory=device.startswith("cuda"),
        persistent_workers=workers > 0,  # as ours are: their start is not what is measured
    )


def ours(root: Path, batch: int, workers: int, device: str) -> Iterable[Any]:
    """The training loader of DATASET.TYPE imagenet."""
    from mdistiller.dataset import load_data
    from mdistiller.engine.cfg import load_config

    words = ["DATASET.TYPE", "imagenet", "DATASET.ROOT", str(root), "DEVICE", device]
    words += ["SOLVER.BATCH_SIZE", str(batch), "DATASET.NUM_WORKERS", str(workers)]
    return load_data(load_config("", words)).train


def epoch(loader: Iterable[Any], device: str) -> Callable[[], None]:
    """A call that takes every batch of an epoch to the device."""

    def step() -> None:
        for image, target, *_ in loader:
            image.to(device, non_blocking=True)
            target.to(device, non_blocking=True)

    return step


def loader(args: argparse.Namespace, device: str) -> list[dict[str, Any]]:
    """One row a pipeline: images per second of whole epochs, in turns."""
    from mdistiller.cli.support.timing import race

    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        write_images(root)
        forms = {"ours": ours, "torchvision": reference}
        steps = {
            name: epoch(make(root, args.batch, args.workers, device), device)
            for name, make in forms.items()
        }
        times = race(steps, device, args.rounds, wall=True)
    count = IMAGES - CLASSES
    rows: list[dict[str, Any]] = []
    lines = []
    for name, taken in times.items():
        rate = {key: 1e3 * count / taken[key] for key in ("ms", "high", "low")}
        ratio = times["torchvision"]["ms"] / taken["ms"]
        quartiles = f"{rate['high']:.0f}-{rate['low']:.0f}"
        lines.append([name, f"{rate['ms']:.0f}", quartiles, f"{ratio:.2f}"])
        rows.append({"loader": name, "images_per_second": rate["ms"], "ratio": ratio, **taken})
    print(markdown_table(["loader", "images/s", "quartiles", "ratio"], lines))
    return rows
