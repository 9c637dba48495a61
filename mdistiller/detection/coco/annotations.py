"""Read and check COCO annotation files; they are kept as arrays that worker processes share.

Invalid entries are refused in one line that names the file, the image and the annotation. Common
faults of real files (boxes without area, boxes that exceed the image, ids that are text, images
without a size) are refused, or repaired and counted, as DETECTION.DATA.BAD_ANNOTATIONS says.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from mdistiller.config.safe_yaml import shown
from mdistiller.detection.coco.masks import finite_number, polygon_parts, rle_counts
from mdistiller.detection.coco.repairs import (
    LARGEST_SIDE,
    SLACK,
    ImageFiles,
    area_fault,
    number_ids,
)
from mdistiller.registry import UserError

LEAST_SIDE = 0.01  # pixels; a shorter side would vanish in float32 when the image is resized
_FIX = "set DETECTION.DATA.BAD_ANNOTATIONS fix"


class Packed:
    """Plain values as one array of bytes: objects would be copied into each worker process."""

    def __init__(self, items: Iterable[Any]):
        parts = [json.dumps(item).encode() for item in items]
        self._ends = np.cumsum([0, *map(len, parts)])
        self._bytes = np.frombuffer(b"".join(parts), np.uint8)

    def __len__(self) -> int:
        return len(self._ends) - 1

    def __getitem__(self, index: int) -> Any:
        return json.loads(self._bytes[self._ends[index] : self._ends[index + 1]].tobytes())


@dataclass
class Annotations:
    """The contents of a file: N images in the order of their ids, and A objects (no crowds).

    Attributes:
        path: the file.
        categories: names by category id, in the order of the ids.
        image_ids: int64 [N].        names: file names, as bytes [N].
        sizes: height and width, int64 [N, 2].
        starts: int64 [N + 1]; the objects of image i are starts[i] .. starts[i + 1] - 1.
        boxes: x1, y1, x2, y2 in pixels, float64 [A], inside the image.
        category_ids: int64 [A].
        segmentations: polygons or RLE of each object, if requested.
        counts: faults that were left out or repaired: name -> number.
        links: position of the image and id of the category of each of the file's M annotations,
            crowds included, in the order of the file, int64 [M, 2].
        left_out: positions in the file of annotations without a usable box, crowds included.
        maskless: positions of annotations with a usable box but no mask, where masks are requested:
            not among the objects above, but ground truth for box AP.
        written_images: image ids as in the file, if they had to be renumbered.
        written_categories: likewise category ids, by number.
    """

    path: Path
    categories: dict[int, str]
    image_ids: np.ndarray
    names: np.ndarray
    sizes: np.ndarray
    starts: np.ndarray
    boxes: np.ndarray
    category_ids: np.ndarray
    segmentations: Packed | None
    links: np.ndarray
    counts: Counter[str] = field(default_factory=Counter)
    left_out: set[int] = field(default_factory=set)
    maskless: set[int] = field(default_factory=set)
    written_images: Packed | None = None
    written_categories: dict[int, int | str] = field(default_factory=dict)

    def position(self, image_id: int) -> int:
        """The position of the image with an id."""
        return int(np.searchsorted(self.image_ids, image_id))

    def written_image(self, image_id: int) -> int | str:
        """An image's id as in the file."""
        if self.written_images is None:
            return image_id
        written: int | str = self.written_images[self.position(image_id)]
        return written

    def written_category(self, category_id: int) -> int | str:
        """A category's id as in the file."""
        return self.written_categories.get(category_id, category_id)

    def objects(self, image: int) -> slice:
        """The slice of the objects of the image at a position."""
        return slice(int(self.starts[image]), int(self.starts[image + 1]))


