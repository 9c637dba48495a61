"""A picture of the images that a student classifies most wrongly (LOG.MISTAKES)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageOps
from torch import nn

SIDE, TEXT, COLUMNS = 128, 26, 6
"""Pixels of an image and of its two lines of text; images in a row."""


@torch.no_grad()
def worst_mistakes(model: nn.Module, loader: Any, count: int) -> list[tuple[float, Any, int, int]]:
    """The wrongly classified images with the smallest probability of their class, at most `count`.

    Args:
        loader: evaluation batches (image, target) of this process, with its `normalize`.

    Returns:
        Of each the probability, the image (uint8, [H, W, 3]), its class and the predicted one.
    """
    model.eval()
    device = next(model.parameters()).device
    scale, shift = loader.normalize.scale, loader.normalize.shift
    worst: list[tuple[float, Any, int, int]] = []
    for images, target, *_ in loader:
        images, target = images.to(device), target.to(device)
        probabilities = model(image=images).float().softmax(1)
        said = probabilities.argmax(1)
        own = probabilities.gather(1, target[:, None]).squeeze(1)
        own[said == target] = torch.inf
        values, places = own.topk(min(count, len(own)), largest=False)
        for value, place in zip(values.tolist(), places.tolist(), strict=True):
            if value != float("inf"):
                pixels = ((images[place] - shift) / scale).round().clamp(0, 255).byte()
                array = (
                    pixels[: 3 if len(pixels) > 2 else 1]
                    .permute(1, 2, 0)
                    .expand(-1, -1, 3)
                    .cpu()
                    .numpy()
                )
                worst.append((value, array, int(target[place]), int(said[place])))
        worst = sorted(worst, key=lambda one: one[0])[:count]
    return worst


def mistakes_picture(model: nn.Module, loader: Any, count: int) -> np.ndarray | None:
    """The :func:`worst_mistakes` in a grid, worst first; None if all images are right.

    Returns:
        uint8, [H, W, 3].
    """
    worst = worst_mistakes(model, loader, count)
    if not worst:
        return None
    classes = getattr(loader.dataset, "classes", None)
    rows = -(-len(worst) // COLUMNS)
    sheet = Image.new("RGB", (COLUMNS * SIDE, rows * (SIDE + TEXT)), "white")
    draw = ImageDraw.Draw(sheet)
    for number, (value, pixels, target, said) in enumerate(worst):
        x, y = number % COLUMNS * SIDE, number // COLUMNS * (SIDE + TEXT)
        size = (SIDE - 4, SIDE - 4)
        sheet.paste(ImageOps.pad(Image.fromarray(pixels), size, color="white"), (x + 2, y + 2))
        lines = f"{_name(classes, target)} ({100 * value:.1f} %)\nsaid {_name(classes, said)}"
        draw.multiline_text((x + 3, y + SIDE - 2), lines, fill="black", spacing=1)
    return np.asarray(sheet)


def _name(classes: Sequence[str] | None, number: int) -> str:
    """A class's name, as long as there is place for it, in letters that the font has."""
    name = str(number) if classes is None else classes[number]
    return name.encode("latin-1", "replace").decode("latin-1")[:14]
