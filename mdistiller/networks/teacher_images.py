"""How the teacher's images differ from the student's (DISTILLER.TEACHER_SIZE, TEACHER_AUGMENT)."""

from __future__ import annotations

from typing import Any

from mdistiller.distillers import get_distiller
from mdistiller.preprocessing import height_width, read_image_size
from mdistiller.registry import UserError


def teacher_image_size(cfg: Any) -> tuple[int, int] | None:
    """(height, width) of the teacher's images; None: those of the student, or no teacher."""
    size = read_image_size(cfg.DISTILLER.get("TEACHER_SIZE", 0))
    used = size and get_distiller(cfg.DISTILLER.TYPE).uses_teacher
    return height_width(size) if used else None


def teacher_sees_weak(cfg: Any, two_views: bool) -> bool:
    """Whether the teacher is to see training images without RandAugment and erasing.

    Args:
        two_views: whether the training needs two views of every image.

    Raises:
        UserError: that is not possible, or would change nothing.
    """
    how, data = cfg.DISTILLER.get("TEACHER_AUGMENT", "same"), cfg.DATASET
    method = get_distiller(cfg.DISTILLER.TYPE)
    if how not in ("same", "weak"):
        raise UserError(f"DISTILLER.TEACHER_AUGMENT must be same or weak, got {how!r}")
    if how == "same" or not method.uses_teacher:
        return False
    reason = ""
    if two_views:
        reason = f"{cfg.DISTILLER.TYPE} shows its teacher a weak and a strong view by itself"
    elif not method.runs_teacher_once():
        reason = f"{cfg.DISTILLER.TYPE} runs its teacher in a forward_train of its own"
    elif data.MIXUP or data.CUTMIX:
        reason = "DATASET.MIXUP and CUTMIX make images of two, which the teacher has to see, too"
    elif not (data.RANDAUGMENT or data.ERASING):
        reason = "neither DATASET.RANDAUGMENT nor ERASING is set, which it would leave out"
    elif cfg.SOLVER.CUDA_GRAPHS:
        reason = "steps that SOLVER.CUDA_GRAPHS records have one view of an image"
    if reason:
        raise UserError(f"DISTILLER.TEACHER_AUGMENT weak: {reason}; set it to same")
    return True
