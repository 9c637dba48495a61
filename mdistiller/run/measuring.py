"""What the teachers of a run score on the test set, and the lines about them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import zip_longest
from pathlib import Path
from typing import Any

import torch
from torch import nn

from mdistiller.config.roles import peer_configs, teacher_configs
from mdistiller.console import print_log
from mdistiller.dataset import Data, data_spec, eval_preprocessing, load_test_loader
from mdistiller.dataset.memory.loader import EvalLoader
from mdistiller.distillers import Distiller, TeacherEnsemble, Vanilla
from mdistiller.engine.cfg import Config
from mdistiller.engine.metrics import MOST_CLASSES
from mdistiller.engine.utils import validate
from mdistiller.networks.class_order import doubts
from mdistiller.networks.network import model_entry
from mdistiller.networks.released import PRETRAINED, own_preprocessing
from mdistiller.networks.teacher_images import teacher_image_size
from mdistiller.preprocessing import Preprocessing, height_width
from mdistiller.run.overview import describe_network
from mdistiller.weights import recorded_facts


def teacher_test_loader(
    cfg: Any, data: Data, device: torch.device, weights: str | Path
) -> EvalLoader | None:
    """The test set with the teacher's own interpolation and crop, at the size it sees in training.

    None if the data's own test loader gives the same, or images are not resized.
    """
    how = _own_preprocessing(cfg, data, weights)
    loader = _test_loader(cfg, data, device, [how])
    size = teacher_image_size(cfg) or data.image_size
    if loader is not None and how and how.image_size and height_width(how.image_size) != size:
        sizes = size, height_width(how.image_size)
        sides = [f"{w}x{h}" if w != h else str(h) for h, w in sizes]
        whose = "its checkpoint records" if how.recorded else "its library evaluates it at"
        message = (
            f"the teacher sees images of {sides[0]} pixels, but {whose} {sides[1]} "
            f"(DATASET.IMAGE_SIZE {how.image_size} gives it these, DISTILLER.TEACHER_SIZE resizes)"
        )
        print_log(message)
    return loader


def _own_preprocessing(cfg: Any, data: Data, weights: str | Path) -> Preprocessing | None:
    """What a teacher's weights say of its images; None where images are not files."""
    if not data_spec(cfg).files:
        return None
    entry = model_entry(cfg, "TEACHER", data)
    stated = None if weights == PRETRAINED else recorded_facts(weights)
    return own_preprocessing(cfg, "TEACHER", entry, weights, stated)


def _test_loader(
    cfg: Any, data: Data, device: torch.device, hows: Sequence[Preprocessing | None]
) -> EvalLoader | None:
    """The test set for teachers at the size they see in training; None if the data's is the same.

    Args:
        hows: preprocessing of each. If theirs differ, images are prepared as the data's.
    """
    used, own_size = data.preprocessing, teacher_image_size(cfg)
    if not data_spec(cfg).files or (not own_size and (used.resize == "keep" or not any(hows))):
        return None
    sized = cfg.clone()
    sized.defrost()
    sized.DATASET.IMAGE_SIZE = list(own_size or data.image_size)
    sized.DATASET.MEAN, sized.DATASET.STD = list(data.mean), list(data.std)
    how = hows[0] if len({eval_preprocessing(sized, one) for one in hows}) == 1 else None
    if eval_preprocessing(sized, how) == replace(used, mean=(), std=()):
        return None
    return load_test_loader(sized, device, how).loader


def measure_teacher(
    distiller: Distiller,
    data: Data,
    loader: EvalLoader | None = None,
    name: str = "the teacher",
    net: nn.Module | None = None,
) -> float | None:
    """The teacher's top-1 accuracy in percent on the test set.

    Held-out images are not used: a teacher from elsewhere may have been trained on them. A warning
    is printed for a teacher near chance, whose file is usually of another data set, and for one
    that swaps classes. Returns None, after a printed line, if the weights have no classifier for
    these classes.

    Args:
        loader: the test set, prepared for the teacher; by default the data's.
        name: what to call the teacher in a warning.
        net: one of several teachers.
    """
    teacher = net or distiller.teacher
    assert teacher is not None
    if getattr(teacher, "untrained_head", False):
        print_log(
            f"the teacher's weights have no classifier for {data.num_classes} classes; "
            f"{type(distiller).__name__} reads its features alone, so its accuracy is not measured"
        )
        return None
    test = loader or (data.val if data.test is None else data.test)
    assert test is not None
    device, classes = next(teacher.parameters()).device, data.num_classes
    confusion = torch.zeros(classes, classes, device=device) if classes <= MOST_CLASSES else None
    top1, _, _ = validate(test, Vanilla(teacher), confusion)
    close = getattr(loader, "close", None)
    if close is not None:  # its processes
        close()
    for warning in doubts(top1, confusion, test.dataset.targets, data.classes):
        print_log(f"WARNING: {name} {warning}")
    return top1


