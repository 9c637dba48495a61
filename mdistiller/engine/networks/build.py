"""Build a distiller from a config: networks, the teacher's weights, the method."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from mdistiller.dataset import (
    DATASETS,
    Data,
    DataSource,
    TestData,
    data_spec,
    mixes_labels,
)
from mdistiller.distillers import (
    Distiller,
    TeacherEnsemble,
    TeacherTeam,
    check_several,
    distiller_dict,
    get_distiller,
    part_names,
    several,
)
from mdistiller.engine.frozen_teacher.cacheable import check_method
from mdistiller.engine.frozen_teacher.facts import supply_facts
from mdistiller.engine.frozen_teacher.frozen import count_hooks, prepare_teacher
from mdistiller.engine.networks.class_balance import set_hard_label_loss
from mdistiller.engine.networks.class_order import match_classes
from mdistiller.engine.networks.make import check_input, make_network
from mdistiller.engine.networks.memory_format import use_channels_last
from mdistiller.engine.networks.released import (
    PRETRAINED,
    arguments,
    own_preprocessing,
    require_classes,
    states_nothing,
    statistics_of,
    taken_line,
)
from mdistiller.engine.networks.roles import of_teacher, peer_configs, teacher_configs
from mdistiller.engine.networks.start import find_file, load_start
from mdistiller.engine.networks.teacher_size import teacher_image_size
from mdistiller.engine.optim import build_optimizer, optimizer_maker
from mdistiller.engine.optim.param_groups import freeze, student_groups
from mdistiller.engine.trainer import seed_everything
from mdistiller.engine.user_code.forks import check_trainer, sections_read
from mdistiller.engine.utils import print_log
from mdistiller.models import ModelEntry, get_model_entry
from mdistiller.models.normalize import renormalize_input, resize_input
from mdistiller.preprocessing import Preprocessing
from mdistiller.registry import UserError, is_builtin
from mdistiller.runtime import local_rank_zero_first
from mdistiller.weights import load_network


def build_distiller(
    cfg: Any,
    data: Data,
    device: torch.device,
    teacher_ckpt: str | Path | Sequence[str | Path] | None = None,
) -> Distiller:
    """The distiller of a config, on `device`, its teacher loaded and frozen.

    The student is made first, right after seeding: with one seed it starts from the same weights
    under every method and teacher.

    Args:
        teacher_ckpt: the teacher's weights, a file or PRETRAINED, or those of each of several; by
            default what :func:`find_teacher` finds.
    """
    seed_everything(cfg.EXPERIMENT.SEED)
    student, teacher = build_network(cfg, "STUDENT", data), None
    if get_distiller(cfg.DISTILLER.TYPE).uses_teacher:
        files = [teacher_ckpt] if isinstance(teacher_ckpt, (str, Path)) else teacher_ckpt
        teacher = build_teacher(cfg, data, files or ())
    peers: list[nn.Module] = []
    if get_distiller(cfg.DISTILLER.TYPE).trains_peers:
        peers = [build_network(one, "STUDENT", data) for one in peer_configs(cfg)]
    hooks = 0 if teacher is None else count_hooks(teacher)
    distiller = build_method(cfg, data, student, teacher, peers)
    set_hard_label_loss(distiller, cfg, data)
    distiller.to(device)
    distiller.watches_teacher = teacher is not None and count_hooks(teacher) != hooks
    if cfg.SOLVER.CHANNELS_LAST:
        use_channels_last(distiller)
    freeze_teacher(distiller)
    distiller.fixed_norms = freeze(distiller.student, cfg.SOLVER.FREEZE)
    prepare_teacher(distiller, cfg, data.image_size)
    supply_facts(distiller, cfg, data, device)
    return distiller


def build_teacher(cfg: Any, data: Data, weights: Sequence[str | Path] = ()) -> nn.Module:
    """The teacher with its weights, by default those that are found; several as one network."""
    configs, nets = teacher_configs(cfg), []
    any_head = not get_distiller(cfg.DISTILLER.TYPE).needs_teacher_classifier
    for number, one in enumerate(configs):
        with of_teacher(cfg, number):
            file = weights[number] if weights else find_teacher(one, data)
            if file is None:
                raise UserError(no_teacher(one, data))
            nets.append(build_network(one, "TEACHER", data, file, any_head))
    if len(nets) == 1:
        return nets[0]
    team = TeacherEnsemble if cfg.DISTILLER.COMBINE == "ensemble" else TeacherTeam
    return team(nets, [entry.get("WEIGHT", 1.0) for entry in cfg.DISTILLER.TEACHERS])


def build_method(
    cfg: Any,
    data: Data,
    student: nn.Module,
    teacher: nn.Module | None,
    peers: Sequence[nn.Module] = (),
) -> Distiller:
    """Build the config's method for its networks."""
    facts: dict[str, Any] = {
        "image_size": data.image_size,
        "targets": getattr(getattr(data.train, "dataset", None), "targets", None),
    }
    if peers:
        facts["peers"] = peers
    method = get_distiller(cfg.DISTILLER.TYPE)
    if type(teacher) is TeacherTeam:
        method = several(method, cfg.DISTILLER.COMBINE)
    return method.build(student, teacher, cfg, data.num_data, **facts)


