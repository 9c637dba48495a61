"""The size of the teacher's images (DISTILLER.TEACHER_SIZE)."""

from __future__ import annotations

from typing import Any

from mdistiller.distillers import get_distiller
from mdistiller.preprocessing import height_width, read_image_size


def teacher_image_size(cfg: Any) -> tuple[int, int] | None:
    """(height, width) of the teacher's images; None: those of the student, or no teacher."""
    size = read_image_size(cfg.DISTILLER.get("TEACHER_SIZE", 0))
    used = size and get_distiller(cfg.DISTILLER.TYPE).uses_teacher
    return height_width(size) if used else None
