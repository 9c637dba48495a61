"""A run from start to end: from a config to a trained student in a run folder."""

from __future__ import annotations

import contextlib
import functools
import json
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch

from mdistiller.console import print_log
from mdistiller.distributed import barrier, process_group
from mdistiller.engine.callbacks.preemption import handle_signals
from mdistiller.engine.cfg import Config
from mdistiller.engine.checkpoints.store import Store
from mdistiller.engine.hooks import Hook, named_hooks
from mdistiller.engine.trainer import BaseTrainer
from mdistiller.files.atomic import replacing
from mdistiller.registry import UserError
from mdistiller.run.overview import overview
from mdistiller.run.prepare import Prepare, prepare_classifier
from mdistiller.run.sharing import data_key
from mdistiller.run.summary import describe, summarize
from mdistiller.run.together import Outcome, PrefixedStream, run_together
from mdistiller.run_folder.changes import changed_settings
from mdistiller.run_folder.folder import keep_full_decoding
from mdistiller.run_folder.lock import locked
from mdistiller.run_folder.naming import experiment_name
from mdistiller.run_folder.record import RunRecord, recorded_settings, recorded_teacher_acc
from mdistiller.run_folder.start_check import check_folder
from mdistiller.runtime import rank, resolve_device
from mdistiller.user_code.forks import active

T = TypeVar("T")


def train(
    cfg: Config,
    overrides: Sequence[str] = (),
    resume: bool | Literal["auto"] = False,
    hooks: Sequence[Hook] = (),
    allow_changes: bool = False,
    prepare: Prepare | None = None,
) -> dict[str, Any]:
    """Train what a config describes.

    Args:
        cfg: the whole config.
        overrides: the command line's `[key, value, ...]`, already merged; they name the run folder.
        resume: continue the run in that folder; "auto": if there is one, else start it.
        hooks: run before all others.
        allow_changes: continue under another config, whatever it changes.
        prepare: builds data, networks and trainer of another task than classification.

    Returns:
        The run's summary, which is also `summary.json` in its folder.

    Raises:
        Preempted: SIGTERM, SIGINT or SIGUSR1 ended the run, its state saved.
    """
    device, name = resolve_device(cfg.DEVICE), experiment_name(cfg, overrides)
    set_determinism(cfg.SOLVER.DETERMINISTIC)
    if resume == "auto":
        resume = bool(Store(Path(cfg.LOG.PREFIX) / name).candidates())
    # each thread of runs in lock-step has a current GPU of its own
    current = torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()
    with current, handle_signals(), process_group(device, cfg.SOLVER.RANK_TIMEOUT):
        return _train(cfg, name, resume, device, hooks, allow_changes, prepare)


def train_together(
    configs: Sequence[Config],
    overrides: Sequence[str] = (),
    resume: bool | Literal["auto"] = False,
    allow_changes: bool = False,
) -> list[Outcome[dict[str, Any]]]:
    """Train several configs in lock-step (see `together.py`); arguments as of :func:`train`.

    Returns:
        The summary of each run, or the error that ended it.

    Raises:
        UserError: the configs have different data, or runs have the same folder.
    """
    names = [experiment_name(cfg, overrides) for cfg in configs]
    for name, cfg in zip(names, configs, strict=True):
        if cfg.SOLVER.CUDA_GRAPHS:
            raise UserError(
                f"{name}: SOLVER.CUDA_GRAPHS does not work in lock-step: train it alone"
            )
        if names.count(name) > 1:
            raise UserError(f"two configs have the run folder {name}: set EXPERIMENT.NAME in one")
        if data_key(cfg) != data_key(configs[0]):
            raise UserError(
                f"{names[0]} and {name} cannot train together: DATASET, SOLVER.BATCH_SIZE, "
                "EXPERIMENT.SEED, DEVICE, SOLVER.DETERMINISTIC, IMPORTS and "
                "DISTILLER.TEACHER_SIZE must be the same"
            )

    def job(name: str, cfg: Config) -> dict[str, Any]:
        sys.stdout = PrefixedStream(sys.stdout, name)
        return train(cfg, overrides, resume, allow_changes=allow_changes)

    short = [experiment_name(cfg) for cfg in configs]  # without the overrides, which all share
    labels = short if len({*short}) == len(names) else names
    jobs = [functools.partial(job, name, cfg) for name, cfg in zip(labels, configs, strict=True)]
    patience = max(cfg.SOLVER.RANK_TIMEOUT for cfg in configs)
    with process_group(resolve_device(configs[0].DEVICE), patience):
        return in_lock_step(jobs, configs[0])


