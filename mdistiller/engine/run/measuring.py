"""What the teachers of a run score on the test set, and the lines about them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import zip_longest
from pathlib import Path
from typing import Any

import torch
from torch import nn

from mdistiller.dataset import Data, data_spec, eval_preprocessing, load_test_loader
from mdistiller.dataset.memory.loader import EvalLoader
from mdistiller.distillers import Distiller, TeacherEnsemble, Vanilla
from mdistiller.engine.cfg import Config
from mdistiller.engine.metrics import MOST_CLASSES
from mdistiller.engine.networks.build import model_entry
from mdistiller.engine.networks.class_order import doubts
from mdistiller.engine.networks.released import PRETRAINED, own_preprocessing
from mdistiller.engine.networks.roles import peer_configs, teacher_configs
from mdistiller.engine.run.overview import describe_network
from mdistiller.engine.utils import log_msg, validate
from mdistiller.runtime import rank
from mdistiller.weights import recorded_facts


def teacher_test_loader(
    cfg: Any, data: Data, device: torch.device, weights: str | Path
) -> EvalLoader | None:
    """The test set with the teacher's own interpolation and crop, at the data's image size.

    None if the data's own test loader gives the same, or images are not resized.
    """
    used = data.preprocessing
    if not data_spec(cfg).files or used.resize == "keep":
        return None
    entry = model_entry(cfg, "TEACHER", data)
    stated = None if weights == PRETRAINED else recorded_facts(weights)
    how = own_preprocessing(cfg, "TEACHER", entry, weights, stated)
    if how is None:
        return None
    sized = cfg.clone()
    sized.defrost()
    sized.DATASET.IMAGE_SIZE = used.image_size
    sized.DATASET.MEAN, sized.DATASET.STD = list(data.mean), list(data.std)
    if eval_preprocessing(sized, how) == replace(used, mean=(), std=()):
        return None
    seen = cfg.DISTILLER.TEACHER_SIZE or used.image_size
    if how.image_size not in (0, seen) and rank() == 0:
        whose = "its checkpoint records" if how.recorded else "its library evaluates it at"
        message = (
            f"the teacher sees images of {seen} pixels, but {whose} {how.image_size} "
            f"(DATASET.IMAGE_SIZE {how.image_size} gives it these, DISTILLER.TEACHER_SIZE resizes)"
        )
        print(log_msg(message), flush=True)
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
        if rank() == 0:
            print(
                log_msg(
                    f"the teacher's weights have no classifier for {data.num_classes} classes; "
                    f"{type(distiller).__name__} reads its features alone, so its accuracy is not "
                    "measured"
                ),
                flush=True,
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
    if rank() == 0:
        for warning in doubts(top1, confusion, test.dataset.targets, data.classes):
            print(log_msg(f"WARNING: {name} {warning}"), flush=True)
    return top1


def measure_teachers(
    distiller: Distiller,
    cfg: Config,
    data: Data,
    device: torch.device,
    weights: Sequence[str | Path],
) -> list[float | None]:
    """Top-1 accuracy in percent of the teacher, or of each and then of their ensemble.

    See :func:`measure_teacher`. An ensemble with a network whose classifier is not trained has
    None.
    """
    configs, found = teacher_configs(cfg), []
    team = distiller.teacher if len(configs) > 1 else None
    for number, (one, file) in enumerate(zip(configs, weights, strict=True)):
        loader = teacher_test_loader(one, data, device, file)
        label = f"{one.DISTILLER.TEACHER} ({file})"
        if team is None:
            return [measure_teacher(distiller, data, loader, label)]
        net: Any = team.nets[number]  # type: ignore[index]
        found.append(measure_teacher(distiller, data, loader, label, net))
    if None in found:
        return [*found, None]
    both: Any = team
    ensemble = TeacherEnsemble(both.nets, both.weights.tolist()).to(device)
    return [*found, measure_teacher(distiller, data, None, "the teachers' ensemble", ensemble)]


def describe_teachers(
    cfg: Config,
    teacher: nn.Module,
    weights: Sequence[str | Path],
    accuracies: Sequence[float | None],
    note: str = "",
) -> dict[str, str]:
    """A line about each teacher, and one about the ensemble of several, by title.

    Args:
        accuracies: of :func:`measure_teachers`, or the last of them alone; `note` goes behind them.
    """
    configs = teacher_configs(cfg)
    missing = len(configs) + (len(configs) > 1) - len(accuracies)
    accuracies = [*[None] * missing, *accuracies]
    nets: Any = teacher.nets if len(configs) > 1 else [teacher]
    texts = ["" if acc is None else f"accuracy {acc:.2f} %{note}" for acc in accuracies]
    lines = {}
    for number, (one, net) in enumerate(zip(configs, nets, strict=True)):
        title = f"teacher {number + 1}" if len(configs) > 1 else "teacher"
        name = one.DISTILLER.TEACHER
        lines[title] = describe_network(name, net, texts[number], weights[number])
    if len(configs) > 1 and texts[-1]:
        lines["ensemble"] = texts[-1]
    return lines


def describe_peers(cfg: Config, distiller: Distiller) -> dict[str, str]:
    """A line about each network that is trained beside the student, by title."""
    peers = zip(peer_configs(cfg), distiller.students()[1:], strict=False)
    return {
        f"peer {number}": describe_network(one.DISTILLER.STUDENT, net)
        for number, (one, net) in enumerate(peers, start=1)
    }


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