def read_contents(path: Path, key: str) -> dict[str, Any]:
    """The contents of a COCO annotation file, which must have its three lists.

    Args:
        key: the config key that names the file, for errors.
    """
    if not path.is_file():
        raise UserError(f"{key}: there is no annotation file {path}; name a COCO instances file")
    try:
        contents = json.loads(path.read_bytes())
    except RecursionError:
        raise UserError(
            f"{path} is not an annotation file: its lists are nested too deeply"
        ) from None
    except ValueError as error:
        raise UserError(f"{path} is damaged or not JSON ({error}); get it again") from None
    for name in ("images", "annotations", "categories"):
        if not isinstance(contents, dict) or not isinstance(contents.get(name), list):
            raise UserError(
                f"{path} is not a COCO instances file: it has no list {name!r} (expected images, "
                "annotations and categories)"
            )
    return contents


def read_annotations(
    path: Path,
    key: str,
    pictures: ImageFiles,
    *,
    segmentations: bool = False,
    mend: bool = False,
) -> Annotations:
    """Read and check an annotation file.

    Args:
        key: the config key that names it, for errors.
        pictures: its images, to repair their sizes and names.
        segmentations: every object needs a mask; keep them.
        mend: clip boxes that exceed the image, leave out objects without a usable box or mask, and
            repair ids, sizes, file names and areas, instead of refusing them.

    Raises:
        UserError: the file is missing, not JSON, or inconsistent.
    """
    return _Reading(path, pictures, segmentations, mend).read(read_contents(path, key))


