"""What a study notes of a trial's settings, and how those of a plan differ from it."""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path

from mdistiller.config.roles import teacher_configs
from mdistiller.config.safe_yaml import parse_yaml
from mdistiller.distillers import get_distiller
from mdistiller.engine.cfg import Config, dump_cfg
from mdistiller.files import file_hash
from mdistiller.run.teacher import teacher_config
from mdistiller.run_folder.changes import differences
from mdistiller.sweep.plan import Plan, Trial


def noted(plan: Plan, trial: Trial) -> dict[str, str]:
    """The settings of a trial, as the study keeps them."""
    cfg = trial.configs[0]
    return {"config": dump_cfg(cfg), "space": repr(plan.space), **_teachers(cfg)}


def changes(before: Mapping[str, str], plan: Plan, trial: Trial) -> list[str]:
    """In words, what differs between settings that were :func:`noted` and those of a plan.

    A teacher is what its file holds or what it is trained by, wherever that lies.
    """
    cfg = trial.configs[0]
    changes = differences(parse_yaml(before["config"]), cfg)
    if before["space"] != repr(plan.space):
        changes.append("SPACE is another")
    now = _teachers(cfg)
    for number, one in enumerate(teacher_configs(cfg)):
        file, config = (_key(kind, number) for kind in ("file", "config"))
        if file in before and before[file] != now.get(file):
            path = one.DISTILLER.TEACHER_CKPT
            changes.append(f"the teacher was not DISTILLER.TEACHER_CKPT {path!r}")
        if config in before and config not in now:
            changes.append("the teacher was trained by DISTILLER.TEACHER_CFG")
        elif config in before:
            others = differences(parse_yaml(before[config]), teacher_config(one))
            changes += [f"of the teacher: {text}" for text in others]
    return changes


def _key(kind: str, number: int) -> str:
    """Under what a study notes the file or config of a teacher; the first has no number."""
    return f"teacher_{kind}{number or ''}"


def _teachers(cfg: Config) -> dict[str, str]:
    if not get_distiller(cfg.DISTILLER.TYPE).uses_teacher:
        return {}
    found = {}
    for number, one in enumerate(teacher_configs(cfg)):
        node = one.DISTILLER
        file = Path(node.TEACHER_CKPT)
        if file.is_file():
            found[_key("file", number)] = _hash(file)
        elif node.TEACHER_CFG and not node.TEACHER_CKPT:
            found[_key("config", number)] = dump_cfg(teacher_config(one))
    return found


_hash = lru_cache(file_hash)
