"""Small COCO-format sets of discs, boxes and triangles on noise, drawn here."""

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

CATEGORIES = ((3, "disc"), (7, "box"), (42, "triangle"))
"""Ids with gaps, as COCO's own are."""
COLOURS = ((220, 60, 50), (60, 200, 70), (70, 90, 230))


@dataclass
class Synth:
    """A set on disk.

    Attributes:
        images: folder of the pictures.
        annotations: the JSON file.
        contents: what it holds; `save()` writes it again after changes.
    """

    images: Path
    annotations: Path
    contents: dict

    def save(self):
        self.annotations.write_text(json.dumps(self.contents))
        return self

    def keys(self, split="train"):
        """Config overrides that name it as the training ("train") or validation ("val") set."""
        node = f"DETECTION.DATA.{split.upper()}"
        return [
            f"{node}_IMAGES",
            str(self.images),
            f"{node}_ANNOTATIONS",
            str(self.annotations),
        ]


def outline(kind, x, y, width, height):
    """Corners of a shape in a box of that place and size."""
    if kind == 1:
        return [(x, y), (x + width, y), (x + width, y + height), (x, y + height)]
    if kind == 2:
        return [(x + width / 2, y), (x + width, y + height), (x, y + height)]
    turns = np.linspace(0, 2 * np.pi, 16, endpoint=False)
    centre = (x + width / 2, y + height / 2)
    return [(centre[0] + np.cos(t) * width / 2, centre[1] + np.sin(t) * height / 2) for t in turns]


def area(points):
    """Of a polygon."""
    x, y = np.array(points).T
    return float(abs(np.dot(x, np.roll(y, 1)) - np.dot(y, np.roll(x, 1))) / 2)


def run_lengths(mask):
    """Uncompressed COCO RLE of a mask [H, W]."""
    flat = np.concatenate([[0], mask.flatten(order="F").astype(int), [0]])
    changes = np.flatnonzero(np.diff(flat))
    counts = np.diff(np.concatenate([[0], changes, [mask.size]])).tolist()
    if not counts[-1]:
        counts.pop()
    return {"size": list(mask.shape), "counts": counts}


def make_coco(
    folder,
    images=8,
    *,
    split="train",
    size=(96, 128),
    objects=3,
    empty=1,
    crowds=1,
    categories=CATEGORIES,
    seed=0,
):
    """Draw a set into `folder/split/` and `folder/split.json`; returns a :class:`Synth`.

    Args:
        images: how many pictures; every third is portrait, the others landscape.
        size: height and width of a landscape one.
        objects: the most per image, at least one.
        empty: number of images at the end without annotations.
        crowds: number of images at the start with a crowd (iscrowd 1, RLE) besides objects.
        categories: ids and names of the discs, boxes and triangles; more are never drawn.
        seed: of all that is drawn.
    """
    rng = np.random.default_rng([seed, *split.encode()])
    folder = Path(folder)
    pictures = folder / split
    pictures.mkdir(parents=True, exist_ok=True)
    contents = {
        "images": [],
        "annotations": [],
        "categories": [{"id": i, "name": name} for i, name in categories],
    }
    for number in range(images):
        height, width = size if number % 3 != 2 else size[::-1]
        image_id = 101 + 7 * number
        picture = Image.fromarray(rng.integers(90, 150, (height, width, 3), dtype=np.uint8))
        found = []
        if number < images - empty:
            found = [_shape(rng, picture) for _ in range(rng.integers(1, objects + 1))]
            if number < crowds:
                found.append(_crowd(rng, picture))
        name = f"{number:04d}.png"
        picture.save(pictures / name)
        contents["images"].append(
            {"id": image_id, "file_name": name, "height": height, "width": width}
        )
        for kind, annotation in found:
            contents["annotations"].append(
                {
                    "id": len(contents["annotations"]) + 1,
                    "image_id": image_id,
                    "category_id": categories[kind][0],
                    **annotation,
                }
            )
    return Synth(pictures, folder / f"{split}.json", contents).save()


def _shape(rng, picture):
    width, height = picture.size
    kind = int(rng.integers(3))
    w, h = (float(rng.integers(side // 5, side // 2)) for side in picture.size)
    x, y = float(rng.integers(0, width - int(w))), float(rng.integers(0, height - int(h)))
    points = outline(kind, x, y, w, h)
    shade = rng.integers(-25, 25)
    ImageDraw.Draw(picture).polygon(points, fill=tuple(int(c + shade) for c in COLOURS[kind]))
    return kind, {
        "bbox": [x, y, w, h],
        "area": area(points),
        "iscrowd": 0,
        "segmentation": [[float(value) for point in points for value in point]],
    }


def _crowd(rng, picture):
    """Many small discs, annotated as one region."""
    width, height = picture.size
    w, h = width // 3, height // 4
    x, y = int(rng.integers(0, width - w)), int(rng.integers(0, height - h))
    draw = ImageDraw.Draw(picture)
    for _ in range(12):
        left, top = x + int(rng.integers(0, w - 8)), y + int(rng.integers(0, h - 8))
        draw.ellipse((left, top, left + 7, top + 7), fill=COLOURS[0])
    mask = np.zeros((height, width), bool)
    mask[y : y + h, x : x + w] = True
    return 0, {
        "bbox": [x, y, w, h],
        "area": float(w * h),
        "iscrowd": 1,
        "segmentation": run_lengths(mask),
    }
