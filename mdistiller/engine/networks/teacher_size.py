"""Images of another size for the teacher than for the student (DISTILLER.TEACHER_IMAGE_SIZE)."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from mdistiller.distillers import get_distiller
from mdistiller.preprocessing import height_width, read_image_size


def teacher_image_size(cfg: Any) -> tuple[int, int] | None:
    """(height, width) of the teacher's images; None: those of the student, or no teacher."""
    size = read_image_size(cfg.DISTILLER.get("TEACHER_IMAGE_SIZE", 0))
    used = size and get_distiller(cfg.DISTILLER.TYPE).uses_teacher
    return height_width(size) if used else None


def resize_input(net: nn.Module, size: tuple[int, int]) -> None:
    """Make `net` resize its images to `size` before each forward: bilinear, antialiased.

    Images of that size pass unchanged. State dicts do not change.
    """
    net._input_size = tuple(size)  # type: ignore[assignment]
    net.register_forward_pre_hook(_resize)


def _resize(net: Any, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    image, *rest = inputs
    if tuple(image.shape[-2:]) == net._input_size:
        return inputs
    resized = F.interpolate(
        image, net._input_size, mode="bilinear", align_corners=False, antialias=True
    )
    return (resized, *rest)
