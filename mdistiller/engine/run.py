"""A whole run: from a config to a trained student in a run folder with a record of how."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from mdistiller.dataset import Data, load_data
from mdistiller.distillers import DISTILLERS
from mdistiller.engine.build import build_distiller, check_models, measure_teacher
from mdistiller.engine.cfg import Config, find_config, load_config, show_cfg
from mdistiller.engine.checkpoint import load_checkpoint
from mdistiller.engine.distributed import barrier, process_group, wrap
from mdistiller.engine.record import RunRecord
from mdistiller.engine.trainer import BaseTrainer, trainer_dict
from mdistiller.engine.utils import log_msg, validate
from mdistiller.registry import UserError
from mdistiller.runtime import rank, resolve_device

# Keys that say where files go, not what is trained: they stay out of a run folder's name.
_PLACES = ("EXPERIMENT.NAME", "EXPERIMENT.PROJECT", "EXPERIMENT.TAG", "LOG.PREFIX", "IMPORTS")


def experiment_name(cfg: Config, overrides: Sequence[str] = ()) -> str:
    """`PROJECT/NAME` of a run folder; without NAME the TAG, and the overrides behind it."""
    items = [
        f"{key}:{value}"
        for key, value in zip(overrides[0::2], overrides[1::2], strict=True)
        if key not in _PLACES
    ]
    name = (cfg.EXPERIMENT.NAME or cfg.EXPERIMENT.TAG) + ",".join(items)
    return f"{cfg.EXPERIMENT.PROJECT}/{name.replace('/', '_').replace(os.sep, '_')[:200]}"


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
    method = DISTILLERS[cfg.DISTILLER.TYPE]
    folder = Path(cfg.LOG.PREFIX) / name
    check_folder(folder, resume)
    data = load_data(cfg, device)
    check_models(cfg, data)  # before hours go into a teacher
    teacher_ckpt = train_teacher(cfg, device) if method.uses_teacher else None
    distiller = build_distiller(cfg, data, device, teacher_ckpt)
    if rank() == 0:
        show_cfg(cfg)
    teacher_acc = measure_teacher(distiller, data) if method.uses_teacher else None
    trainer = trainer_class(
        name,
        wrap(distiller, cfg.SOLVER.FIND_UNUSED_PARAMETERS),
        data.train,
        data.val,
        cfg,
        test_loader=data.test,
    )
    if rank() == 0:
        trainer.hooks.insert(0, RunRecord())
    trainer.train(resume=resume)
    summary = summarize(trainer, data, teacher_acc)
    if rank() == 0:
        (folder / "summary.json").write_text(json.dumps(summary, indent=1) + "\n")
        print(log_msg(describe(summary, folder)), flush=True)
    barrier()
    return summary


def check_folder(folder: Path, resume: bool) -> None:
    """Refuse to start over a run that is there, and to resume one that is not."""
    latest = folder / "latest"
    if resume and not latest.is_file():
        raise UserError(
            f"--resume: there is no checkpoint {latest}; start without --resume, or give the same "
            "config and overrides as the run to continue"
        )
    if not resume and latest.is_file():
        raise UserError(
            f"{folder} holds a run already: continue it with --resume, or start another under "
            "EXPERIMENT.NAME (to do it again, remove the folder)"
        )


def train_teacher(cfg: Config, device: torch.device) -> Path | None:
    """The teacher's weights by DISTILLER.TEACHER_CFG, trained first where that has not been done.

    None where the weights are found without: a TEACHER_CKPT, or the zoo's usual place. The teacher
    sees the student's data, device and output folder; the rest is its own config. Its last epoch
    is taken, so no test accuracy selects it.
    """
    settings = cfg.DISTILLER
    if not settings.TEACHER_CFG or settings.TEACHER_CKPT:
        return None
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
        _same_settings(folder, own)
        finished = load_checkpoint(folder / "latest")["epoch"] >= own.SOLVER.EPOCHS
    if not started or not finished:
        if rank() == 0:
            print(log_msg(f"training the teacher first: {settings.TEACHER_CFG}"), flush=True)
        _train(own, name, started, device)
    return folder / "student_latest"


def _same_settings(folder: Path, cfg: Config) -> None:
    """Refuse a finished teacher that was trained under other settings than its config has now."""
    recorded = Config.load_cfg((folder / "config.yaml").read_text())
    for section in ("DATASET", "DISTILLER", "SOLVER", "EXPERIMENT"):
        for key, value in cfg[section].items():
            before = recorded.get(section, {}).get(key, value)
            if before != value:
                raise UserError(
                    f"the teacher in {folder} was trained with {section}.{key} = {before}, its "
                    f"config now says {value}: remove that folder, or set EXPERIMENT.NAME there"
                )


def summarize(trainer: BaseTrainer, data: Data, teacher_acc: float | None) -> dict[str, Any]:
    """Last and best accuracy, and what the best was selected on.

    With held-out images the test set is used here, once: for the last and for the selected weights.
    """
    history = trainer.history
    summary: dict[str, Any] = {
        "epochs": trainer.epoch,
        "last_acc": history[-1]["test_acc"] if history else None,
        "best_acc": trainer.best_acc,
        "best_epoch": trainer.best_epoch,
        "selected_on": "test set",
        "teacher_acc": teacher_acc,
        "seconds": sum(record["seconds"] for record in history),
        "images_per_second": max((r["images_per_second"] for r in history), default=None),
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
    text = (
        f"done: last {summary['last_acc']:.2f}, best {summary['best_acc']:.2f} in epoch "
        f"{summary['best_epoch']} (selected on the {summary['selected_on']})"
    )
    if "test_acc_best" in summary:
        text += (
            f"; on the test set: last {summary['test_acc_last']:.2f}, "
            f"selected {summary['test_acc_best']:.2f}"
        )
    return f"{text}; files in {folder}"