class _Reading:
    """The conversion of one file to arrays."""

    def __init__(self, path: Path, pictures: ImageFiles, segmentations: bool, mend: bool):
        self.path, self.pictures = path, pictures
        self.segmentations, self.mend = segmentations, mend
        self.counts: Counter[str] = Counter()
        self.left_out: set[int] = set()
        self.maskless: set[int] = set()
        self.numbers: dict[str, dict[int | str, int]] = {}  # by kind: each id as written

    def read(self, contents: dict[str, Any]) -> Annotations:
        categories = self._by_id(contents["categories"], "category")
        images = self._by_id(contents["images"], "image")
        self._check_names(categories)
        if not categories or not images:
            what = "images" if categories else "categories"
            raise UserError(f"{self.path} has no {what}: nothing to learn or to test")
        for record in images.values():
            self._check_image(record)
        links, per_image = self._read_objects(contents["annotations"], images)
        objects = [item for items in per_image.values() for item in items]
        renumbered = any(record["id"] != number for number, record in images.items())
        return Annotations(
            self.path,
            {number: record["name"] for number, record in categories.items()},
            np.array(list(images), np.int64),
            np.array([record["file_name"].encode() for record in images.values()], np.bytes_),
            np.array([(r["height"], r["width"]) for r in images.values()], np.int64),
            np.cumsum([0, *map(len, per_image.values())]),
            np.array([box for box, _, _ in objects], np.float64).reshape(-1, 4),
            np.array([category for _, category, _ in objects], np.int64),
            Packed(segments for _, _, segments in objects) if self.segmentations else None,
            links,
            self.counts,
            self.left_out,
            self.maskless,
            Packed(record["id"] for record in images.values()) if renumbered else None,
            {number: r["id"] for number, r in categories.items() if r["id"] != number},
        )

    def _read_objects(
        self, records: list[dict[str, Any]], images: dict[int, dict[str, Any]]
    ) -> tuple[np.ndarray, dict[int, list[Any]]]:
        """`links` of the annotations; and box, category id and mask of each image's objects."""
        found: dict[int, list[Any]] = {number: [] for number in images}
        positions = {number: position for position, number in enumerate(images)}
        links = np.zeros((len(records), 2), np.int64)
        numbers = self._ids(records, "annotation")
        for position in sorted(range(len(records)), key=numbers.__getitem__):
            record = records[position]
            image, category = self._check_links(record)
            links[position] = positions[image], category
            fit = self._object(position, record, images[image])
            if fit:
                found[image].append((fit[0], category, fit[1]))
        return links, found

    def _check_names(self, categories: dict[int, dict[str, Any]]) -> None:
        known: dict[str, int] = {}
        for number, record in categories.items():
            name = record.get("name")
            if not isinstance(name, str):
                raise UserError(f"{self.path}: category {number} has no name")
            if name in known:
                raise UserError(
                    f"{self.path}: categories {known[name]} and {number} have the same name "
                    f"{shown(name, 60)}; rename one"
                )
            known[name] = number

    def _by_id(self, records: list[Any], kind: str) -> dict[int, dict[str, Any]]:
        """Records in the order of their ids."""
        pairs = zip(self._ids(records, kind), records, strict=True)
        return dict(sorted(pairs, key=lambda pair: pair[0]))

    def _ids(self, records: list[Any], kind: str) -> list[int]:
        """The id of each record, as a whole number."""
        written = [self._written_id(*item, kind) for item in enumerate(records, 1)]
        numbers = number_ids(written) if self.mend else {i: int(i) for i in written}
        ids = [numbers[one] for one in written]
        seen: set[int] = set()
        for number, one in zip(ids, written, strict=True):
            if number in seen:
                raise UserError(
                    f"{self.path}: {kind} id {shown(one, 60)} is given twice; ids are unique"
                )
            seen.add(number)
        texts = sum(isinstance(one, str) for one in written)
        self.counts[f"{kind} ids renumbered"] += texts + (kind == "annotation" and 0 in written)
        self.numbers[kind] = numbers
        return ids

    def _written_id(self, position: int, record: Any, kind: str) -> int | str:
        """The id of a record as in the file; refuses unusable ones."""
        number = record.get("id") if isinstance(record, dict) else None
        if isinstance(number, str) and self.mend:
            return number
        if type(number) is not int or abs(number) >= 2**63:
            hint = f"; {_FIX} to read or number such ids" if isinstance(number, str) else ""
            raise UserError(
                f"{self.path}: {kind} number {position} of the list has no whole number as "
                f"id ({shown(number, 60)}){hint}"
            )
        if number == 0 and kind == "annotation" and not self.mend:
            raise UserError(
                f"{self.path}: annotation id 0 is not allowed: pycocotools counts its object as "
                f"never found; number annotations from 1, or {_FIX} to do so here"
            )
        return number

    def _check_image(self, record: dict[str, Any]) -> None:
        """Refuse an image without a name or a size, or repair it in place."""
        name, number = record.get("file_name"), shown(record["id"], 60)
        if not isinstance(name, str) or not name or "\0" in name or not _encodable(name):
            raise UserError(
                f"{self.path}: image {number} has no usable file_name ({shown(name, 60)})"
            )
        if self.mend and "\\" in name:
            record["file_name"] = self.pictures.file_name(name)
            self.counts["file names with \\ for /"] += record["file_name"] != name
        size = [record.get("height"), record.get("width")]
        if all(type(side) is int and 0 < side <= LARGEST_SIDE for side in size):
            return
        fault = (
            f"{self.path}: image {number} ({name}) is {shown(size[0], 40)} high and "
            f"{shown(size[1], 40)} wide; both must be whole numbers above 0"
        )
        if not self.mend:
            raise UserError(f"{fault}; {_FIX} to read them from the image")
        try:
            record["height"], record["width"] = self.pictures.size(record["file_name"])
        except UserError as error:
            raise UserError(f"{fault}; {error}") from error
        self.counts["image sizes read from the files"] += 1

    def _check_links(self, record: dict[str, Any]) -> tuple[int, int]:
        """The image and the category of an annotation."""
        positions = []
        for kind in ("image", "category"):
            value, numbers = record.get(f"{kind}_id"), self.numbers[kind]
            if type(value) not in (int, str) or value not in numbers:
                raise UserError(
                    f"{self.path}: annotation {shown(record['id'], 60)} has {kind}_id "
                    f"{shown(value, 60)}, which is not among the file's "
                    f"{len(set(numbers.values()))} {kind} ids"
                )
            self.counts[f"{kind}_id entries given as text"] += isinstance(value, str)
            positions.append(numbers[value])
        if record.get("iscrowd", 0) not in (0, 1):
            raise UserError(
                f"{self.path}: annotation {shown(record['id'], 60)} has iscrowd "
                f"{shown(record['iscrowd'], 60)}; it must be 0 or 1"
            )
        return positions[0], positions[1]

    def _object(
        self, position: int, record: dict[str, Any], image: dict[str, Any]
    ) -> tuple[list[float], Any] | None:
        """Box and mask of an object; None for a crowd or an unusable object."""
        box, fault = _corners(record.get("bbox"), image["height"], image["width"])
        segments, missing = None, "" if box else "box"
        if box and self.segmentations:
            segments, mask_fault = _segments(record.get("segmentation"), image)
            fault, missing = fault or mask_fault, "" if segments else "mask"
        if fault:
            self._mend(position, record, fault, missing)
        if box and "area" in record:
            self._check_area(record, image)
        if record.get("iscrowd"):
            self.counts["crowd regions"] += 1
        return None if not box or missing or record.get("iscrowd") else (box, segments)

    def _check_area(self, record: dict[str, Any], image: dict[str, Any]) -> None:
        """Refuse an impossible area, or count it: evaluation then computes the area."""
        fault = area_fault(record["area"], image["height"], image["width"])
        if fault and not self.mend:
            raise UserError(
                f"{self.path}: annotation {shown(record['id'], 60)} of image "
                f"{shown(record['image_id'], 60)}: area {shown(record['area'], 60)} is {fault}; "
                f"mend it, or {_FIX} to compute it"
            )
        self.counts["areas recomputed"] += bool(fault)

    def _mend(self, position: int, record: dict[str, Any], fault: str, missing: str) -> None:
        """Refuse a fault, or count it; `missing` is the unusable part: "box", "mask" or ""."""
        if not self.mend:
            raise UserError(
                f"{self.path}: annotation {shown(record['id'], 60)} of image "
                f"{shown(record['image_id'], 60)}: {fault}; mend it, or {_FIX} to "
                f"{'drop' if missing else 'mend'} such ones"
            )
        self.counts[f"objects without {missing}" if missing else "objects mended"] += 1
        if missing:
            (self.left_out if missing == "box" else self.maskless).add(position)


