"""A run from start to end: from a config to a trained student in a run folder."""

from __future__ import annotations

import contextlib
import functools
import itertools
import json
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal, NamedTuple, TypeVar

import torch

from mdistiller.dataset import data_spec, load_data
from mdistiller.distillers import get_distiller
from mdistiller.engine.batch_items import wanted_items, with_items
from mdistiller.engine.callbacks.preemption import handle_signals
from mdistiller.engine.cfg import Config
from mdistiller.engine.checkpoints.store import LATEST, Store
from mdistiller.engine.checkpoints.write import file_entries
from mdistiller.engine.distributed import barrier, process_group, wrap
from mdistiller.engine.frozen_teacher.cacheable import check_views
from mdistiller.engine.hooks import Hook, named_hooks
from mdistiller.engine.networks.build import (
    build_distiller,
    check_labels,
    check_models,
)
from mdistiller.engine.networks.compiling import compile_networks
from mdistiller.engine.networks.lone_image import keep_none_alone
from mdistiller.engine.networks.roles import peer_configs, teacher_configs
from mdistiller.engine.networks.sync_bn import synchronize_batch_norm
from mdistiller.engine.run.folder import keep_full_decoding, stretched
from mdistiller.engine.run.lock import locked
from mdistiller.engine.run.naming import experiment_name
from mdistiller.engine.run.overview import describe_data, describe_network, overview
from mdistiller.engine.run.record import (
    RunRecord,
    changed_settings,
    data_facts,
    recorded_settings,
    recorded_teacher_acc,
    side_settings,
)
from mdistiller.engine.run.sharing import (
    measured_once,
    share_cache,
    share_teacher,
    shared_data,
)
from mdistiller.engine.run.summary import describe, summarize
from mdistiller.engine.run.teacher import describe_teachers, measure_teachers, resolve_teachers
from mdistiller.engine.run.together import Outcome, PrefixedStream, current_turn, run_together
from mdistiller.engine.schedules import depends_on_epochs
from mdistiller.engine.trainer import BaseTrainer
from mdistiller.engine.unlabelled import require_base
from mdistiller.engine.user_code.forks import active, check_trainer
from mdistiller.engine.utils import log_msg
from mdistiller.files.atomic import replacing
from mdistiller.registry import UserError
from mdistiller.runtime import rank, resolve_device

T = TypeVar("T")


class Prepared(NamedTuple):
    """What a run needs to begin.

    Attributes:
        trainer: ready to train.
        data: the loaders; `test` if images are held out, and `close()`, which ends worker
            processes.
        facts: of the data, for `run.json`.
        teacher_acc: accuracy of the teacher on the test set in percent, if there is one; of
            several, that of their ensemble.
        teacher: its weights, a file or PRETRAINED, for `run.json`; of several a list with the
            `name`, `weights` and `acc` of each.
        about: lines for the :func:`overview`, by title.
    """

    trainer: BaseTrainer
    data: Any
    facts: Mapping[str, Any]
    teacher_acc: float | None
    teacher: Any = None
    about: Mapping[str, str] = MappingProxyType({})


Prepare = Callable[[Config, str, torch.device, float | None], Prepared]
"""From a config, a run folder's name, a device, and the teacher's accuracy if that is known."""


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
    with handle_signals(), process_group(device, cfg.SOLVER.RANK_TIMEOUT):
        return _train(cfg, name, resume, device, hooks, allow_changes, prepare)


