"""A whole run: from a config to a trained student in a run folder with a record of how."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from mdistiller.dataset import Data, load_data
from mdistiller.distillers import get_distiller
from mdistiller.engine.build import (
    build_distiller,
    check_labels,
    check_models,
    find_teacher,
    measure_teacher,
    no_teacher,
)
from mdistiller.engine.cfg import Config, find_config, load_config, show_cfg
from mdistiller.engine.checkpoint import load_checkpoint
from mdistiller.engine.distributed import barrier, process_group, wrap
from mdistiller.engine.record import RunRecord, changed_settings
from mdistiller.engine.trainer import BaseTrainer, trainer_dict
from mdistiller.engine.utils import log_msg, validate
from mdistiller.registry import UserError
from mdistiller.runtime import rank, resolve_device

# Keys that say where files go, not what is trained: they stay out of a run folder's name.
_LONGEST = 200  # bytes of a folder name; file systems allow 255
_PLACES = ("EXPERIMENT.NAME", "EXPERIMENT.PROJECT", "EXPERIMENT.TAG", "LOG.PREFIX", "IMPORTS")


def experiment_name(cfg: Config, overrides: Sequence[str] = ()) -> str:
    """`PROJECT/NAME` of a run folder: NAME, else TAG, and the overrides behind it.

    A NAME among the overrides is the whole name. Long names end in a hash.
    """
    given = dict(zip(overrides[0::2], overrides[1::2], strict=True))
    items = [f"{key}:{value}" for key, value in given.items() if key not in _PLACES]
    name = cfg.EXPERIMENT.NAME or cfg.EXPERIMENT.TAG
    if "EXPERIMENT.NAME" not in given:
        name += ",".join(items)
    name = name.replace("/", "_").replace(os.sep, "_")
    raw = name.encode()
    if len(raw) > _LONGEST:
        digest = hashlib.sha256(raw).hexdigest()[:10]
        name = f"{raw[: _LONGEST - 11].decode(errors='ignore')}-{digest}"
    parts = [*Path(cfg.EXPERIMENT.PROJECT).parts, name]
    if name in ("", ".") or any(part in ("..", "/") for part in parts):
        raise UserError(f"EXPERIMENT.PROJECT and NAME make no folder name: {'/'.join(parts)!r}")
    return "/".join(parts)


def train(cfg: Config, overrides: Sequence[str] = (), resume: bool = False) -> dict[str, Any]:
    """Train what a config describes.

    Args:
        cfg: the whole config.
        overrides: the command line's `[key, value, ...]`, already merged; they name the run folder.
        resume: continue the run in that folder.

    Returns:
        The run's summary, which is also `summary.json` in its folder.
    """
    device = resolve_device(cfg.DEVICE)
    set_determinism(cfg.SOLVER.DETERMINISTIC)
    with process_group(device):
        return _train(cfg, experiment_name(cfg, overrides), resume, device)


def set_determinism(wanted: bool) -> None:
    """Reproducible CUDA kernels if wanted, else the fastest ones."""
    torch.backends.cudnn.benchmark = not wanted
    torch.use_deterministic_algorithms(wanted, warn_only=True)
    if wanted:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")


def _train(cfg: Config, name: str, resume: bool, device: torch.device) -> dict[str, Any]:
    trainer_class = trainer_dict[cfg.SOLVER.TRAINER]
    method = get_distiller(cfg.DISTILLER.TYPE)
    folder = Path(cfg.LOG.PREFIX) / name
    check_folder(folder, cfg, resume)
    check_labels(cfg)
    data = load_data(cfg, device)
    check_models(cfg, data)  # before hours go into a teacher
    teacher_ckpt = resolve_teacher(cfg, data, device) if method.uses_teacher else None
    distiller = build_distiller(cfg, data, device, teacher_ckpt)
    if rank() == 0:
        show_cfg(cfg)
    teacher_acc = measure_teacher(distiller, data) if method.uses_teacher else None
    wrapped = wrap(distiller, cfg.SOLVER.FIND_UNUSED_PARAMETERS)
    trainer = trainer_class(name, wrapped, data.train, data.val, cfg)
    if rank() == 0:
        trainer.hooks.insert(0, RunRecord())
    trainer.train(resume=resume)
    summary = summarize(trainer, data, teacher_acc)
    if rank() == 0:
        (folder / "summary.json").write_text(json.dumps(summary, indent=1) + "\n")
        print(log_msg(describe(summary, folder)), flush=True)
    barrier()
    return summary


def check_folder(folder: Path, cfg: Config, resume: bool) -> None:
    """Refuse to start a run over, and to resume one that is not there or was another."""
    latest = folder / "latest"
    blocked = next((p for p in (folder, *folder.parents) if p.exists() and not p.is_dir()), None)
    if blocked:
        raise UserError(f"LOG.PREFIX: {blocked} is a file, so {folder} cannot be a folder")
    if not resume and latest.is_file():
        raise UserError(
            f"{folder} holds a run already: continue it with --resume, or start another under "
            "EXPERIMENT.NAME (to do it again, remove the folder)"
        )
    if not resume:
        return
    if not latest.is_file():
        raise UserError(
            f"--resume: there is no checkpoint {latest}; start without --resume, or give the same "
            "config and overrides as the run to continue"
        )
    if (folder / "config.yaml").is_file():  # runs of the original recorded none
        changes = changed_settings(folder, cfg)
        if cfg.SOLVER.SCHEDULE != "cosine":  # there, epochs may be added
            changes = [change for change in changes if not change.startswith("SOLVER.EPOCHS ")]
        if changes:
            raise UserError(
                f"--resume: {folder} was started with other settings ({'; '.join(changes)}): "
                "change them back, or start another run under EXPERIMENT.NAME"
            )


def resolve_teacher(cfg: Config, data: Data, device: torch.device) -> Path:
    """The teacher's weights: TEACHER_CKPT, the zoo's file, or TEACHER_CFG, trained if need be."""
    found = find_teacher(cfg, data)
    if found is not None:
        return found
    if not cfg.DISTILLER.TEACHER_CFG:
        raise UserError(no_teacher(cfg, data))
    return train_teacher(cfg, device)


def train_teacher(cfg: Config, device: torch.device) -> Path:
    """The weights that DISTILLER.TEACHER_CFG leads to, trained where that has not been done.

    The teacher sees the student's data, device and output folder; the rest is its own config. Its
    last epoch is taken, so that no test accuracy selects it.
    """
    settings = cfg.DISTILLER
    own = load_config(find_config(settings.TEACHER_CFG)).clone()
    own.defrost()
    own.DATASET, own.DEVICE = cfg.DATASET.clone(), cfg.DEVICE
    own.LOG.PREFIX, own.LOG.WANDB = cfg.LOG.PREFIX, cfg.LOG.WANDB
    own.freeze()
    if own.DISTILLER.STUDENT != settings.TEACHER:
        raise UserError(
            f"DISTILLER.TEACHER_CFG trains a {own.DISTILLER.STUDENT}, "
            f"but DISTILLER.TEACHER is {settings.TEACHER}"
        )
    name = experiment_name(own)
    folder = Path(own.LOG.PREFIX) / name
    started = (folder / "latest").is_file()
    if started:
        changes = changed_settings(folder, own)
        if changes:
            raise UserError(
                f"the teacher in {folder} was trained with other settings ({'; '.join(changes)}): "
                f"set EXPERIMENT.NAME in {settings.TEACHER_CFG}, or name a DISTILLER.TEACHER_CKPT"
            )
    if not started or load_checkpoint(folder / "latest")["epoch"] < own.SOLVER.EPOCHS:
        if rank() == 0:
            print(log_msg(f"training the teacher first: {settings.TEACHER_CFG}"), flush=True)
        _train(own, name, started, device)
    return folder / "student_latest"


def summarize(trainer: BaseTrainer, data: Data, teacher_acc: float | None) -> dict[str, Any]:
    """Last and best accuracy, and what the best was selected on.

    With held-out images the test set is used here, once: for the last and for the selected weights.
    """
    history = trainer.history
    seconds = sum(record.get("seconds", 0.0) for record in history)
    images = len(history) * data.num_data
    summary: dict[str, Any] = {
        "epochs": trainer.epoch,
        "last_acc": history[-1].get("test_acc") if history else None,
        "best_acc": trainer.best_acc,
        "best_epoch": trainer.best_epoch,
        "selected_on": "test set",
        "teacher_acc": teacher_acc,
        "seconds": seconds,
        "images_per_second": images / seconds if seconds else None,
        "parameters": sum(p.numel() for p in trainer.model.student.parameters()),
    }
    if data.test is not None:
        summary["selected_on"] = f"{len(data.val.dataset)} held-out training images"
        summary["test_acc_last"] = validate(data.test, trainer.distiller)[0]
        last = {key: value.clone() for key, value in trainer.model.state_dict().items()}
        trainer.model.load_state_dict(load_checkpoint(trainer.log_path / "best")["model"])
        summary["test_acc_best"] = validate(data.test, trainer.distiller)[0]
        trainer.model.load_state_dict(last)
    return summary


def describe(summary: dict[str, Any], folder: Path) -> str:
    """The summary in a line or two."""
    last = "unknown" if summary["last_acc"] is None else f"{summary['last_acc']:.2f}"
    text = (
        f"done: last {last}, best {summary['best_acc']:.2f} in epoch "
        f"{summary['best_epoch']} (selected on the {summary['selected_on']})"
    )
    if "test_acc_best" in summary:
        text += (
            f"; on the test set: last {summary['test_acc_last']:.2f}, "
            f"selected {summary['test_acc_best']:.2f}"
        )
    return f"{text}; files in {folder}"