def check_pair(cfg: Any, data: Data) -> None:
    """Refuse a pair of networks that the method cannot use, and an optimizer that cannot be, before
    a teacher is trained for them."""
    student = build_network(cfg, "STUDENT", data, None if cfg.DISTILLER.STUDENT_CKPT else "")
    teacher = build_network(cfg, "TEACHER", data, weights="")
    distiller = build_method(cfg, data, student, teacher)
    freeze(distiller.student, cfg.SOLVER.FREEZE)
    if groups_here(cfg):
        groups = student_groups(distiller.param_groups(), cfg.SOLVER, distiller)
        build_optimizer(groups, cfg.SOLVER)


def build_network(
    cfg: Any,
    role: str,
    data: Data | TestData,
    weights: str | Path | None = None,
    any_head: bool = False,
) -> nn.Module:
    """The network in a role, "STUDENT" or "TEACHER", with its input normalisation.

    Args:
        weights: a file, or PRETRAINED for released ones that must be of the data's classes; "" for
            random ones. By default what fits of DISTILLER.STUDENT_CKPT for a student; else what the
            role's ARGS say: random ones, or with `pretrained` released ones under a classifier for
            the data.
        any_head: the classifier will not be used: weights may be for other classes, or have none.
    """
    name, key = cfg.DISTILLER[role], f"DISTILLER.{role}_ARGS"
    entry, settings = model_entry(cfg, role, data), arguments(cfg, role)
    backbone = settings.get("num_classes") == 0
    if backbone and data.num_classes and not any_head:
        raise UserError(
            f"{key} {{num_classes: 0}} leaves out the classifier of {name}, which is needed here: "
            "choose a method that reads features alone (docs/foundation.md), or leave it out"
        )
    wanted = settings.pop("pretrained", False)
    start = student_start(cfg) if role == "STUDENT" and weights is None else None
    weights = start or weights
    if weights == PRETRAINED:
        wanted = wanted or True
        if not any_head:
            require_classes(entry, {**settings, "pretrained": wanted}, data.num_classes)
    elif weights is not None:
        wanted = False
    if wanted:
        settings |= {"pretrained": wanted, "new_head": weights is None or any_head}
    net: Any
    own_size = teacher_image_size(cfg) if role == "TEACHER" else None
    size = own_size or data.image_size
    with local_rank_zero_first() if wanted else contextlib.nullcontext():
        channels = len(data.mean)
        net = make_network(entry, data.num_classes, size, settings, key, channels)
    if own_size:
        resize_input(net, own_size)
    elif role == "STUDENT" and getattr(data, "train_size", None) not in (None, size):
        resize_input(net, size)  # training images are made for the teacher
    facts = entry.pretrained_on(settings) if wanted and any_head else None
    if facts is not None and facts.classes != data.num_classes:
        net.untrained_head = True
    check_input(net, name, data, backbone)
    given, stated = (data.mean, data.std), None
    if start is not None:
        stated = load_start(cfg, net, start, name, data)
    elif weights not in (None, "", PRETRAINED):
        stated = load_network(
            net, weights, name, data.num_classes, any_head, any_head, diverged=role == "STUDENT"
        )
        if not getattr(net, "untrained_head", False):
            match_classes(cfg, net, weights, stated, data, any_head)
    how = own_preprocessing(cfg, role, entry, weights, stated)
    renormalize_input(net, given, statistics_of(cfg, role, how, given))
    if weights and how and states_nothing(entry, weights, stated):
        if data.preprocessing.resize == "keep":
            how = Preprocessing(how.mean, how.std)
        print_log(taken_line(name, role, how, weights))
    return net


def groups_here(cfg: Any) -> bool:
    """Whether the trainer leaves the optimizer to the library."""
    return is_builtin(check_trainer(cfg.SOLVER.TRAINER).init_optimizer)


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
    for one in peer_configs(cfg):
        model_entry(one, "STUDENT", data, "PEERS")
    entries = cfg.DISTILLER.TEACHERS if method.uses_teacher else []
    if len(entries) > 1:
        weighted = any("WEIGHT" in entry for entry in entries)
        check_several(cfg.DISTILLER.TYPE, cfg.DISTILLER.COMBINE, weighted)
    for one in teacher_configs(cfg) if method.uses_teacher else ():
        model_entry(one, "TEACHER", data, "TEACHERS" if entries else "")


