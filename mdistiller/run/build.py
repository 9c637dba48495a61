"""Build a distiller from a config: networks, the teacher's weights, the method."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import convert_conv2d_weight_memory_format

from mdistiller.config.roles import of_teacher, peer_configs, teacher_configs
from mdistiller.dataset import Data
from mdistiller.distillers import Distiller, TeacherEnsemble, TeacherTeam, get_distiller, several
from mdistiller.engine.checkpoints.resume import seed_everything
from mdistiller.engine.optim import build_optimizer
from mdistiller.engine.optim.param_groups import freeze, student_groups
from mdistiller.frozen_teacher.facts import supply_facts
from mdistiller.frozen_teacher.frozen import count_hooks, prepare_teacher
from mdistiller.networks.network import build_network
from mdistiller.networks.teacher_weights import find_teacher, no_teacher
from mdistiller.registry import UserError
from mdistiller.run.checks import groups_here
from mdistiller.run.class_balance import set_hard_label_loss


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


def use_channels_last(distiller: Distiller) -> None:
    """Convert all convolution weights to torch.channels_last, in place (SOLVER.CHANNELS_LAST).

    Student and teacher convert their images likewise, whoever calls them: the maps between two
    convolutions then follow by themselves. Copies of a network do the same.
    """
    convert_conv2d_weight_memory_format(distiller, torch.channels_last)  # type: ignore[arg-type]
    for net in (*distiller.students(), distiller.teacher):
        if isinstance(net, nn.Module):
            net.register_forward_pre_hook(channels_last_input)


def channels_last_input(net: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Any, ...]:
    """The hook of :func:`use_channels_last`."""
    image, *rest = inputs
    return (image.contiguous(memory_format=torch.channels_last), *rest)


def freeze_teacher(distiller: Distiller) -> None:
    """Freeze the teacher's parameters, except those the method trains."""
    teacher = getattr(distiller, "teacher", None)
    if isinstance(teacher, nn.Module):
        trained = {id(p) for p in distiller.get_learnable_parameters()}
        for param in teacher.parameters():
            if id(param) not in trained:
                param.requires_grad_(False)
