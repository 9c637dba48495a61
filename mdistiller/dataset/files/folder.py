"""Folders of image files: list them, and read them into memory."""

from __future__ import annotations

import os
import sys
from collections import Counter
from collections.abc import Collection, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from mdistiller.dataset.data_source import DataSource, ImageSet, Options, Split
from mdistiller.dataset.files.corrupt import drop_corrupt
from mdistiller.dataset.files.file_set import FileSet
from mdistiller.preprocessing import height_width
from mdistiller.registry import UserError
from mdistiller.runtime import local_rank

SUFFIXES = frozenset(
    [
        *(".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".ppm", ".pgm", ".pbm", ".pnm", ".bmp"),
        *(".tif", ".tiff", ".webp", ".gif"),
    ]
)
_SIGNATURES = (
    *(b"\xff\xd8\xff", b"\x89PNG", b"GIF8", b"BM", b"RIFF", b"II*\0", b"MM\0*"),
    *(b"P4", b"P5", b"P6"),
)
_CHUNK = 64  # files that a thread decodes at once


class FileSource(DataSource):
    """Base of data sets that are image files: `files` lists a split without reading the images."""

    def files(self, root: Path, split: Split) -> FileSet:
        """The files of one split; see :meth:`DataSource.load`."""
        raise NotImplementedError

    def readable_files(self, root: Path, split: Split, options: Options) -> FileSet:
        """`files`, without those that DATASET.SKIP_CORRUPT skips."""
        files = replace(
            self.files(root, split),
            upright=options.upright,
            scale_16_bit=options.scale_16_bit,
            jpeg_scaling=options.jpeg_scaling,
            channels=options.channels,
        )
        if not options.skip_corrupt:
            return files
        return drop_corrupt(files, options.workers)

    def load(self, root: Path, split: Split, options: Options) -> ImageSet:
        return load_files(self.readable_files(root, split, options), options)


def is_image(name: str) -> bool:
    """Whether a file name is that of an image; hidden files are not images."""
    return os.path.splitext(name)[1].lower() in SUFFIXES and not name.startswith(".")


def starts_as_image(path: str) -> bool:
    """Whether a file starts with the signature of an image format, for names without suffix."""
    try:
        with open(path, "rb") as file:
            return file.read(8).startswith(_SIGNATURES)
    except OSError:
        return False


def class_folders(folder: Path, ignore: Collection[str] = ()) -> list[str]:
    """Sorted names of the folders in `folder`, without hidden ones, `ignore`, and `__MACOSX`."""
    if not folder.is_dir():
        raise UserError(f"{folder} does not exist; expected one folder of images per class")
    names = sorted(f.name for f in folder.iterdir() if f.is_dir() and not f.name.startswith("."))
    return [name for name in names if name not in ignore and name != "__MACOSX"]


def list_class_folders(
    folder: Path, classes: Sequence[str], skipped: Counter[str] | None = None
) -> FileSet:
    """All images in ``folder/CLASS/``, at any depth, sorted by class and path.

    Args:
        skipped: counts the other files by suffix, except hidden ones.
    """
    if not classes:
        raise UserError(f"{folder} has no class folders; put the images of each class into one")
    names: list[str] = []
    targets: list[int] = []
    for target, name in enumerate(classes):
        images = list_images(folder, name, skipped)
        if not images:
            raise UserError(f"class folder {folder / name} has no images; add some or remove it")
        names += images
        targets += [target] * len(images)
    return FileSet.of(folder, names, targets, classes)


def list_images(folder: Path, name: str = "", skipped: Counter[str] | None = None) -> list[str]:
    """Paths below `folder` of all images in ``folder/name``, at any depth, sorted.

    Links to folders are followed, and each folder is read once.

    Args:
        skipped: counts the other files by suffix, except hidden ones.
    """
    images: list[str] = []
    seen: set[str] = set()
    for place, folders, files in os.walk(folder / name, followlinks=True):
        folders.sort()
        if (real := os.path.realpath(place)) in seen:  # a link to a folder that was read
            folders.clear()
            continue
        seen.add(real)
        for file in files:
            path, suffix = os.path.join(place, file), os.path.splitext(file)[1].lower()
            if is_image(file) or (not suffix and file[0] != "." and starts_as_image(path)):
                images.append(os.path.relpath(path, folder))
            elif skipped is not None and file[0] != ".":
                skipped[suffix or "no suffix"] += 1
    return sorted(images, key=lambda path: path.split(os.sep))


_printed: set[str] = set()  # a process lists a folder several times


def report_skipped(folder: Path, skipped: Counter[str]) -> None:
    """Print how many files of a folder are skipped, once on each machine."""
    kinds = ", ".join(f"{number} x {suffix}" for suffix, number in skipped.most_common(5))
    line = (
        f"{folder}: {skipped.total()} files do not have an image suffix and are skipped "
        f"({kinds}{', ...' if len(skipped) > 5 else ''})"
    )
    if skipped:
        print_once(line)


def print_once(line: str) -> None:
    """Print a line about files on stderr, once on each machine."""
    if local_rank() == 0 and line not in _printed:
        _printed.add(line)
        print(line, file=sys.stderr, flush=True)


def decoded_gigabytes(files: FileSet, height: int, width: int) -> float:
    """Memory of the images at that size, in 1e9 bytes."""
    return len(files) * files.channels * height * width / 1e9


def load_files(files: FileSet, options: Options) -> ImageSet:
    """Decode image files, in threads.

    Raises:
        UserError: a file is broken, sizes differ, or the images do not fit in memory.
    """
    size, how = height_width(options.image_size), options.preprocessing
    height, width = size if any(size) else files.image(0).shape[1:]
    gigabytes = decoded_gigabytes(files, height, width)
    if gigabytes > options.max_memory_gb:
        raise UserError(
            f"{len(files)} images of {width}x{height} pixels in {files.folder} take "
            f"{gigabytes:.1f} GB, more than DATASET.MAX_MEMORY_GB {options.max_memory_gb:g}; "
            "lower DATASET.IMAGE_SIZE, raise DATASET.MAX_MEMORY_GB, or set DATASET.LOADER workers"
        )
    images = torch.empty((len(files), files.channels, height, width), dtype=torch.uint8)

    def fill(start: int) -> None:
        for i in range(start, min(start + _CHUNK, len(files))):
            image = files.encoded(i).resized(size, how) if any(size) else files.image(i)
            check_size(image, height, width, files.path(i), files.path(0))
            images[i] = image

    with ThreadPoolExecutor(options.workers) as pool:
        for _ in pool.map(fill, range(0, len(files), _CHUNK)):
            pass  # raises the exceptions of threads
    return ImageSet(images, files.targets, files.classes, files.left_out)


def check_size(image: Tensor, height: int, width: int, path: Path | str, first: Path | str) -> None:
    """Raise UserError for an image whose size differs from that of the first one."""
    if image.shape[1:] != (height, width):
        raise UserError(
            f"{first} is {width}x{height} pixels but {path} is "
            f"{image.shape[2]}x{image.shape[1]}; set DATASET.IMAGE_SIZE to resize all"
        )
