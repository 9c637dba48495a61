"""Build what a run trains: data, networks, trainer."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import torch

from mdistiller.dataset import Data, data_spec, load_data
from mdistiller.distillers import Distiller, get_distiller
from mdistiller.distributed import wrap
from mdistiller.engine.cfg import Config
from mdistiller.engine.checkpoints.write import file_entries
from mdistiller.engine.probe import labelled_config
from mdistiller.engine.trainer import BaseTrainer
from mdistiller.engine.unlabelled import require_base
from mdistiller.frozen_teacher.cacheable import check_views
from mdistiller.networks.compiling import compile_networks
from mdistiller.networks.lone_image import keep_none_alone
from mdistiller.networks.sync_bn import synchronize_batch_norm
from mdistiller.networks.teacher_images import teacher_image_size, teacher_sees_weak
from mdistiller.run.batch_items import BatchItems, wanted_items, with_items
from mdistiller.run.build import build_distiller
from mdistiller.run.checks import check_labels, check_models
from mdistiller.run.measuring import describe_networks, measure_teachers, teacher_records
from mdistiller.run.overview import describe_data
from mdistiller.run.sharing import (
    data_key,
    measured_once,
    share_cache,
    share_teacher,
    shared_data,
)
from mdistiller.run.teacher import TrainRun, resolve_teachers
from mdistiller.run.together import current_turn
from mdistiller.run_folder.record import data_facts
from mdistiller.user_code.forks import check_trainer


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


def prepare_classifier(
    cfg: Config,
    name: str,
    device: torch.device,
    teacher_acc: float | None = None,
    *,
    train_run: TrainRun,
) -> Prepared:
    """Data, networks and trainer of a config; trains its teacher first if necessary.

    Args:
        teacher_acc: the teacher's accuracy in percent; None: measure it.
        train_run: trains a teacher that has no weights yet.
    """
    trainer_class, items = _choose_trainer(cfg)
    weak, size = teacher_sees_weak(cfg, items.two_views), teacher_image_size(cfg)
    key = data_key(cfg), items.two_views, weak
    data = shared_data(key, lambda: load_data(cfg, device, items.two_views, size, weak))
    check_models(cfg, data)  # before hours go into a teacher
    check_views(cfg, data.train)
    folder, turn = Path(cfg.LOG.PREFIX) / name, current_turn()
    train_teacher = turn.alone(train_run) if turn else train_run
    weights = resolve_teachers(cfg, data, device, train_teacher, folder)
    distiller, facts = build_distiller(cfg, data, device, weights), data_facts(data)
    distiller.teacher_sees_weak = weak
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
    loader = with_items(data.train, items, cfg)
    trainer = _make_trainer(trainer_class, name, distiller, loader, data, cfg)
    recorded, scores = teacher_records(cfg, weights, accuracies), accuracies or [teacher_acc]
    networks = describe_networks(cfg, distiller, weights, scores, measured)
    about = {"data": describe_data(cfg, data), **networks}
    return Prepared(trainer, data, facts, teacher_acc, recorded, about)


def _choose_trainer(cfg: Config) -> tuple[type[BaseTrainer], BatchItems]:
    """The class of the trainer, and what it and the method read of a batch."""
    kind = check_trainer(cfg.SOLVER.TRAINER)
    check_labels(cfg)
    if cfg.LOG.PROBE:
        labelled_config(cfg, cfg.LOG.PROBE)  # is there
    kind.check(cfg)
    items = wanted_items(kind, get_distiller(cfg.DISTILLER.TYPE))
    return kind if data_spec(cfg).labels else require_base(cfg, kind), items


def _make_trainer(
    kind: type[BaseTrainer], name: str, distiller: Distiller, loader: Any, data: Data, cfg: Config
) -> BaseTrainer:
    """The trainer, after the networks are synchronised, compiled and wrapped as the config says."""
    if cfg.SOLVER.SYNC_BN:
        synchronize_batch_norm(distiller)
    compile_networks(distiller, cfg.SOLVER.COMPILE)
    # without labels a loss may not reach all layers
    wrapped = wrap(distiller, cfg.SOLVER.FIND_UNUSED_PARAMETERS or not data.num_classes)
    trainer = kind(name, wrapped, loader, data.val, cfg)
    if keep_none_alone(loader, trainer, distiller, cfg):
        trainer = kind(name, wrapped, loader, data.val, cfg)
    share_cache(trainer)
    return trainer
