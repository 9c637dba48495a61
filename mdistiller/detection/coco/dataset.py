"""COCO-format detection data sets: resized and flipped images with their objects."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mdistiller.dataset.files.corrupt import find_corrupt
from mdistiller.dataset.files.file_set import FileSet
from mdistiller.dataset.files.images import read_image, resize
from mdistiller.detection.coco.annotations import read_annotations
from mdistiller.detection.coco.labels import COCO91, label_of
from mdistiller.detection.coco.masks import draw_mask
from mdistiller.detection.coco.repairs import ImageFiles
from mdistiller.registry import UserError
from mdistiller.runtime import local_rank


@dataclass(frozen=True)
class View:
    """The transform of an image: its position in the set, its shorter side, whether it is flipped.

    Attributes:
        masks: whether masks are returned, if the set has them.
    """

    index: int
    min_size: int
    max_size: int
    flip: bool = False
    masks: bool = True


class CocoDetectionSet:
    """Images of a folder with the objects of a COCO annotation file.

    Images come in the order of their ids. Crowd regions are not objects.

    Args:
        images: the folder.
        annotations: the file.
        label_space: see `data.DATA`.
        masks: objects need masks, and targets have them, too.
        mend: whether DETECTION.DATA.BAD_ANNOTATIONS is fix.
        keep_empty: keep images without objects.
        exif: see `EXIF` in `data.DATA`.
        skip_corrupt: leave out missing and unreadable images, and print which.
        threads: number of threads that check the images.
        split: TRAIN or VAL, for errors.

    Attributes:
        num_classes: labels including the background.
        category_ids: category id by label.
        class_names: by label; the background is the first; unused labels of coco91 are "".
        annotations: the file's contents.

    Raises:
        UserError: a file is missing or invalid; see `annotations`.
    """

    def __init__(
        self,
        images: Path | str,
        annotations: Path | str,
        *,
        label_space: str = "contiguous",
        masks: bool = False,
        mend: bool = False,
        keep_empty: bool = True,
        exif: bool = True,
        skip_corrupt: bool = False,
        threads: int = 2,
        split: str = "VAL",
    ):
        self.folder, self.exif, self.masks = Path(images), exif, masks
        self.split = split
        if not self.folder.is_dir():
            raise UserError(
                f"there is no image folder {self.folder}; set DETECTION.DATA.{split}_IMAGES"
            )
        key = f"DETECTION.DATA.{split}_ANNOTATIONS"
        pictures = ImageFiles(self.folder, exif, skip_corrupt)
        self.annotations = read_annotations(
            Path(annotations), key, pictures, segmentations=masks, mend=mend
        )
        self._name_labels(label_space)
        self.positions = np.arange(len(self.annotations.image_ids))
        if not keep_empty:
            self._drop_empty()
        if skip_corrupt:
            self._drop_corrupt(threads)
        else:
            self._require_images()
        if local_rank() == 0:
            print(self.describe(), file=sys.stderr, flush=True)

    def __len__(self) -> int:
        return len(self.positions)

    def _name_labels(self, space: str) -> None:
        annotations = self.annotations
        labels = label_of(annotations.categories, space, annotations.path)
        self.num_classes = COCO91 if space == "coco91" else len(labels) + 1
        self.category_ids = {label: number for number, label in labels.items()}
        self.class_names = ["background", *[""] * (self.num_classes - 1)]
        for number, label in labels.items():
            self.class_names[label] = annotations.categories[number]
        self.labels = np.array([labels[n] for n in annotations.category_ids.tolist()], np.int64)

    def _drop_empty(self) -> None:
        filled = np.flatnonzero(np.diff(self.annotations.starts))
        self.annotations.counts["images without objects"] = len(self.positions) - len(filled)
        if not len(filled):
            raise UserError(
                f"{self.annotations.path}: every object is a crowd region; name another "
                f"file by DETECTION.DATA.{self.split}_ANNOTATIONS"
            )
        self.positions = filled

    def _drop_corrupt(self, threads: int) -> None:
        names = self.annotations.names[self.positions]
        files = FileSet(self.folder, names, torch.zeros(len(names)), [])
        bad = find_corrupt(files, threads)
        self.annotations.counts["unreadable images"] = len(bad)
        self.positions = np.delete(self.positions, bad)
        if not len(self):
            raise UserError(f"no image of {self.annotations.path} in {self.folder} can be read")

    def _require_images(self) -> None:
        """Refuse missing image files; damaged ones are found when they are read."""
        for index in range(len(self)):
            path = self.path(index)
            if not path.is_file():
                slashes = "mend \\ to / by DETECTION.DATA.BAD_ANNOTATIONS fix, "
                raise UserError(
                    f"image {self.written_id(index)} of {self.annotations.path} is missing: there "
                    f"is no file {path}; get it, or set DETECTION.DATA.{self.split}_IMAGES, or "
                    f"{slashes if chr(92) in path.name else ''}leave such images out by "
                    "DATASET.SKIP_CORRUPT True"
                )

    def describe(self) -> str:
        """Images, objects, classes, the smallest class, and what was left out, in one line."""
        left = [f"{number} {what}" for what, number in self.annotations.counts.items() if number]
        objects = int(np.diff(self.annotations.starts)[self.positions].sum())
        counts = np.bincount(self.labels, minlength=self.num_classes)
        fewest = min(self.category_ids, key=lambda label: counts[label])
        return (
            f"{self.annotations.path.name}: {len(self)} images, {objects} objects, "
            f"{len(self.category_ids)} classes (fewest: {counts[fewest]} of "
            f"{self.class_names[fewest]}){'; left out or mended: ' if left else ''}"
            f"{', '.join(left)}"
        )

    def path(self, index: int) -> Path:
        """File of the image at a position."""
        return self.folder / self.annotations.names[self.positions[index]].decode()

    def image_id(self, index: int) -> int:
        """Its id in the annotation file, as a number if that is text."""
        return int(self.annotations.image_ids[self.positions[index]])

    def written_id(self, index: int) -> int | str:
        """Its id as in the annotation file."""
        return self.annotations.written_image(self.image_id(index))

    @property
    def portrait(self) -> np.ndarray:
        """Whether each image is higher than wide: bool [N]."""
        height, width = self.annotations.sizes[self.positions].T
        return np.asarray(height > width)

    def image(self, index: int) -> Tensor:
        """The image at a position: uint8 [3, H, W], RGB.

        Raises:
            UserError: it cannot be read, or has another size than the annotation file says.
        """
        path = self.path(index)
        pixels = read_image(path, upright=self.exif)
        height, width = self.annotations.sizes[self.positions[index]].tolist()
        if tuple(pixels.shape[1:]) != (height, width):
            turned = tuple(pixels.shape[1:]) == (width, height)
            exif = f", or set DETECTION.DATA.EXIF {not self.exif}" if turned else ""
            raise UserError(
                f"{path} is {pixels.shape[2]}x{pixels.shape[1]} pixels, but {self.annotations.path}"
                f" says {width}x{height} of image {self.written_id(index)}; mend either{exif}"
            )
        return pixels

    def item(self, view: View) -> tuple[Tensor, dict[str, Any]]:
        """A transformed image, and its objects.

        Returns:
            uint8 [3, H, W]; and `boxes` float32 [N, 4] (x1, y1, x2, y2 in its pixels), `labels`
            int64 [N], `image_id`, `size` (height, width before the resize), with masks `masks`
            uint8 [N, H, W].
        """
        image, annotations = self.image(view.index), self.annotations
        height, width = image.shape[1:]
        new = resized_shape(height, width, view.min_size, view.max_size)
        image = resize(image, *new)
        where = annotations.objects(int(self.positions[view.index]))
        boxes = annotations.boxes[where] * np.tile([new[1] / width, new[0] / height], 2)
        if view.flip:
            image = image.flip(2)
            boxes = np.stack(
                [new[1] - boxes[:, 2], boxes[:, 1], new[1] - boxes[:, 0], boxes[:, 3]], 1
            )
        target: dict[str, Any] = {
            "boxes": torch.from_numpy(boxes.astype(np.float32)),
            "labels": torch.from_numpy(self.labels[where]),
            "image_id": self.image_id(view.index),
            "size": (height, width),
        }
        if self.masks and view.masks:
            target["masks"] = self._masks(where, (height, width), new, view.flip)
        return image, target

    def _masks(
        self, where: slice, size: tuple[int, int], new: tuple[int, int], flip: bool
    ) -> Tensor:
        """uint8 [N, H, W]."""
        segments = self.annotations.segmentations
        assert segments is not None
        masks = np.zeros((where.stop - where.start, *new), np.uint8)
        for mask, number in zip(masks, range(where.start, where.stop), strict=True):
            mask[:] = draw_mask(segments[number], *size, new)
        drawn = torch.from_numpy(masks)
        return drawn.flip(2) if flip else drawn


def resized_shape(height: int, width: int, min_size: int, max_size: int) -> tuple[int, int]:
    """Height and width with the shorter side at `min_size`, unless the longer exceeds `max_size`.

    Rounded to the nearest pixel, as detectron2 does (torchvision's detectors round down).
    """
    scale = min(min_size / min(height, width), max_size / max(height, width))
    return tuple(max(1, int(side * scale + 0.5)) for side in (height, width))  # type: ignore[return-value]