def in_lock_step(jobs: Sequence[Callable[[], T]], cfg: Config) -> list[Outcome[T]]:
    """Call jobs that each train a run with the data of `cfg` (:func:`data_key`), in lock-step."""
    with handle_signals(), active(cfg.IMPORTS):
        return run_together(jobs, resolve_device(cfg.DEVICE))


def train_or_continue(
    cfg: Config, overrides: Sequence[str] = (), hooks: Sequence[Hook] = ()
) -> dict[str, Any]:
    """The summary of a run, which is trained or resumed first unless it is finished."""
    folder = Path(cfg.LOG.PREFIX) / experiment_name(cfg, overrides)
    try:
        summary: dict[str, Any] = json.loads((folder / "summary.json").read_text())
    except (OSError, ValueError):  # not there, or cut off while it was written
        return train(cfg, overrides, resume="auto", hooks=hooks)
    with active(cfg.IMPORTS):
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


def _train(cfg: Config, *settings: Any, **more: Any) -> dict[str, Any]:
    """:func:`_train_with`, with the classes that the config's IMPORTS register."""
    with active(cfg.IMPORTS):
        return _train_with(cfg, *settings, **more)


def _train_with(
    cfg: Config,
    name: str,
    resume: bool,
    device: torch.device,
    hooks: Sequence[Hook] = (),
    allow_changes: bool = False,
    prepare: Prepare | None = None,
) -> dict[str, Any]:
    folder = Path(cfg.LOG.PREFIX) / name
    hooks = [*hooks, *named_hooks(cfg.HOOKS)]
    if resume and prepare is None and (folder / "config.yaml").is_file():
        keep_full_decoding(recorded_settings(folder), cfg)
    changes = check_folder(folder, cfg, resume, allow_changes)
    teacher_acc = recorded_teacher_acc(folder) if resume and not changes else None
    prepare = prepare or functools.partial(prepare_classifier, train_run=_train)
    prepared = prepare(cfg, name, device, teacher_acc)
    trainer, data, facts, teacher_acc, teacher, about = prepared
    record = RunRecord(facts, teacher_acc, teacher)
    if rank() == 0:
        trainer.hooks[:0] = [*hooks, record]
    with (
        contextlib.closing(data),
        locked(folder) if rank() == 0 else contextlib.nullcontext(),
    ):
        if rank() == 0:  # another run may have been in there meanwhile
            record.changes = changes = check_folder(folder, cfg, resume, allow_changes)
            if changes:
                print_log(f"continuing with other settings: {'; '.join(changes)}")
            print(overview(cfg, trainer, about, folder), flush=True)
        summary = _train_in(folder, trainer, data, teacher_acc, resume)
    barrier(cfg.SOLVER.RANK_TIMEOUT * 60)  # the folder is unlocked
    return summary


def _train_in(
    folder: Path, trainer: BaseTrainer, data: Any, teacher_acc: float | None, resume: bool
) -> dict[str, Any]:
    """Train, and write the summary."""
    if trainer.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(trainer.device)
    try:
        trainer.train(resume=resume)
    except BaseException:
        for hook in trainer.hooks:
            hook.abandon(trainer)
        raise
    barrier(trainer.cfg.SOLVER.RANK_TIMEOUT * 60)  # the first process has written the checkpoints
    summary = summarize(trainer, data, teacher_acc)
    if rank() == 0:
        with replacing(folder / "summary.json") as temporary:
            temporary.write_text(json.dumps(summary, indent=1) + "\n")
        print_log(describe(summary, folder))
    trainer.call("after_summary", summary)
    return summary
