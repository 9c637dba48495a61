"""Affine maps of whole batches, to the pixel as Pillow makes them (nearest pixel, zeros outside).

Source positions are 16.16 fixed-point integers, as in Pillow.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

BORDER = 1
"""Zeros that :func:`resample` wants around an image, on each side."""


def rotation(angle: Tensor, height: int, width: int) -> Tensor:
    """Matrix of a counter-clockwise turn about the image's centre.

    Args:
        angle: degrees, [N].

    Returns:
        a, b, c, d, e, f, float64, [N, 6]: output position (X, Y) shows (a X + b Y + c,
        d X + e Y + f).
    """
    radians = torch.deg2rad(angle.double())
    cos, sin = radians.cos(), radians.sin()
    half_width, half_height = width / 2, height / 2
    x0 = half_width - cos * half_width + sin * half_height
    y0 = half_height - sin * half_width - cos * half_height
    return torch.stack([cos, -sin, x0, sin, cos, y0], dim=1)


def fixed_point(matrix: Tensor) -> Tensor:
    """Matrices [N, 6] as :func:`resample` takes them: in 1/65536 pixel, int64.

    They then map the index of an output pixel to that of the input pixel, since pixels are read
    at their centres.
    """
    a, b, c, d, e, f = matrix.unbind(1)
    terms = torch.stack([a, b, c + (a + b) / 2, d, e, f + (d + e) / 2], dim=1)
    return torch.floor(terms * 65536 + 0.5).long()


def add_border(images: Tensor) -> Tensor:
    """Images [B, 3, H, W] with zeros around them, [B, 3, H + 2, W + 2]."""
    return F.pad(images, (BORDER,) * 4)


def columns(width: int, flip: Tensor) -> Tensor:
    """Column order, mirrored where `flip` (0 or 1, [B, 1, 1]) is 1: of flip's type, [B, 1, W]."""
    column = torch.arange(width, dtype=flip.dtype, device=flip.device)
    return column + flip * (width - 1 - 2 * column)


def resample(bordered: Tensor, terms: Tensor, flip: Tensor | None = None) -> Tensor:
    """Images under their affine maps, then mirrored.

    Args:
        bordered: from :func:`add_border`, [B, 3, H + 2, W + 2].
        terms: from :func:`fixed_point`, [B, 6].
        flip: 1 where the image is to be mirrored, else 0, [B]; None for no image.

    Returns:
        Of the type of `bordered`, [B, 3, H, W].
    """
    height, width = (side - 2 * BORDER for side in bordered.shape[2:])
    terms = terms.int()[:, :, None, None]
    a, b, c, d, e, f = terms.unbind(1)  # each [B, 1, 1]
    out_x = columns(width, torch.zeros_like(a) if flip is None else flip.int()[:, None, None])
    out_y = torch.arange(height, dtype=torch.int32, device=bordered.device)[:, None]
    x = ((a * out_x + (b * out_y + c)) >> 16) + BORDER  # [B, H, W]
    y = ((d * out_x + (e * out_y + f)) >> 16) + BORDER
    x, y = x.clamp_(0, width + 1), y.clamp_(0, height + 1)  # outside: the zeros
    source = y.mul_(bordered.shape[3]).add_(x).long().flatten(1)[:, None]
    pixels = bordered.flatten(2).gather(2, source.expand(-1, bordered.shape[1], -1))
    return pixels.unflatten(2, (height, width))
