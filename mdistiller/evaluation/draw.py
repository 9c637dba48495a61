"""Figures of matplotlib, in colours that do not depend on telling red from green."""

from __future__ import annotations

import colorsys
import io
import re
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from mdistiller.registry import UserError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Okabe and Ito's, without yellow, which is faint on white
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = "os^DvPX*<>"
MOST_CLASSES = len(COLOURS) * len(MARKERS)
SUFFIXES = (".png", ".svg")


def check_out(path: Path, option: str = "--out") -> None:
    """Refuse a picture that could not be made or written, before any work."""
    if path.suffix.lower() not in SUFFIXES:
        raise UserError(f"{option} {path} must end in {' or '.join(SUFFIXES)}")
    if not path.parent.is_dir():
        raise UserError(f"{option} {path}: folder {path.parent} does not exist")
    new_figure(1, 1)


def new_figure(width: float, height: float, layout: Any = "constrained") -> Figure:
    """An empty figure, in inches.

    Raises:
        UserError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise UserError(
            f"pictures need matplotlib ({error}): pip install mdistiller[viz]"
        ) from None
    return Figure(figsize=(width, height), layout=layout)


def save(figure: Figure, path: Path) -> None:
    """Write PNG or SVG, by suffix; the same picture gives the same bytes."""
    import matplotlib

    if path.suffix.lower() == ".png":
        figure.savefig(path, format="png", dpi=150)
        return
    text = io.StringIO()
    with matplotlib.rc_context({"svg.hashsalt": "mdistiller"}):
        figure.savefig(text, format="svg", dpi=150, metadata={"Date": None})
    # Clip paths are named by hashes of coordinates whose last bits the layout's solver varies.
    names = dict.fromkeys(re.findall(r'<clipPath id="(\w+)"', text.getvalue()))
    numbers = {name: f"clip{number}" for number, name in enumerate(names)}
    ids = r'(?<=id=")\w+(?=")|(?<=url\(#)\w+'
    svg = re.sub(ids, lambda found: numbers.get(found[0], found[0]), text.getvalue())
    path.write_text(svg, encoding="utf-8")


def colours(count: int) -> list[str]:
    """As many different colours: COLOURS, or for more hues around the circle, dark and light."""
    if count <= len(COLOURS):
        return list(COLOURS[:count])
    tones = (
        colorsys.hls_to_rgb(i / count, (0.34, 0.6)[i % 2], (0.9, 0.65)[i % 2]) for i in range(count)
    )
    return ["#" + "".join(f"{round(255 * part):02x}" for part in tone) for tone in tones]


def scatter(
    panels: Sequence[tuple[str, np.ndarray]],
    targets: Tensor,
    chosen: Sequence[int],
    classes: Sequence[str],
) -> Figure:
    """Points by class, a panel a network.

    Args:
        panels: title and points [N, 2] of each.
        targets: [N] classes of the points.
        chosen: the classes that are shown, at most MOST_CLASSES, in the order of the legend.
        classes: names of all classes.
    """
    figure = new_figure(4.6 * len(panels) + 1.2, 4.8)
    axes = figure.subplots(1, len(panels), squeeze=False)[0]
    palette = colours(len(chosen))
    for ax, (title, points) in zip(axes, panels, strict=True):
        for i, k in enumerate(chosen):
            of_class = points[(targets == k).numpy()]
            style = {"color": palette[i], "marker": MARKERS[i % len(MARKERS)]}
            ax.scatter(*of_class.T, s=14, alpha=0.75, linewidths=0, label=classes[k], **style)
        ax.set_title(title, fontsize=10)
        ax.set(xticks=[], yticks=[], xlabel="t-SNE 1", ylabel="t-SNE 2")
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(
        handles,
        labels,
        title="class",
        loc="outside right upper",
        markerscale=1.8,
        frameon=False,
        ncols=-(-len(chosen) // 20),
    )
    return figure


def correlations(
    teacher: tuple[str, Tensor], students: Sequence[tuple[str, Tensor]], names: Sequence[str]
) -> Figure:
    """The teacher's correlation matrix, and what each student's differs by.

    Args:
        teacher, students: title and matrix [C, C] of each.
        names: of the C classes.
    """
    figure = new_figure(4.6 * (1 + len(students)) + 0.8, 4.8, "compressed")
    axes = figure.subplots(1, 1 + len(students), squeeze=False)[0]
    differences = [matrix - teacher[1] for _, matrix in students]
    widest = max(
        [float(d.abs().max()) for d in differences] + [0.01]
    )  # so that noise does not fill the scale
    image = _matrix(axes[0], teacher[1], f"{teacher[0]}\ncorrelation of logits", 1.0, names)
    figure.colorbar(image, ax=axes[0], shrink=0.8, label="correlation")
    for ax, (title, _), difference in zip(axes[1:], students, differences, strict=True):
        mean = float(difference.abs().mean())
        text = f"{title}\nminus the teacher's (mean of |difference| {mean:.3f})"
        image = _matrix(ax, difference, text, widest, names)
    figure.colorbar(image, ax=list(axes[1:]), shrink=0.8, label="difference of correlations")
    return figure


def _matrix(ax: Any, matrix: Tensor, title: str, limit: float, names: Sequence[str]) -> Any:
    image = ax.imshow(matrix.numpy(), cmap="PuOr_r", vmin=-limit, vmax=limit)
    ax.set_title(title, fontsize=10)
    if len(names) <= 20:
        ax.set_xticks(range(len(names)), names, rotation=90 if max(map(len, names)) > 2 else 0)
        ax.set_yticks(range(len(names)), names)
    ax.set(xlabel="class", ylabel="class")
    return image


def confusions(
    panels: Sequence[tuple[str, Sequence[Sequence[int]]]], classes: Sequence[str]
) -> Figure:
    """Confusion matrices: rows are true classes, coloured by their part of the row.

    A row has a height at which its name can be read, up to some hundred classes; beyond, only some
    rows are named. Up to 20 classes, cells have the number of images in them.

    Args:
        panels: title and matrix [C][C] of images of each network.
        classes: names of the C classes.
    """
    side = min(max(0.17 * len(classes), 3.0), 30.0)  # inches
    height = side / len(classes)
    font = min(9.0, 72 * 0.8 * height)
    step = 1 if font >= 4 else round(4 / font + 0.5)
    margin = 0.6 * max(font, 4) / 72 * max(map(len, classes)) + 1
    figure = new_figure((side + margin) * len(panels) + 0.8, side + margin + 0.4)
    axes = figure.subplots(1, len(panels), squeeze=False)[0]
    named = range(0, len(classes), step)
    names = [classes[k] for k in named]
    for ax, (title, cells) in zip(axes, panels, strict=True):
        matrix = torch.tensor(cells, dtype=torch.float64)
        shares = 100 * matrix / matrix.sum(dim=1, keepdim=True).clamp(min=1)
        image = ax.imshow(shares.numpy(), cmap="Blues", vmin=0, vmax=100)
        ax.set_title(title, fontsize=10)
        ax.set_xticks(named, names, rotation=90, fontsize=max(font, 4))
        ax.set_yticks(named, names, fontsize=max(font, 4))
        ax.set(xlabel="predicted class", ylabel="true class")
        if len(classes) <= 20:
            for i, row in enumerate(cells):
                for j, count in enumerate(row):
                    colour = "white" if shares[i, j] > 55 else "black"
                    if count:
                        ax.text(j, i, count, ha="center", va="center", fontsize=7, color=colour)
    figure.colorbar(image, ax=list(axes), shrink=min(0.8, 4 / side), label="% of the true class")
    return figure


def attention(
    images: Tensor,
    rows: Sequence[str],
    networks: Sequence[tuple[str, list[Tensor], Sequence[str]]],
) -> Figure:
    """A row an image: the image, then the maps of each network's stages, each on its own scale.

    Wrong predictions are marked by a cross, and in colour.

    Args:
        images: [N, 3, H, W] in [0, 1].
        rows: the true classes of the images.
        networks: title, maps [N, h, w] of each stage, and predictions of each.
    """
    columns = 1 + sum(len(maps) for _, maps, _ in networks)
    figure = new_figure(1.3 * columns + 0.4 * len(networks), 1.25 * len(images) + 1)
    parts: Any = figure.subfigures(
        1, 1 + len(networks), width_ratios=[1.2, *(len(maps) for _, maps, _ in networks)]
    )
    axes = parts[0].subplots(len(images), 1, squeeze=False)
    for ax, image, name in zip(axes[:, 0], images, rows, strict=True):
        ax.imshow(image.permute(1, 2, 0).clamp(0, 1).numpy(), cmap="gray", vmin=0, vmax=1)
        ax.set_ylabel(_two_lines(name), fontsize=9)
    axes[0, 0].set_title("image", fontsize=9)
    lines = max(title.count("\n") for title, _, _ in networks)
    parts[0].suptitle("\n" * lines + " ", fontsize=10)  # rows are as high as in the other parts
    for part, (title, maps, predicted) in zip(parts[1:], networks, strict=True):
        part.suptitle(title + "\n" * (lines - title.count("\n")), fontsize=10)
        axes = part.subplots(len(images), len(maps), squeeze=False)
        for j, stage in enumerate(maps):
            axes[0, j].set_title(f"stage {j + 1}", fontsize=9)
            for ax, values in zip(axes[:, j], stage, strict=True):
                ax.imshow(values.numpy(), cmap="cividis", interpolation="nearest")
        for ax, name, truth in zip(axes[:, 0], predicted, rows, strict=True):
            if name == truth:
                ax.set_ylabel(_two_lines(f"says {name}"), fontsize=8)
                continue
            wrong: Any = {"color": COLOURS[1], "fontweight": "bold"}
            ax.set_ylabel(_two_lines(f"\N{BALLOT X} says {name}"), fontsize=8, **wrong)
            ax.spines[:].set(color=COLOURS[1], linewidth=2)
    for part in parts:
        for ax in part.axes:
            ax.set(xticks=[], yticks=[])
    return figure


def _two_lines(name: str) -> str:
    """A label that is no longer than a row is high."""
    return textwrap.fill(name, 16, max_lines=2, placeholder=" \N{HORIZONTAL ELLIPSIS}")


def grid(images: Sequence[Tensor], captions: Sequence[str], title: str, columns: int = 6) -> Figure:
    """Images under a caption each, row by row.

    Args:
        images: uint8 [3, H, W] each.
    """
    columns = min(columns, len(images))
    rows = -(-len(images) // columns)
    lines = max(caption.count("\n") + 1 for caption in captions)
    figure = new_figure(1.7 * columns + 0.3, (1.6 + 0.17 * lines) * rows + 0.5)
    figure.suptitle(title, fontsize=10)
    axes = figure.subplots(rows, columns, squeeze=False).flat
    for image, caption, ax in zip(images, captions, axes, strict=False):
        ax.imshow(image.permute(1, 2, 0).numpy(), cmap="gray", vmin=0, vmax=255)
        ax.set_title(caption, fontsize=7.5)
    for ax in axes:  # those that are left
        ax.set_axis_off()
    for ax in figure.axes:
        ax.set(xticks=[], yticks=[])
    return figure


def denormalize(images: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """Images [N, 3, H, W] as they were in [0, 1] before (x - mean) / std."""
    factor, offset = (torch.tensor(v, device=images.device).view(-1, 1, 1) for v in (std, mean))
    return images * factor + offset
