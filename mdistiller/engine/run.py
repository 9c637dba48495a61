"""A whole run: from a config to a trained student in a run folder with a record of how."""

from __future__ import annotations

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
    measure_teacher,
)
from mdistiller.engine.cfg import Config, show_cfg
from mdistiller.engine.checkpoint import load_checkpoint
from mdistiller.engine.compiling import compile_networks
from mdistiller.engine.distributed import barrier, process_group, wrap
from mdistiller.engine.hooks import Hook
from mdistiller.engine.record import RunRecord, changed_settings, experiment_name
from mdistiller.engine.sync_bn import synchronize_batch_norm
from mdistiller.engine.teacher import resolve_teacher
from mdistiller.engine.trainer import BaseTrainer, trainer_dict
from mdistiller.engine.utils import log_msg, validate
from mdistiller.registry import UserError
from mdistiller.runtime import rank, resolve_device


def train(
    cfg: Config,
    overrides: Sequence[str] = (),
    resume: bool = False,
    hooks: Sequence[Hook] = (),
) -> dict[str, Any]:
    """Train what a config describes.

    Args:
        cfg: the whole config.
        overrides: the command line's `[key, value, ...]`, already merged; they name the run folder.
        resume: continue the run in that folder.
        hooks: run before all others.

    Returns:
        The run's summary, which is also `summary.json` in its folder.
    """
    device = resolve_device(cfg.DEVICE)
    set_determinism(cfg.SOLVER.DETERMINISTIC)
    with process_group(device):
        return _train(cfg, experiment_name(cfg, overrides), resume, device, hooks)


def train_or_continue(
    cfg: Config, overrides: Sequence[str] = (), hooks: Sequence[Hook] = ()
) -> dict[str, Any]:
    """The summary of a run: of a finished one as it stands, else after training what is missing."""
    folder = Path(cfg.LOG.PREFIX) / experiment_name(cfg, overrides)
    try:
        summary: dict[str, Any] = json.loads((folder / "summary.json").read_text())
    except (OSError, ValueError):  # not there, or cut off while it was written
        return train(cfg, overrides, resume=(folder / "latest").is_file(), hooks=hooks)
    changes = changed_settings(folder, cfg)
    if changes:
        raise UserError(f"{folder} holds a run with other settings ({'; '.join(changes)})")
    return summary


def set_determinism(wanted: bool) -> None:
    """Reproducible CUDA kernels if wanted, else the fastest ones."""
    torch.backends.cudnn.benchmark = not wanted
    torch.use_deterministic_algorithms(wanted, warn_only=True)
    if wanted:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")


def _train(
    cfg: Config, name: str, resume: bool, device: torch.device, hooks: Sequence[Hook] = ()
) -> dict[str, Any]:
    trainer_class = trainer_dict[cfg.SOLVER.TRAINER]
    method = get_distiller(cfg.DISTILLER.TYPE)
    folder = Path(cfg.LOG.PREFIX) / name
    check_folder(folder, cfg, resume)
    check_labels(cfg)
    trainer_class.check(cfg)
    data = load_data(cfg, device, method.two_views)
    check_models(cfg, data)  # before hours go into a teacher
    teacher_ckpt = None
    if method.uses_teacher:
        teacher_ckpt = resolve_teacher(cfg, data, device, _train, folder)
    distiller = build_distiller(cfg, data, device, teacher_ckpt)
    if rank() == 0:
        show_cfg(cfg)
    teacher_acc = measure_teacher(distiller, data) if method.uses_teacher else None
    if cfg.SOLVER.SYNC_BN:
        synchronize_batch_norm(distiller)
    compile_networks(distiller, cfg.SOLVER.COMPILE)
    wrapped = wrap(distiller, cfg.SOLVER.FIND_UNUSED_PARAMETERS)
    trainer = trainer_class(name, wrapped, data.train, data.val, cfg)
    if rank() == 0:
        trainer.hooks[:0] = [*hooks, RunRecord(data)]
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    try:
        trainer.train(resume=resume)
    except BaseException:
        for hook in trainer.hooks:
            hook.abandon(trainer)
        raise
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
        changes = changed_settings(folder, cfg, goes_on=True)
        if cfg.SOLVER.SCHEDULE != "cosine":  # there, epochs may be added
            changes = [change for change in changes if not change.startswith("SOLVER.EPOCHS ")]
        if changes:
            raise UserError(
                f"--resume: {folder} was started with other settings ({'; '.join(changes)}): "
                "change them back, or start another run under EXPERIMENT.NAME"
            )


def summarize(trainer: BaseTrainer, data: Data, teacher_acc: float | None) -> dict[str, Any]:
    """Last and best accuracy, and what the best was selected on.

    With held-out images the test set is used here, once: for the last and for the selected weights.
    """
    history = trainer.history
    seconds = sum(record.get("seconds", 0.0) for record in history)
    images = len(history) * data.num_data
    rate = images / seconds if seconds else None
    seconds += stage_seconds(trainer.log_path)
    summary: dict[str, Any] = {
        "epochs": trainer.epoch,
        "last_acc": history[-1].get("test_acc") if history else None,
        "best_acc": trainer.best_acc,
        "best_epoch": trainer.best_epoch,
        "selected_on": "test set",
        "teacher_acc": teacher_acc,
        "seconds": seconds,
        "images_per_second": rate,
        "parameters": sum(p.numel() for p in trainer.model.student.parameters()),
    }
    if data.test is not None:
        summary["selected_on"] = f"{len(data.val.dataset)} held-out training images"
        summary["test_acc_last"] = validate(data.test, trainer.distiller)[0]
        last = {key: value.clone() for key, value in trainer.model.state_dict().items()}
        trainer.model.load_state_dict(load_checkpoint(trainer.log_path / "best")["model"])
        summary["test_acc_best"] = validate(data.test, trainer.distiller)[0]
        trainer.model.load_state_dict(last)
    for hook in trainer.hooks:
        summary |= hook.summarize(trainer, data)
    return summary


def stage_seconds(folder: Path) -> float:
    """What the stages before the main one took, as the run's metrics tell."""
    path = folder / "metrics.jsonl"
    rows = map(json.loads, path.read_text().splitlines()) if path.is_file() else []
    return sum(row.get("seconds", 0.0) for row in rows if "stage" in row)


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