def _encodable(name: str) -> bool:
    """Whether a text is UTF-8; JSON's escapes can spell halves of characters."""
    return not any("\ud800" <= character <= "\udfff" for character in name)


def _corners(bbox: Any, height: int, width: int) -> tuple[list[float] | None, str]:
    """A box clipped to the image (x1, y1, x2, y2), None if nothing is left; and its fault."""
    if not isinstance(bbox, Sequence) or len(bbox) != 4 or not all(map(finite_number, bbox)):
        return None, f"bbox {shown(bbox, 80)} is not [x, y, width, height]"
    x, y, w, h = map(float, bbox)
    if w < LEAST_SIDE or h < LEAST_SIDE:
        return None, f"box {bbox} is {w:g} x {h:g} pixels: it has no area"
    box = [max(x, 0.0), max(y, 0.0), min(x + w, float(width)), min(y + h, float(height))]
    outside = f"box {bbox} is outside the image of {width}x{height} pixels"
    if box[2] - box[0] < LEAST_SIDE or box[3] - box[1] < LEAST_SIDE:
        return None, outside
    sticks_out = max(-x, -y, x + w - width, y + h - height)
    return box, f"{outside} by {sticks_out:g}" if sticks_out > SLACK else ""


def _segments(segmentation: Any, image: dict[str, Any]) -> tuple[Any, str]:
    """The polygons or RLE of an object, None if they are unusable; and their fault."""
    if isinstance(segmentation, dict):
        if segmentation.get("size") != [image["height"], image["width"]]:
            return None, f"its RLE mask is {shown(segmentation.get('size'), 60)}, unlike the image"
        if rle_counts(segmentation) is None:
            return None, "its RLE mask does not fill the image"
        return segmentation, ""
    if not segmentation:
        return None, "it has no segmentation, which a Mask R-CNN needs"
    parts = polygon_parts(segmentation)
    if not parts:
        return None, "its segmentation is neither polygons of 3 or more points nor RLE"
    return parts, "" if len(parts) == len(segmentation) else "a polygon has less than 3 points"
