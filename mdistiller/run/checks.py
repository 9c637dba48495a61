"""Checks of a config's networks, method and trainer, before any of them is built."""

from __future__ import annotations

from typing import Any

from mdistiller.config.roles import of_teacher, peer_configs, teacher_configs
from mdistiller.dataset import DATASETS, Data, DataSource, data_spec, mixes_labels
from mdistiller.distillers import check_several, distiller_dict, get_distiller, part_names
from mdistiller.engine.optim import optimizer_maker
from mdistiller.engine.unlabelled import why_unlabelled
from mdistiller.frozen_teacher.cacheable import check_method
from mdistiller.networks.network import model_entry
from mdistiller.networks.start import student_start
from mdistiller.networks.teacher_weights import find_teacher, no_teacher
from mdistiller.registry import UserError, is_builtin
from mdistiller.user_code.forks import check_trainer, sections_read


def check_names(cfg: Any) -> None:
    """Refuse unknown names in a config, without reading any data."""
    method = get_distiller(cfg.DISTILLER.TYPE)
    check_trainer(cfg.SOLVER.TRAINER)
    source = DATASETS[cfg.DATASET.TYPE]
    check_models(cfg, source)
    for number, one in enumerate(teacher_configs(cfg) if method.uses_teacher else ()):
        given = one.DISTILLER.TEACHER_CKPT or not one.DISTILLER.TEACHER_CFG
        with of_teacher(cfg, number):
            if given and find_teacher(one, source) is None:
                raise UserError(no_teacher(one, source))


def check_models(cfg: Any, data: Data | DataSource) -> None:
    """Refuse names that do not exist, and a switch that the method does not have."""
    if groups_here(cfg):
        optimizer_maker(cfg.SOLVER.TYPE)
    model_entry(cfg, "STUDENT", data)
    student_start(cfg)
    method = get_distiller(cfg.DISTILLER.TYPE)
    reads_it = not is_builtin(method) and "EXPERIMENT" in sections_read(method)
    wanted = cfg.LSKD.ENABLE or (cfg.EXPERIMENT.LOGIT_STAND and not reads_it)
    if wanted and not method.takes_standardized_logits:
        takers = sorted(
            name
            for name, cls in distiller_dict.items()
            if getattr(cls, "takes_standardized_logits", False)
        )
        raise UserError(
            f"LSKD.ENABLE: {cfg.DISTILLER.TYPE} has no use for standardised logits; set it to "
            f"False, or choose one of {', '.join(takers)}"
        )
    check_method(cfg)
    if cfg.DISTILLER.PEERS and not method.trains_peers:
        takers = sorted(name for name, cls in distiller_dict.items() if cls.trains_peers)
        raise UserError(
            f"DISTILLER.PEERS: {cfg.DISTILLER.TYPE} trains no networks beside the student; leave "
            f"it out, or choose one of {', '.join(takers)}"
        )
    for one in peer_configs(cfg) if method.trains_peers else ():
        model_entry(one, "STUDENT", data, "PEERS")
    entries = cfg.DISTILLER.TEACHERS if method.uses_teacher else []
    if len(entries) > 1:
        weighted = any("WEIGHT" in entry for entry in entries)
        check_several(cfg.DISTILLER.TYPE, cfg.DISTILLER.COMBINE, weighted)
    for one in teacher_configs(cfg) if method.uses_teacher else ():
        model_entry(one, "TEACHER", data, "TEACHERS" if entries else "")


def check_labels(cfg: Any) -> None:
    """Refuse data without labels, and MIXUP and CUTMIX, for a method that needs the labels."""
    name = cfg.DISTILLER.TYPE
    if get_distiller(name).needs_labels and not data_spec(cfg).labels:
        guilty = [part for part in part_names(name) if get_distiller(part).needs_labels]
        others = sorted(key for key, cls in distiller_dict.items() if not cls.needs_labels)
        raise UserError(
            f"DISTILLER.TYPE {name}: {' and '.join(guilty)} needs class labels or logits, and "
            f"these data have no labels ({why_unlabelled(cfg)}); choose one of {', '.join(others)}"
        )
    if mixes_labels(cfg) and not get_distiller(name).soft_labels:
        guilty = [part for part in part_names(name) if not get_distiller(part).soft_labels]
        raise UserError(
            f"DISTILLER.TYPE {name}: {' and '.join(guilty)} cannot learn from mixed images, whose "
            "labels are soft; set DATASET.MIXUP and DATASET.CUTMIX to 0"
        )


def groups_here(cfg: Any) -> bool:
    """Whether the trainer leaves the optimizer to the library."""
    return is_builtin(check_trainer(cfg.SOLVER.TRAINER).init_optimizer)
