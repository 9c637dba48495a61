"""Choose how images of any shape are resized: by the config, else by what fits the data."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch

from mdistiller.dataset.data_source import DataSource
from mdistiller.dataset.files.folder import FileSource
from mdistiller.dataset.files.resized_crop import ResizedCropFlip
from mdistiller.dataset.memory.augment import Identity
from mdistiller.preprocessing import INTERPOLATION, RESIZE, Preprocessing, height_width
from mdistiller.registry import UserError

DEFAULT_SIDE = 224  # of images cropped to a square, without DATASET.IMAGE_SIZE
_SAMPLE = 1024  # files of a split whose headers are read


class ImageShapes(NamedTuple):
    """Shapes of the images, from the headers of files.

    Attributes:
        square, same: whether all images are square, and whether all have one size.
        shortest: the shortest side in pixels.
    """

    square: bool
    same: bool
    shortest: int


def keeps_shape(source: DataSource, augment: type[Identity]) -> bool:
    """Whether images of all shapes are cropped to a square, never stretched."""
    return source.keep_shape or issubclass(augment, ResizedCropFlip)


def choose_preprocessing(
    node: Mapping[str, Any],
    source: DataSource,
    root: Path,
    augment: type[Identity],
    network: Preprocessing | None = None,
) -> Preprocessing:
    """The preprocessing of a data set's images for evaluation.

    Keys of the config come first, then `network`, then defaults that fit the data: square images
    are resized as a whole, others by the shorter side with a centre crop. Images of one size keep
    it unless a key or the network names another (`resize` is then "keep").

    Args:
        node: `DATASET`.
        network: preprocessing of the network to evaluate. A library's is ignored for square images
            smaller than the network's input, such as CIFAR's.
    """
    if network is not None and network.resize in ("", "keep"):  # gives at most a size
        side = network.image_size if network.recorded else 0
        network = Preprocessing(image_size=side, recorded=True) if side else None
    keys = Preprocessing(
        image_size=node["IMAGE_SIZE"],
        resize="" if node["RESIZE"] == "auto" else node["RESIZE"],
        crop_pct=node["CROP_PCT"],
        interpolation="" if node["INTERPOLATION"] == "auto" else node["INTERPOLATION"],
    )
    if keeps_shape(source, augment):
        base = network or Preprocessing()
        return _fill_unset(keys, base, Preprocessing(image_size=DEFAULT_SIDE, resize="crop"))
    if not isinstance(source, FileSource):  # arrays, which workers can enlarge
        return _kept_without_size(_fill_unset(keys, Preprocessing(resize="stretch")))
    whole = Preprocessing(resize="crop", crop_pct=1.0)
    decided = keys.resize and keys.image_size and (keys.resize != "crop" or keys.crop_pct)
    if decided and network is None:
        return keys
    shapes = read_shapes(source, root, node["EXIF"])
    usual = whole if shapes.square else Preprocessing(resize="crop")
    if network is None or not _applies(network, shapes):
        return _kept_without_size(_fill_unset(keys, usual))
    rest = Preprocessing(resize="crop") if network.resize else usual
    return _kept_without_size(_fill_unset(keys, network, rest))


def _applies(network: Preprocessing, shapes: ImageShapes) -> bool:
    """Whether a network's preprocessing applies to images of these shapes."""
    if not network.resize:  # nothing to do for images of its size
        return not (shapes.square and shapes.same and shapes.shortest == network.image_size)
    shortest = min(height_width(network.image_size))
    return network.recorded or not (shapes.square and shapes.shortest < shortest)


def _fill_unset(*layers: Preprocessing) -> Preprocessing:
    """Each field from the first layer that sets it; crop_pct only from one of the same resize."""
    merged = layers[0]
    for layer in layers[1:]:
        same = not (merged.resize and layer.resize) or merged.resize == layer.resize
        merged = Preprocessing(
            image_size=merged.image_size or layer.image_size,
            resize=merged.resize or layer.resize,
            crop_pct=merged.crop_pct or (layer.crop_pct if same else 0.0),
            interpolation=merged.interpolation or layer.interpolation,
        )
    return merged


def _kept_without_size(how: Preprocessing) -> Preprocessing:
    return how if how.image_size else replace(how, resize="keep", crop_pct=0.0)


def read_shapes(source: FileSource, root: Path, upright: bool) -> ImageShapes:
    """Shapes of the images of the splits that exist.

    Reads the headers of up to 1,024 evenly spaced files of each split, until they differ.
    """
    sizes: set[tuple[int, int]] = set()
    for size in _header_sizes(source, root, upright):
        sizes.add(size)
        if len(sizes) > 1 and any(height != width for height, width in sizes):
            break
    square = all(height == width for height, width in sizes)
    return ImageShapes(square, len(sizes) < 2, min((min(size) for size in sizes), default=0))


def _header_sizes(source: FileSource, root: Path, upright: bool) -> Iterator[tuple[int, int]]:
    from mdistiller.dataset.files.images import header_size  # imports torchvision, which is slow

    for split in ("test", "train"):
        with contextlib.suppress(UserError):  # a missing split is reported when it is read
            files = source.files(root, split)
            for i in torch.linspace(0, len(files) - 1, min(_SAMPLE, len(files))).long().tolist():
                size = header_size(files.path(i), upright)
                if size is not None:
                    yield size


def check_keys(node: Mapping[str, Any]) -> None:
    """Raise UserError for invalid values of RESIZE, CROP_PCT, INTERPOLATION and JPEG_SCALING."""
    for key, choices in (("RESIZE", RESIZE), ("INTERPOLATION", INTERPOLATION)):
        if node[key] not in ("auto", *choices):
            raise UserError(f"DATASET.{key} must be auto, {', '.join(choices)}, got {node[key]!r}")
    if node["JPEG_SCALING"] not in ("none", "train", "all"):
        raise UserError(
            f"DATASET.JPEG_SCALING must be none, train or all, got {node['JPEG_SCALING']!r}"
        )
    if node["CROP_PCT"] and not 0.1 <= node["CROP_PCT"] <= 2:
        raise UserError(
            f"DATASET.CROP_PCT {node['CROP_PCT']:g} must be from 0.1 to 2 (0.875 crops 224 pixels "
            "from 256), or 0 for the default"
        )
