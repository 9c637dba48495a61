"""Checks whether a teacher's outputs can be cached (DISTILLER.TEACHER_CACHE)."""

from __future__ import annotations

from typing import Any

from mdistiller.dataset.memory.loader import TrainLoader
from mdistiller.distillers import get_distiller, part_names
from mdistiller.registry import UserError

KEY = "DISTILLER.TEACHER_CACHE"


def is_wanted(cfg: Any) -> bool:
    """Whether the config asks for a cache; without a teacher the key has no effect."""
    on = cfg.DISTILLER.get("TEACHER_CACHE", "none") != "none"
    return on and get_distiller(cfg.DISTILLER.TYPE).uses_teacher


def check_method(cfg: Any) -> None:
    """Refuse a cache for a method that reads more of the teacher than a cache holds."""
    name = cfg.DISTILLER.TYPE
    if not is_wanted(cfg) or get_distiller(name).cacheable_outputs():
        return
    parts = {part: get_distiller(part) for part in part_names(name)}
    guilty = [part for part, cls in parts.items() if not cls.cacheable_outputs()]
    fault = "reads more of the teacher than logits and summary vector of a numbered view"
    if not all(parts[part].teacher_in_eval_mode for part in guilty):
        fault = "has its teacher in train mode, where logits depend on the whole batch"
    raise refusal(cfg, f"DISTILLER.TYPE {' and '.join(guilty)} {fault}")


def check_views(cfg: Any, loader: Any) -> None:
    """Refuse a cache where the views of the training images cannot be enumerated and reproduced."""
    if not is_wanted(cfg):
        return
    if not isinstance(loader, TrainLoader) or not loader.makes_images:
        raise refusal(cfg, "its images are made elsewhere, not by DATASET.LOADER memory")
    if loader.mix is not None:
        raise refusal(cfg, "DATASET.ERASING, MIXUP and CUTMIX make views without number")
    if loader.balanced:
        raise refusal(cfg, "DATASET.SAMPLER balanced shows an image several times an epoch")
    if not loader.num_views:
        raise refusal(
            cfg,
            f"DATASET.AUGMENT {cfg.DATASET.AUGMENT} makes views without number (crop, crop_flip "
            "and none do not)",
        )


def refusal(cfg: Any, reason: str) -> UserError:
    """The error for a cache that is not possible."""
    return UserError(f"{KEY} {cfg.DISTILLER.TEACHER_CACHE}: {reason}; set it to none")