def student_start(cfg: Any) -> Path | None:
    """The file that the student starts from, if any.

    Raises:
        UserError: it does not exist, or STUDENT_ARGS ask for released weights as well.
    """
    if not cfg.DISTILLER.STUDENT_CKPT:
        return None
    if cfg.DISTILLER.STUDENT_ARGS.get("pretrained"):
        raise UserError(
            "DISTILLER.STUDENT_CKPT and STUDENT_ARGS {pretrained: True} both say what the student "
            "starts from: leave one of them out"
        )
    return find_file(cfg, "STUDENT_CKPT")


def check_labels(cfg: Any) -> None:
    """Refuse data without labels, and MIXUP and CUTMIX, for a method that needs the labels."""
    name = cfg.DISTILLER.TYPE
    if get_distiller(name).needs_labels and not data_spec(cfg).labels:
        guilty = [part for part in part_names(name) if get_distiller(part).needs_labels]
        others = sorted(key for key, cls in distiller_dict.items() if not cls.needs_labels)
        raise UserError(
            f"DISTILLER.TYPE {name}: {' and '.join(guilty)} needs class labels or logits, and "
            f"these data have no labels (DATASET.TYPE {cfg.DATASET.TYPE}, DATASET.LABELS "
            f"{cfg.DATASET.LABELS}); choose one of {', '.join(others)}"
        )
    if mixes_labels(cfg) and not get_distiller(name).soft_labels:
        guilty = [part for part in part_names(name) if not get_distiller(part).soft_labels]
        raise UserError(
            f"DISTILLER.TYPE {name}: {' and '.join(guilty)} cannot learn from mixed images, whose "
            "labels are soft; set DATASET.MIXUP and DATASET.CUTMIX to 0"
        )


def model_entry(
    cfg: Any, role: str, data: Data | TestData | DataSource, key: str = ""
) -> ModelEntry:
    """The zoo's entry for the network in a role, "STUDENT" or "TEACHER".

    Args:
        key: of DISTILLER, for errors; by default the role.
    """
    try:
        return get_model_entry(cfg.DISTILLER[role], data.zoo)
    except UserError as error:
        raise UserError(f"DISTILLER.{key or role}: {error}") from None


def freeze_teacher(distiller: Distiller) -> None:
    """Freeze the teacher's parameters, except those the method trains."""
    teacher = getattr(distiller, "teacher", None)
    if isinstance(teacher, nn.Module):
        trained = {id(p) for p in distiller.get_learnable_parameters()}
        for param in teacher.parameters():
            if id(param) not in trained:
                param.requires_grad_(False)


def find_teacher(cfg: Any, data: Data | TestData) -> Path | Literal["pretrained"] | None:
    """The teacher's weights: the file DISTILLER.TEACHER_CKPT, else released ones.

    Released weights are a file of the zoo, or PRETRAINED where TEACHER_ARGS ask for those of timm
    or torchvision. Returns None if there are none. With a TEACHER_CFG, PRETRAINED does not count
    (that config reads TEACHER_ARGS), and the zoo's file counts only for data with as many classes
    as it was released for; it is then not downloaded.

    Raises:
        UserError: TEACHER_CKPT is given and does not exist, a download fails, or the library's
            weights are for other classes.
    """
    if cfg.DISTILLER.TEACHER_CKPT:
        return find_file(cfg, "TEACHER_CKPT")
    entry = model_entry(cfg, "TEACHER", data)
    trained_here = bool(cfg.DISTILLER.TEACHER_CFG)
    classes = getattr(data, "num_classes", None)  # a source that is not read yet knows none
    wanted = classes if get_distiller(cfg.DISTILLER.TYPE).needs_teacher_classifier else None
    settings = arguments(cfg, "TEACHER")
    if entry.loads_itself and settings.get("pretrained") and not trained_here:
        if wanted is not None:
            require_classes(entry, settings, wanted)
        return PRETRAINED
    with local_rank_zero_first():
        released = entry.released(wanted, fetch=not trained_here)
    misfits = released and trained_here and entry.default_classes() != classes
    return None if misfits else released


def no_teacher(cfg: Any, data: Data | DataSource) -> str:
    """The error for a teacher without weights."""
    entry = model_entry(cfg, "TEACHER", data)
    looked = f" (looked for {entry.checkpoint})" if entry.checkpoint else ""
    library = ", or TEACHER_ARGS {pretrained: True} for released ones" if entry.loads_itself else ""
    return (
        f"no weights for the teacher {cfg.DISTILLER.TEACHER}{looked}: set DISTILLER.TEACHER_CKPT "
        f"to a checkpoint, or DISTILLER.TEACHER_CFG to the config that trains it first{library}"
    )
