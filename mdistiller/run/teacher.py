"""Where the teacher's weights come from, and training it first if a config says how."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

import torch

from mdistiller.config.files import find_config
from mdistiller.config.roles import of_teacher, teacher_configs
from mdistiller.console import print_log
from mdistiller.dataset import Data
from mdistiller.distillers import get_distiller
from mdistiller.distributed import barrier, from_main_process
from mdistiller.engine.cfg import Config, load_config
from mdistiller.engine.checkpoints.store import Store
from mdistiller.networks.teacher_weights import find_teacher, no_teacher
from mdistiller.registry import UserError
from mdistiller.run.build import check_pair
from mdistiller.run_folder.changes import changed_settings
from mdistiller.run_folder.folder import read_json
from mdistiller.run_folder.lock import is_locked, locked
from mdistiller.run_folder.naming import experiment_name
from mdistiller.runtime import rank
from mdistiller.user_code.forks import active

# (config, name of the run folder, resume, device)
TrainRun = Callable[[Config, str, bool, torch.device], Any]


def resolve_teachers(
    cfg: Config, data: Data, device: torch.device, train_run: TrainRun, run_folder: Path
) -> list[Path | Literal["pretrained"]]:
    """:func:`resolve_teacher` for each teacher of a config; none where the method uses none."""
    weights: list[Path | Literal["pretrained"]] = []
    uses_them = get_distiller(cfg.DISTILLER.TYPE).uses_teacher
    for number, one in enumerate(teacher_configs(cfg) if uses_them else ()):
        with of_teacher(cfg, number):
            weights.append(resolve_teacher(one, data, device, train_run, run_folder))
    return weights


def resolve_teacher(
    cfg: Config, data: Data, device: torch.device, train_run: TrainRun, run_folder: Path
) -> Path | Literal["pretrained"]:
    """The teacher's weights: existing ones, or those of TEACHER_CFG, trained first if necessary.

    Args:
        run_folder: of the student; the teacher must have another.
    """
    weights = find_teacher(cfg, data)
    if weights is not None:
        return weights
    if not cfg.DISTILLER.TEACHER_CFG:
        raise UserError(no_teacher(cfg, data))
    if teacher_folder(teacher_config(cfg)) == run_folder:
        raise UserError(
            f"{run_folder} would be the folder of the student and of the teacher that "
            f"{cfg.DISTILLER.TEACHER_CFG} trains: give one of the two another EXPERIMENT.NAME"
        )
    check_pair(cfg, data)
    return train_teacher(cfg, device, train_run)


def train_teacher(cfg: Config, device: torch.device, train_run: TrainRun) -> Path:
    """The weights that DISTILLER.TEACHER_CFG trains; the training is done now if necessary.

    They are of the last epoch, so that no test accuracy selects them. If several processes need
    them, one trains and the others wait.
    """
    teacher_cfg = teacher_config(cfg)
    folder = teacher_folder(teacher_cfg)
    with _only_one(folder):
        started = bool(Store(folder).candidates())
        finished = from_main_process(lambda: _is_finished(folder, teacher_cfg))
        if started or (folder / "student_latest").is_file():
            changes = changed_settings(folder, teacher_cfg)
            if changes:
                raise UserError(
                    f"the teacher in {folder} was trained with other settings "
                    f"({'; '.join(changes)}): set EXPERIMENT.NAME in "
                    f"{cfg.DISTILLER.TEACHER_CFG}, or name a DISTILLER.TEACHER_CKPT"
                )
        if not finished:
            message = f"training the teacher first: {cfg.DISTILLER.TEACHER_CFG}"
            print_log(message)
            train_run(teacher_cfg, experiment_name(teacher_cfg), started, device)
    return folder / "student_latest"


def _is_finished(folder: Path, teacher_cfg: Config) -> bool:
    """Whether a run is finished and its last student exists; checkpoints may be gone."""
    epochs = read_json(folder / "summary.json").get("epochs", 0)
    return epochs >= teacher_cfg.SOLVER.EPOCHS and (folder / "student_latest").is_file()


def teacher_config(cfg: Config) -> Config:
    """The config of the teacher that DISTILLER.TEACHER_CFG trains.

    It sees the student's data, device and output folder; the rest is its teacher_cfg config.
    """
    settings = cfg.DISTILLER
    with active():  # what it imports counts when it is trained
        teacher_cfg = load_config(find_config(settings.TEACHER_CFG)).clone()
    teacher_cfg.defrost()
    teacher_cfg.DATASET, teacher_cfg.DEVICE = cfg.DATASET.clone(), cfg.DEVICE
    teacher_cfg.LOG.PREFIX, teacher_cfg.LOG.WANDB = cfg.LOG.PREFIX, cfg.LOG.WANDB
    teacher_cfg.freeze()
    if teacher_cfg.DISTILLER.STUDENT != settings.TEACHER:
        raise UserError(
            f"DISTILLER.TEACHER_CFG trains a {teacher_cfg.DISTILLER.STUDENT}, "
            f"but DISTILLER.TEACHER is {settings.TEACHER}"
        )
    for kind in ("ARGS", "NORM"):
        trained = teacher_cfg.DISTILLER[f"STUDENT_{kind}"]
        if trained != settings[f"TEACHER_{kind}"]:
            shown = dict(trained) if kind == "ARGS" else trained
            raise UserError(
                f"DISTILLER.TEACHER_CFG trains a {settings.TEACHER} with STUDENT_{kind} {shown}; "
                f"set DISTILLER.TEACHER_{kind} to the same"
            )
    return teacher_cfg


def teacher_folder(teacher_cfg: Config) -> Path:
    """The run folder of a teacher with this config."""
    return Path(teacher_cfg.LOG.PREFIX) / experiment_name(teacher_cfg)


def trained_teachers(cfg: Config) -> list[Config]:
    """The configs that train the teachers of this one, as far as they are not named as files."""
    if not get_distiller(cfg.DISTILLER.TYPE).uses_teacher:
        return []
    nodes = [(one, one.DISTILLER) for one in teacher_configs(cfg)]
    return [
        teacher_config(one) for one, node in nodes if node.TEACHER_CFG and not node.TEACHER_CKPT
    ]


def being_trained(cfg: Config) -> Path | None:
    """The folder of this config's teacher, or one of them, if another process is training it."""
    folders = map(teacher_folder, trained_teachers(cfg))
    return next((folder for folder in folders if is_locked(folder)), None)


@contextlib.contextmanager
def _only_one(folder: Path) -> Iterator[None]:
    """Lock a folder for all processes of a run, after waiting for other runs that hold it."""
    if rank():
        barrier()
        yield
        return
    with locked(folder, wait=f"waiting for another process to train the teacher in {folder}"):
        barrier()
        yield
