"""Reading folders of image files into memory."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from mdistiller.dataset._base import ImageSet, Options
from mdistiller.registry import UserError

SUFFIXES = frozenset([".jpg", ".jpeg", ".png", ".ppm", ".pgm", ".bmp", ".tif", ".tiff", ".webp"])
_CHUNK = 64  # files that a thread decodes at a time


def is_image(path: Path) -> bool:
    """Whether the name is that of an image; hidden files are not."""
    return path.suffix.lower() in SUFFIXES and not path.name.startswith(".")


def class_folders(folder: Path, ignore: Collection[str] = ()) -> list[str]:
    """Sorted names of the folders in `folder`, without hidden ones and those in `ignore`."""
    if not folder.is_dir():
        raise UserError(f"{folder} is missing; it should hold one folder of images for each class")
    names = sorted(f.name for f in folder.iterdir() if f.is_dir() and not f.name.startswith("."))
    return [name for name in names if name not in ignore]


def load_class_folders(folder: Path, classes: Sequence[str], options: Options) -> ImageSet:
    """All images in ``folder/CLASS/``, at any depth, sorted by class and path."""
    if not classes:
        raise UserError(f"{folder} has no class folders; put the images of each class in one")
    files: list[Path] = []
    targets: list[int] = []
    for target, name in enumerate(classes):
        found = sorted(path for path in (folder / name).rglob("*") if is_image(path))
        if not found:
            raise UserError(f"class folder {folder / name} has no images; add some or remove it")
        files += found
        targets += [target] * len(found)
    return load_files(files, targets, classes, options)


def load_files(
    files: Sequence[Path], targets: Sequence[int], classes: Sequence[str], options: Options
) -> ImageSet:
    """Decode image files to RGB, in threads.

    Args:
        files: N paths, at least one.
        targets: N class indices.
        classes: class names.
        options: see :class:`Options`.

    Raises:
        UserError: a file is broken, sizes differ, or the images would not fit.
    """
    side = options.image_size
    height, width = (side, side) if side else _decode(files[0], 0).shape[:2]
    gigabytes = len(files) * 3 * height * width / 1e9
    if gigabytes > options.max_memory_gb:
        raise UserError(
            f"{len(files)} images of {width}x{height} pixels beside {files[0]} take "
            f"{gigabytes:.1f} GB, more than DATASET.MAX_MEMORY_GB {options.max_memory_gb:g}; "
            "lower DATASET.IMAGE_SIZE or raise DATASET.MAX_MEMORY_GB"
        )
    images = np.empty((len(files), 3, height, width), dtype=np.uint8)

    def fill(start: int) -> None:
        for i in range(start, min(start + _CHUNK, len(files))):
            pixels = _decode(files[i], side)
            if pixels.shape != (height, width, 3):
                raise UserError(
                    f"{files[0]} is {width}x{height} pixels but {files[i]} is "
                    f"{pixels.shape[1]}x{pixels.shape[0]}; set DATASET.IMAGE_SIZE to resize all"
                )
            images[i] = pixels.transpose(2, 0, 1)

    with ThreadPoolExecutor(options.workers) as pool:
        for _ in pool.map(fill, range(0, len(files), _CHUNK)):
            pass  # raises what a thread raised
    return ImageSet(torch.from_numpy(images), torch.tensor(targets), list(classes))


def _decode(path: Path, side: int) -> np.ndarray:
    """One image as uint8 [H, W, 3], resized to `side` x `side` (bilinear, antialiased) if not 0."""
    try:
        with Image.open(path) as file:
            mode = file.mode
            image = file.convert("RGB")
    except Exception as error:  # Pillow's decoders raise many kinds
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise UserError(
            f"{path} cannot be read as an image ({reason}); replace or remove it"
        ) from error
    if mode == "F" or mode.startswith("I"):  # Pillow cuts such values off at 255
        raise UserError(f"{path} has more than 8 bits a channel (mode {mode}); convert it to 8")
    if side and image.size != (side, side):
        image = image.resize((side, side), Image.Resampling.BILINEAR)
    return np.asarray(image)