def data_key(cfg: Config) -> str:
    """All settings that determine a run's batches, as text; equal for runs that train together.

    But for the number of views: the weak ones of a pair are those of runs with one view.
    """
    facts = (cfg.DATASET, cfg.SOLVER.BATCH_SIZE, cfg.EXPERIMENT.SEED, cfg.DEVICE)
    return repr((*facts, cfg.SOLVER.DETERMINISTIC, cfg.IMPORTS))


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
                "EXPERIMENT.SEED, DEVICE, SOLVER.DETERMINISTIC and IMPORTS must be the same"
            )

    def job(name: str, cfg: Config) -> dict[str, Any]:
        sys.stdout = PrefixedStream(sys.stdout, name)
        return train(cfg, overrides, resume, allow_changes=allow_changes)

    jobs = [functools.partial(job, name, cfg) for name, cfg in zip(names, configs, strict=True)]
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
    prepared = (prepare or prepare_classifier)(cfg, name, device, teacher_acc)
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
                print(log_msg(f"continuing with other settings: {'; '.join(changes)}"), flush=True)
            print(overview(cfg, trainer, about, folder), flush=True)
        summary = _train_in(folder, trainer, data, teacher_acc, resume)
    barrier(cfg.SOLVER.RANK_TIMEOUT * 60)  # the folder is unlocked
    return summary


def prepare_classifier(
    cfg: Config, name: str, device: torch.device, teacher_acc: float | None = None
) -> Prepared:
    """Data, networks and trainer of a config; trains its teacher first if necessary.

    Args:
        teacher_acc: the teacher's accuracy in percent; None: measure it.
    """
    trainer_class = check_trainer(cfg.SOLVER.TRAINER)
    method = get_distiller(cfg.DISTILLER.TYPE)
    check_labels(cfg)
    trainer_class.check(cfg)
    items = wanted_items(trainer_class, method)
    if not data_spec(cfg).labels:
        trainer_class = require_base(cfg, trainer_class)
    key = data_key(cfg), items.two_views
    data = shared_data(key, lambda: load_data(cfg, device, items.two_views))
    check_models(cfg, data)  # before hours go into a teacher
    check_views(cfg, data.train)
    folder, turn = Path(cfg.LOG.PREFIX) / name, current_turn()
    train_teacher = turn.alone(_train) if turn else _train
    weights = resolve_teachers(cfg, data, device, train_teacher, folder)
    distiller, facts = build_distiller(cfg, data, device, weights), data_facts(data)
    share_teacher(distiller, cfg, device)
    for net in distiller.students():
        net.file_entries = {**file_entries(net), "data": facts}  # type: ignore[assignment]
    measured = teacher_acc is None
    accuracies: list[float | None] = []
    if weights and measured and data.num_classes:
        accuracies = measured_once(
            distiller, lambda: measure_teachers(distiller, cfg, data, device, weights)
        )
        teacher_acc = accuracies[-1]
    if cfg.SOLVER.SYNC_BN:
        synchronize_batch_norm(distiller)
    compile_networks(distiller, cfg.SOLVER.COMPILE)
    # without labels a loss may not reach all layers
    wrapped = wrap(distiller, cfg.SOLVER.FIND_UNUSED_PARAMETERS or not data.num_classes)
    loader = with_items(data.train, items, cfg)
    trainer = trainer_class(name, wrapped, loader, data.val, cfg)
    if keep_none_alone(loader, trainer, distiller, cfg):
        trainer = trainer_class(name, wrapped, loader, data.val, cfg)
    share_cache(trainer)
    several = [
        {"name": one.DISTILLER.TEACHER, "weights": file, "acc": acc}
        for one, file, acc in itertools.zip_longest(teacher_configs(cfg), weights, accuracies[:-1])
    ]
    recorded = several if len(weights) > 1 else next(iter(weights), None)
    about = {"data": describe_data(cfg, data)}
    if distiller.teacher is not None:
        shown = accuracies or [*[None] * len(several if len(weights) > 1 else []), teacher_acc]
        note = "" if measured else " (measured when the run began)"
        about |= describe_teachers(cfg, distiller.teacher, weights, shown, note)
    released = "released weights" if cfg.DISTILLER.STUDENT_ARGS.get("pretrained") else ""
    about["student"] = describe_network(cfg.DISTILLER.STUDENT, distiller.student, origin=released)
    for number, (one, net) in enumerate(
        zip(peer_configs(cfg), distiller.students()[1:], strict=False), start=1
    ):
        about[f"peer {number}"] = describe_network(one.DISTILLER.STUDENT, net)
    return Prepared(trainer, data, facts, teacher_acc, recorded, about)


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
        print(log_msg(describe(summary, folder)), flush=True)
    trainer.call("after_summary", summary)
    return summary


