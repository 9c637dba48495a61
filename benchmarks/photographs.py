"""The benchmark of large JPEGs: DATASET.JPEG_SCALING off against train and all, at 224 pixels."""

from __future__ import annotations

import argparse
import os
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from benchmarks.loaders import QUALITY, epoch

SIZES = {(4000, 3000): 200, (500, 400): 400}  # width and height: number of JPEGs
DISTINCT = 8  # generated; the other files are links to them


def write_photographs(root: Path, width: int, height: int, number: int) -> None:
    """Generated JPEGs with detail of all scales, half of them in train/ and half in val/."""
    import torch
    import torch.nn.functional as F
    from PIL import Image

    for i in range(number):
        folder = root / ("train", "val")[i % 2] / f"class{i // 2 % 2}"
        folder.mkdir(parents=True, exist_ok=True)
        file = folder / f"{i}.jpg"
        if i >= DISTINCT:
            os.link(root / f"{i % DISTINCT}.jpg", file)
            continue
        generator = torch.Generator().manual_seed(i)
        pixels = 4 * torch.randn(1, 3, height, width, generator=generator)
        for cells, strength in ((10, 150), (height // 20, 30), (height // 5, 20)):
            coarse = torch.rand(1, 3, cells, cells, generator=generator) * strength
            pixels += F.interpolate(coarse, size=(height, width), mode="bilinear")
        image = Image.fromarray(pixels[0].clamp(0, 255).byte().permute(1, 2, 0).numpy())
        image.save(root / f"{i}.jpg", quality=QUALITY)
        os.link(root / f"{i}.jpg", file)


def photographs(args: argparse.Namespace, device: str) -> list[dict[str, Any]]:
    """One row for each size and use: images per second of CPU time, decoded in this process."""
    from mdistiller.cli.support.timing import race

    rows = []
    print("| JPEGs | use | none, images/s | scaled, images/s | ratio |\n|---|---|---|---|---|")
    for (width, height), number in SIZES.items():
        with tempfile.TemporaryDirectory() as folder:
            root = Path(folder)
            write_photographs(root, width, height, number)
            for use, key in (("train", "train"), ("eval", "all")):
                steps = {
                    name: epoch(_loader(root, args.batch, device, use, name), device)
                    for name in ("none", key)
                }
                times = race(steps, device, args.rounds)
                rate = {name: 1e3 * (number // 2) / times[name]["ms"] for name in times}
                ratio = rate[key] / rate["none"]
                cells = f"{width}x{height} | {use} | {rate['none']:.1f} | {rate[key]:.1f}"
                print(f"| {cells} | {ratio:.2f} |", flush=True)
                row = {"width": width, "height": height, "use": use, "ratio": ratio}
                rows.append({**row, "images_per_second": rate, "times": times})
    return rows


def _loader(root: Path, batch: int, device: str, use: str, scaling: str) -> Iterable[Any]:
    from mdistiller.dataset import load_data
    from mdistiller.engine.cfg import load_config

    words = ["DATASET.TYPE", "imagefolder", "DATASET.ROOT", str(root), "DEVICE", device]
    words += ["DATASET.AUGMENT", "resized_crop_flip", "DATASET.JPEG_SCALING", scaling]
    words += ["DATASET.MEAN", "[0.5, 0.5, 0.5]", "DATASET.STD", "[0.2, 0.2, 0.2]"]
    words += ["SOLVER.BATCH_SIZE", str(batch), "DATASET.NUM_WORKERS", "0"]
    data = load_data(load_config("", words))
    assert data.val is not None
    return data.train if use == "train" else data.val
