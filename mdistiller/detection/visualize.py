"""Draw detections and ground truth on images: one row per image, one panel per network."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from mdistiller.detection.coco.dataset import CocoDetectionSet, View
from mdistiller.detection.networks.detector import Detector
from mdistiller.evaluation.draw import COLOURS, new_figure
from mdistiller.registry import UserError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_LONGEST = 24
_WIDTH = 4.2  # inches of a panel


class Objects(NamedTuple):
    """Objects of one image.

    Attributes:
        boxes: [n, 4], (x1, y1, x2, y2) in pixels.
        labels: [n].
        scores: [n], or None for the truth.
        masks: [n, H, W] of 0 and 1, or None.
    """

    boxes: Tensor
    labels: Tensor
    scores: Tensor | None = None
    masks: Tensor | None = None

    def only(self, keep: Tensor) -> Objects:
        """The objects for which `keep` [n] is true."""
        return Objects(*(None if part is None else part[keep] for part in self))  # type: ignore[arg-type]


def draw_detections(
    networks: Sequence[tuple[str, Detector]],
    data: CocoDetectionSet,
    size: tuple[int, int],
    device: torch.device,
    labels: Sequence[int] = (),
    count: int = 4,
    threshold: float = 0.5,
    seed: int = 0,
) -> Figure:
    """Draw ground truth and each network's detections in images of a set.

    Args:
        networks: title and detector of each, on `device`.
        size: shorter and longest side that images are resized to.
        labels: of the classes to show; by default all.
        count: images, drawn by `seed` among those with an object of these classes.
        threshold: lowest score of a drawn detection.

    Raises:
        UserError: no image has an object of these classes.
    """
    shown = torch.tensor(labels or range(1, data.num_classes))
    images, rows, titles = [], [], []
    for index in choose(data, shown, count, seed):
        pixels, target = data.item(View(index, *size))
        image = pixels.float() / 255
        truth = Objects(target["boxes"], target["labels"], None, target.get("masks"))
        row = [truth.only(torch.isin(truth.labels, shown))]
        for _, net in networks:
            output = net.eval().detect([image.to(device)], [tuple(pixels.shape[1:])])[0]
            detected = {name: value.cpu() for name, value in output.items()}
            seen = Objects(
                detected["boxes"], detected["labels"], detected["scores"], detected.get("masks")
            )
            wanted = torch.isin(seen.labels, shown)
            row.append(seen.only(wanted & (detected["scores"] >= threshold)))
        images.append(image)
        rows.append(row)
        titles.append(f"image {data.written_id(index)}")
    names = ["truth", *(f"{title}\nscores from {threshold:g}" for title, _ in networks)]
    return draw(images, rows, titles, names, data.class_names)


def choose(data: CocoDetectionSet, labels: Tensor, count: int, seed: int) -> list[int]:
    """Positions of `count` images with an object of these classes, in order.

    Raises:
        UserError: no image has one.
    """
    order = torch.randperm(len(data), generator=torch.Generator().manual_seed(seed)).tolist()
    wanted, chosen = set(labels.tolist()), []
    for index in order:
        where = data.annotations.objects(int(data.positions[index]))
        if wanted & set(data.labels[where].tolist()):
            chosen.append(index)
        if len(chosen) == count:
            break
    if not chosen:
        raise UserError("--classes: the validation set has no object of these")
    return sorted(chosen)


def draw(
    images: Sequence[Tensor],
    rows: Sequence[Sequence[Objects]],
    titles: Sequence[str],
    names: Sequence[str],
    classes: Sequence[str],
) -> Figure:
    """Draw objects over images.

    Args:
        images: each [3, H, W] in [0, 1].
        rows: for each image the objects of each panel.
        titles: of the rows.
        names: of the panels.
        classes: names by label.
    """
    heights = [image.shape[1] / image.shape[2] * _WIDTH for image in images]
    figure = new_figure(_WIDTH * len(names), sum(heights) + 0.5)
    axes = figure.subplots(len(images), len(names), squeeze=False, height_ratios=heights)
    for line, image, row, title in zip(axes, images, rows, titles, strict=True):
        for ax, objects in zip(line, row, strict=True):
            _panel(ax, image, objects, classes)
        line[0].set_ylabel(plain(title), fontsize=8)
    for ax, name in zip(axes[0], names, strict=True):
        ax.set_title("\n".join(plain(part, 60) for part in name.split("\n")), fontsize=9)
    return figure


def _panel(ax: Any, image: Tensor, objects: Objects, classes: Sequence[str]) -> None:
    height, width = image.shape[1:]
    edges = (0, width, height, 0)  # coordinates of boxes are those of pixels' edges
    ax.imshow(image.permute(1, 2, 0).clamp(0, 1).numpy(), extent=edges)
    parts = range(len(objects.boxes))
    for i in reversed(parts):  # the surest on top
        colour = COLOURS[int(objects.labels[i]) % len(COLOURS)]
        x1, y1, x2, y2 = objects.boxes[i].tolist()
        if objects.masks is not None:
            ax.imshow(_tinted(objects.masks[i], colour), extent=edges)
        ax.plot([x1, x2, x2, x1, x1], [y1, y1, y2, y2, y1], color=colour, linewidth=1.2)
        text = plain(classes[int(objects.labels[i])])
        if objects.scores is not None:
            text = f"{text} {float(objects.scores[i]):.2f}"
        box = {"facecolor": colour, "edgecolor": "none", "pad": 0.6, "alpha": 0.8}
        side = "bottom" if y1 > height / 20 else "top"
        ax.text(x1, y1, text, fontsize=6, color="white", va=side, bbox=box, clip_on=True)
    ax.set(xticks=[], yticks=[], xlim=edges[:2], ylim=edges[2:])


def _tinted(mask: Tensor, colour: str) -> np.ndarray:
    """A mask [H, W] as an image [H, W, 4] of one colour, clear where it is 0."""
    red, green, blue = (int(colour[k : k + 2], 16) for k in (1, 3, 5))
    tint = np.zeros((*mask.shape, 4), np.uint8)
    tint[mask.numpy() > 0] = (red, green, blue, 90)
    return tint


def plain(text: str, longest: int = _LONGEST) -> str:
    """A name from a file as one line of ASCII that matplotlib does not read as a formula."""
    seen = str(text).encode("ascii", "backslashreplace").decode()
    clean = "".join(c if c.isprintable() else " " for c in seen).replace("$", r"\$")
    return clean if len(clean) <= longest else f"{clean[: longest - 3]}..."
