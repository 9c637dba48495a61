"""From a config to a distiller: networks, the teacher's weights, the method."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from mdistiller.dataset import Data
from mdistiller.distillers import DISTILLERS, Distiller, Vanilla
from mdistiller.engine.trainer import seed_everything
from mdistiller.engine.utils import log_msg, validate
from mdistiller.models import ModelEntry, get_model_entry
from mdistiller.registry import UserError
from mdistiller.runtime import project_root, rank
from mdistiller.weights import load_network


def build_distiller(
    cfg: Any, data: Data, device: torch.device, teacher_ckpt: str | Path | None = None
) -> Distiller:
    """The distiller of a config, on `device`, its teacher loaded and frozen.

    The student is made first, right after seeding: with one seed it starts from the same weights
    under every method and teacher.

    Args:
        teacher_ckpt: overrides where :func:`find_teacher` looks.
    """
    method = DISTILLERS[cfg.DISTILLER.TYPE]
    seed_everything(cfg.EXPERIMENT.SEED)
    student = model_entry(cfg, "STUDENT", data).constructor(num_classes=data.num_classes)
    teacher = None
    if method.uses_teacher:
        entry = model_entry(cfg, "TEACHER", data)
        teacher = entry.constructor(num_classes=data.num_classes)
        path = teacher_ckpt or find_teacher(cfg, entry)
        load_network(teacher, path, cfg.DISTILLER.TEACHER, data.num_classes)
    targets = getattr(getattr(data.train, "dataset", None), "targets", None)
    distiller = method.build(
        student, teacher, cfg, data.num_data, image_size=data.image_size, targets=targets
    ).to(device)
    freeze_teacher(distiller)
    return distiller


def check_models(cfg: Any, data: Data) -> None:
    """Refuse a method or model name that does not exist."""
    model_entry(cfg, "STUDENT", data)
    if DISTILLERS[cfg.DISTILLER.TYPE].uses_teacher:
        model_entry(cfg, "TEACHER", data)


def model_entry(cfg: Any, role: str, data: Data) -> ModelEntry:
    """The zoo's entry for the network in a role, "STUDENT" or "TEACHER"."""
    try:
        return get_model_entry(cfg.DISTILLER[role], data.zoo)
    except UserError as error:
        raise UserError(f"DISTILLER.{role}: {error}") from None


def freeze_teacher(distiller: Distiller) -> None:
    """Switch off gradients of the teacher's parameters, except those the method trains."""
    teacher = getattr(distiller, "teacher", None)
    if isinstance(teacher, nn.Module):
        trained = {id(p) for p in distiller.get_learnable_parameters()}
        for param in teacher.parameters():
            if id(param) not in trained:
                param.requires_grad_(False)


def find_teacher(cfg: Any, entry: ModelEntry | None) -> Path:
    """The file of the teacher's weights: DISTILLER.TEACHER_CKPT, else the zoo's usual place.

    Raises:
        UserError: neither is there; the text lists what can be done.
    """
    if cfg.DISTILLER.TEACHER_CKPT:
        path = Path(cfg.DISTILLER.TEACHER_CKPT)
        candidates = [path, project_root() / path]
        found = next((place for place in candidates if place.is_file()), None)
        if found is None:
            raise UserError(f"DISTILLER.TEACHER_CKPT: {path} does not exist")
        return found
    usual = entry.checkpoint if entry is not None else None
    if usual is not None and Path(usual).is_file():
        return Path(usual)
    looked = f" (looked for {usual})" if usual else ""
    raise UserError(
        f"no weights for the teacher {cfg.DISTILLER.TEACHER}{looked}: set DISTILLER.TEACHER_CKPT "
        "to a checkpoint, or DISTILLER.TEACHER_CFG to the config that trains it first"
    )


def measure_teacher(distiller: Distiller, data: Data) -> float:
    """The teacher's top-1 accuracy in percent on the validation set, printed.

    A teacher near chance gets a warning: its file is then usually of another data set.
    """
    assert distiller.teacher is not None
    top1, _, _ = validate(data.val, Vanilla(distiller.teacher))
    if rank() == 0:
        print(log_msg(f"teacher accuracy: {top1:.2f} %"), flush=True)
        if top1 < 200.0 / data.num_classes and data.num_classes > 2:
            print(
                log_msg("WARNING: the teacher is near chance on this data; is it the right file?")
            )
    return top1
