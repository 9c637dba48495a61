"""What a study notes of a trial's settings, and how those of a plan differ from it."""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path

from mdistiller.distillers import get_distiller
from mdistiller.engine.cfg import Config, dump_cfg
from mdistiller.engine.config.safe_yaml import parse_yaml
from mdistiller.engine.run.record import differences
from mdistiller.engine.run.teacher import teacher_config
from mdistiller.files import file_hash
from mdistiller.sweep.plan import Plan, Trial


def noted(plan: Plan, trial: Trial) -> dict[str, str]:
    """The settings of a trial, as the study keeps them."""
    cfg = trial.configs[0]
    return {"config": dump_cfg(cfg), "space": repr(plan.space), **_teacher(cfg)}


def changes(before: Mapping[str, str], plan: Plan, trial: Trial) -> list[str]:
    """In words, what differs between settings that were :func:`noted` and those of a plan.

    A teacher is what its file holds or what it is trained by, wherever that lies.
    """
    cfg = trial.configs[0]
    changes = differences(parse_yaml(before["config"]), cfg)
    if before["space"] != repr(plan.space):
        changes.append("SPACE is another")
    now, settings = _teacher(cfg), cfg.DISTILLER
    if "teacher_file" in before and before["teacher_file"] != now.get("teacher_file"):
        changes.append(f"the teacher was not DISTILLER.TEACHER_CKPT {settings.TEACHER_CKPT!r}")
    if "teacher_config" in before and "teacher_config" not in now:
        changes.append("the teacher was trained by DISTILLER.TEACHER_CFG")
    elif "teacher_config" in before:
        others = differences(parse_yaml(before["teacher_config"]), teacher_config(cfg))
        changes += [f"of the teacher: {text}" for text in others]
    return changes


def _teacher(cfg: Config) -> dict[str, str]:
    if not get_distiller(cfg.DISTILLER.TYPE).uses_teacher:
        return {}
    file = Path(cfg.DISTILLER.TEACHER_CKPT)
    if file.is_file():
        return {"teacher_file": _hash(file)}
    if cfg.DISTILLER.TEACHER_CFG and not cfg.DISTILLER.TEACHER_CKPT:
        return {"teacher_config": dump_cfg(teacher_config(cfg))}
    return {}


_hash = lru_cache(file_hash)