_AS_BEFORE = {
    "RESIZE": "DATASET.RESIZE was auto, is now stretch",
    "EXIF": "DATASET.EXIF was True, is now False",
    "JPEG_SCALING": "DATASET.JPEG_SCALING was train, is now none",
}
"""Settings that change nothing for a run from before these keys existed."""


def check_folder(folder: Path, cfg: Config, resume: bool, allow_changes: bool = False) -> list[str]:
    """Refuse to overwrite a run, and to resume one that does not exist or has other settings.

    Returns:
        The changed settings of a resumed run.
    """
    blocked = next((p for p in (folder, *folder.parents) if p.exists() and not p.is_dir()), None)
    if blocked:
        raise UserError(f"LOG.PREFIX: {blocked} is a file, so {folder} cannot be a folder")
    there = bool(Store(folder).candidates())
    if not resume and there:
        raise UserError(
            f"{folder} holds a run already: continue it with --resume, or start another under "
            "EXPERIMENT.NAME (to do it again, remove the folder)"
        )
    kept = None if there else trained_file(folder)
    if kept:
        raise UserError(
            f"{folder} holds what a run has trained ({kept}) but no checkpoint to go on from: "
            "start another run under EXPERIMENT.NAME, or remove the folder"
        )
    if not resume:
        return []
    if not there:
        raise UserError(
            f"--resume: there is no checkpoint {folder / LATEST}; start without --resume, or give "
            "the same config and overrides as the run to continue"
        )
    if not (folder / "config.yaml").is_file():  # runs of the original recorded none
        return []
    changes = changed_settings(folder, cfg, goes_on=True)
    recorded = recorded_settings(folder)
    data = recorded.get("DATASET", {})
    same = [text for key, text in _AS_BEFORE.items() if key not in data]
    changes = [change for change in changes if change not in same]
    if "RESIZE" not in data and not allow_changes and stretched(recorded, cfg):
        raise UserError(
            f"--resume: {folder} was begun by an earlier version, which stretched photographs: "
            "set DATASET.RESIZE stretch and DATASET.EXIF False in its config, or give "
            "--allow-changes"
        )
    if not depends_on_epochs(cfg.SOLVER):  # then epochs may be added
        changes = [change for change in changes if not change.startswith("SOLVER.EPOCHS ")]
    if changes and not allow_changes:
        raise UserError(
            f"--resume: {folder} was started with other settings ({'; '.join(changes)}): "
            "change them back, start another run under EXPERIMENT.NAME, or give --allow-changes"
        )
    fixed = ("EXPERIMENT.SEED ", "LOG.SELECT_BY ", "LOG.PROBE ")
    begun = [text for text in changes if text.startswith(fixed) or ".INIT." in text]
    if begun:
        raise UserError(
            f"--resume: {folder} has begun with what cannot be changed any more "
            f"({'; '.join(begun)}): change it back, or start another run under EXPERIMENT.NAME"
        )
    return [*changes, *side_settings(folder, cfg)]


def trained_file(folder: Path) -> str | None:
    """A file that proves that a run has trained and saved an epoch.

    A run that died earlier has at most its config, records, and a line of metrics.
    """
    for pattern in ("student_*", "summary.json", "latest.damaged"):
        for path in sorted(folder.glob(pattern)):
            return path.name
    metrics = folder / "metrics.jsonl"
    several = metrics.is_file() and metrics.read_bytes().count(b"\n") > 1
    return metrics.name if several else None
