"""Classify images of one's own: :class:`Predictor`, and its answers.

`load_predictor` in `load.py` makes a predictor from a run folder or an exported file.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from mdistiller.dataset.files.folder import is_image
from mdistiller.dataset.memory.loader import Normalize
from mdistiller.preprocessing import RESIZE, Preprocessing
from mdistiller.registry import UserError

Image = Any
"""A path, a PIL image, uint8 pixels [H, W] or [H, W, 3], or a uint8 tensor [3, H, W]."""
_THREADS = 8  # that decode images, at most


@dataclass(frozen=True)
class Prediction:
    """What a network says of an image.

    Attributes:
        image: its path; empty for an image in memory.
        top: (class, probability) of the most probable classes, the most probable one first.
        truth: the image's class; empty if it is not known.
        truth_probability: what the network gives the true class; None without one.
    """

    image: str
    top: list[tuple[str, float]]
    truth: str = ""
    truth_probability: float | None = None

    @property
    def label(self) -> str:
        """The most probable class."""
        return self.top[0][0]

    @property
    def probability(self) -> float:
        """The probability of the most probable class, in 0..1."""
        return self.top[0][1]

    @property
    def wrong(self) -> bool:
        """Whether the true class is known, and is another than the predicted one."""
        return bool(self.truth) and self.truth != self.label


@dataclass
class Predictor:
    """A trained network with the preprocessing and class names that it was trained with.

    Attributes:
        name: what to call it.
        logits: prepared images, float32 [B, 3, H, W] on `device`, to logits [B, classes].
        classes: their names, by output.
        image_size: (height, width) in pixels.
        normalization: mean and std of each channel; None if `logits` takes values in [0, 1].
        preprocessing: how images are brought to their size.
        device: where `logits` runs.
        upright: rotate images by their EXIF orientation (DATASET.EXIF).
        scale_16_bit: scale grey images of 16 bits to 8 (DATASET.SCALE_16_BIT).
        channels: of the images, 1 grey, 3 RGB, 4 RGBA.
        network: the module in eval mode, float32, for normalised images; None for ONNX and pt2.
        model: of an exported file, the network's name in its zoo.
    """

    name: str
    logits: Callable[[Tensor], Tensor]
    classes: Sequence[str]
    image_size: tuple[int, int]
    normalization: tuple[Sequence[float], Sequence[float]] | None
    preprocessing: Preprocessing
    device: torch.device
    upright: bool = True
    scale_16_bit: bool = False
    network: nn.Module | None = None
    channels: int = 3
    model: str = ""

    def predict(self, images: Any, topk: int = 5) -> Any:
        """The predictions for an image, for several, or for all images below a folder.

        Args:
            images: an image (see :data:`Image`), a folder, or a list or other iterable of images.
            topk: how many classes `Prediction.top` has.

        Returns:
            A :class:`Prediction` for one image, else a list of them in order.

        Raises:
            UserError: an image cannot be read, or `images` are none of these.
        """
        if isinstance(images, str | os.PathLike):
            if Path(images).is_dir():
                return list(self.stream(find_images(Path(images), self.classes), topk))
            return next(self.stream([(images, "")], topk))
        if hasattr(images, "convert") or isinstance(images, np.ndarray | Tensor):
            return next(self.stream([(images, "")], topk))
        if not isinstance(images, Iterable):
            raise UserError(
                "predict takes an image (path, PIL image, array or tensor), a folder, or a list of "
                f"images, not {images!r}"
            )
        return list(self.stream(((image, "") for image in images), topk))

    @torch.inference_mode()
    def stream(
        self,
        images: Iterable[tuple[Image, str]],
        topk: int = 5,
        batch_size: int = 64,
        unreadable: Callable[[Image, UserError], None] | None = None,
    ) -> Iterator[Prediction]:
        """Predictions one after the other, a batch in memory at a time.

        Args:
            images: images with their true class, empty if it is not known.
            unreadable: is called for an image that cannot be read; None: that is an error.
        """
        with ThreadPoolExecutor(min(_THREADS, os.cpu_count() or 1)) as pool:
            for batch in _batches(images, batch_size):
                readings = list(pool.map(self._try_to_prepare, [image for image, _ in batch]))
                ready, pixels = [], []
                for item, reading in zip(batch, readings, strict=True):
                    if isinstance(reading, Tensor):
                        ready.append(item)
                        pixels.append(reading)
                    elif unreadable is None:
                        raise reading
                    else:
                        unreadable(item[0], reading)
                if ready:
                    yield from self._answer(ready, torch.stack(pixels), topk)

    def prepare(self, image: Image) -> Tensor:
        """An image at the network's size: uint8 [3, H, W].

        Raises:
            UserError: it cannot be read.
        """
        from mdistiller.dataset.files.images import resize, resize_to_size

        pixels = read_pixels(image, self.upright, self.scale_16_bit, self.channels)
        height, width = self.image_size
        if self.preprocessing.resize in RESIZE:
            return resize_to_size(pixels, (height, width), self.preprocessing)
        return resize(pixels, height, width, self.preprocessing.interpolation)

    def _try_to_prepare(self, image: Image) -> Tensor | UserError:
        try:
            return self.prepare(image)
        except UserError as error:
            return error

    def _answer(
        self, batch: Sequence[tuple[Image, str]], pixels: Tensor, topk: int
    ) -> Iterator[Prediction]:
        """Predictions for prepared images, uint8 [B, 3, H, W]."""
        mean, std = self.normalization or ((0.0,) * self.channels, (1.0,) * self.channels)
        images = Normalize(mean, std, self.device)(pixels.to(self.device))
        probabilities = self.logits(images).float().softmax(dim=1).cpu()
        if probabilities.shape[1] != len(self.classes) or not probabilities.isfinite().all():
            raise UserError(
                f"{self.name} gives NaN, or other than one logit for each of its "
                f"{len(self.classes)} classes"
            )
        values, indices = probabilities.topk(min(topk, len(self.classes)), dim=1)
        for i, (image, truth) in enumerate(batch):
            names = [self.classes[k] for k in indices[i].tolist()]
            its = float(probabilities[i, self.classes.index(truth)]) if truth else None
            path = str(image) if isinstance(image, str | os.PathLike) else ""
            yield Prediction(path, list(zip(names, values[i].tolist(), strict=True)), truth, its)


def read_pixels(
    image: Image, upright: bool = True, scale_16_bit: bool = False, channels: int = 3
) -> Tensor:
    """The pixels of an image of any kind of :data:`Image`: uint8 [channels, H, W].

    Raises:
        UserError: it cannot be read, or has another type or shape.
    """
    from PIL import ImageOps

    from mdistiller.dataset.files.images import MODES, pixels_of, read_image

    if isinstance(image, str | os.PathLike):
        return read_image(Path(image), upright, scale_16_bit, channels)
    if hasattr(image, "convert"):  # of PIL
        if image.mode[0] in "IF":
            raise UserError(
                f"the image has more than 8 bits a channel (mode {image.mode}); convert it to 8"
            )
        turned = ImageOps.exif_transpose(image) if upright else image
        image = pixels_of(turned.convert(MODES[channels]))
    if isinstance(image, np.ndarray):
        if image.dtype == np.uint8 and image.ndim == 2:
            image = np.repeat(image[..., None], channels, axis=2)
            image[..., 3:] = 255  # opaque
        image = torch.from_numpy(np.array(image))
        image = image.permute(2, 0, 1) if image.ndim == 3 else image
    fits = isinstance(image, Tensor) and image.shape[:-2] == (channels,)
    if not fits or image.dtype != torch.uint8:
        kind = f"{image.dtype} {list(image.shape)}" if isinstance(image, Tensor) else repr(image)
        raise UserError(
            f"an image is a path, a PIL image, a uint8 array [H, W, {channels}] "
            f"({MODES[channels]}) or [H, W], or a uint8 tensor [{channels}, H, W]; got {kind[:80]}"
        )
    return image.cpu()


def find_images(folder: Path, classes: Sequence[str] = ()) -> list[tuple[str, str]]:
    """Paths of all images below a folder, sorted, with the true class of each.

    The true class is the folder right below `folder` that an image is in, if that is one of
    `classes`; else empty.

    Raises:
        UserError: there are none.
    """
    found = []
    for place, _, files in os.walk(folder):
        first = os.path.relpath(place, folder).split(os.sep)[0]
        truth = first if first in classes else ""
        found += [(os.path.join(place, name), truth) for name in files if is_image(name)]
    if not found:
        raise UserError(f"folder {folder} has no images (files that end in .jpg, .png or the like)")
    return sorted(found, key=lambda pair: pair[0].split(os.sep))


def _batches(items: Iterable[Any], size: int) -> Iterator[list[Any]]:
    """Lists of up to `size` items."""
    rest = iter(items)
    while batch := list(islice(rest, size)):
        yield batch