def measure_teachers(
    distiller: Distiller,
    cfg: Config,
    data: Data,
    device: torch.device,
    weights: Sequence[str | Path],
) -> list[float | None]:
    """Top-1 accuracy in percent of the teacher, or of each and then of their ensemble.

    See :func:`measure_teacher`. The ensemble sees images of the teachers' size, too, prepared as
    the data's where the teachers have theirs prepared in different ways. An ensemble with a network
    whose classifier is not trained has None.
    """
    configs, accuracies = teacher_configs(cfg), []
    team = distiller.teacher if len(configs) > 1 else None
    for number, (one, file) in enumerate(zip(configs, weights, strict=True)):
        loader = teacher_test_loader(one, data, device, file)
        label = f"{one.DISTILLER.TEACHER} ({file})"
        if team is None:
            return [measure_teacher(distiller, data, loader, label)]
        net: Any = team.nets[number]  # type: ignore[index]
        accuracies.append(measure_teacher(distiller, data, loader, label, net))
    if None in accuracies:
        return [*accuracies, None]
    both: Any = team
    ensemble = TeacherEnsemble(both.nets, both.weights.tolist()).to(device)
    hows = [_own_preprocessing(one, data, file) for one, file in zip(configs, weights, strict=True)]
    loader = _test_loader(cfg, data, device, hows)
    label = "the teachers' ensemble"
    return [*accuracies, measure_teacher(distiller, data, loader, label, ensemble)]


def describe_networks(
    cfg: Config,
    distiller: Distiller,
    weights: Sequence[str | Path],
    accuracies: Sequence[float | None],
    measured: bool = True,
) -> dict[str, str]:
    """A line about each network of a run, and about the ensemble of several teachers, by title.

    Args:
        accuracies: of :func:`measure_teachers`, or the last of them alone.
        measured: in this start, not when the run began.
    """
    lines, teacher = {}, distiller.teacher
    if teacher is not None:
        configs = teacher_configs(cfg)
        several = len(configs) > 1
        nets: Any = teacher.nets if several else [teacher]
        note = "" if measured else " (measured when the run began)"
        texts = ["" if acc is None else f"accuracy {acc:.2f} %{note}" for acc in accuracies]
        texts = [*[""] * (len(configs) + several - len(texts)), *texts]
        for number, (one, net) in enumerate(zip(configs, nets, strict=True)):
            title = f"teacher {number + 1}" if several else "teacher"
            origin = weights[number]
            lines[title] = describe_network(one.DISTILLER.TEACHER, net, texts[number], origin)
        if several and texts[-1]:
            lines["ensemble"] = texts[-1]
    released = "released weights" if cfg.DISTILLER.STUDENT_ARGS.get("pretrained") else ""
    origin = cfg.DISTILLER.STUDENT_CKPT or released
    lines["student"] = describe_network(cfg.DISTILLER.STUDENT, distiller.student, origin=origin)
    peers = distiller.students()[1:]
    configs = peer_configs(cfg) if peers else []
    for number, (one, net) in enumerate(zip(configs, peers, strict=False), start=1):
        lines[f"peer {number}"] = describe_network(one.DISTILLER.STUDENT, net)
    return lines


def teacher_records(
    cfg: Config, weights: Sequence[str | Path], accuracies: Sequence[float | None]
) -> Any:
    """What `run.json` records: the teacher's weights, None without one; of several a list with the
    `name`, `weights` and `acc` of each.

    Args:
        accuracies: of :func:`measure_teachers`; empty: not measured in this start.
    """
    if len(weights) < 2:
        return next(iter(weights), None)
    each = zip_longest(teacher_configs(cfg), weights, accuracies[:-1])
    return [{"name": one.DISTILLER.TEACHER, "weights": file, "acc": acc} for one, file, acc in each]
