"""Where a student to export comes from: a run folder, or a bare checkpoint."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn

from mdistiller.config.roles import checkpoint_config
from mdistiller.console import print_log
from mdistiller.dataset import data_spec, load_test_loader
from mdistiller.engine.cfg import Config
from mdistiller.export.student import RunFacts, Student
from mdistiller.models import get_model_entry
from mdistiller.networks.class_order import stated_classes
from mdistiller.networks.network import build_network
from mdistiller.networks.released import (
    PRETRAINED,
    arguments,
    own_preprocessing,
    recorded_preprocessing,
    require_classes,
    states_nothing,
    statistics_of,
    taken_line,
)
from mdistiller.preprocessing import ImageSize, Preprocessing, Statistics, height_width
from mdistiller.registry import UserError
from mdistiller.run_folder.folder import (
    checkpoint_file,
    read_json,
    read_lines,
    recorded_config,
    refuse_commands,
)
from mdistiller.run_folder.record import data_facts
from mdistiller.weights import load_network, recorded_facts


def from_run(
    folder: Path, checkpoint: str = "best", overrides: Sequence[str] = (), imports: Any = ()
) -> Student:
    """The student of a run folder.

    Args:
        checkpoint: best, latest, epoch_N, ema_best or ema_latest.
        overrides: `[key, value, ...]` over the recorded config (DATASET.ROOT, say).
        imports: further user files.

    Raises:
        UserError: it is not a run folder, or lacks the checkpoint.
    """
    cfg = recorded_config(folder, overrides, imports)
    refuse_commands(folder, cfg, overrides)
    path = checkpoint_file(folder, checkpoint)
    cfg = checkpoint_config(cfg, path.name)
    record = read_json(folder / "run.json")
    data = record.get("data") or data_facts(load_test_loader(cfg, torch.device("cpu")))
    run = RunFacts(
        checkpoint,
        read_json(folder / "summary.json"),
        [row for row in read_lines(folder / "metrics.jsonl") if "epoch" in row],
        (record.get("starts") or [{}])[-1],
    )
    student = _load(cfg, cfg.DISTILLER.STUDENT, path, data, cfg.DATASET.TYPE, run)
    student.evaluated = _evaluated(cfg, path, {**data, "classes": student.classes})
    return student


def from_checkpoint(
    cfg: Config,
    name: str,
    checkpoint: str,
    num_classes: int | None = None,
    side: ImageSize = 32,
    dataset: bool = True,
) -> Student:
    """The student in a file.

    Args:
        cfg: names the data.
        checkpoint: the file, or "pretrain" for the released weights.
        num_classes: of the data. None: the data set is read, as for evaluation.
        side: of the images in pixels, where the data are not read.
        dataset: whether `cfg` names the data that it was trained on. If not, and the data are not
            read, normalisation is known from DATASET.MEAN alone.
    """
    if num_classes is None:
        data = data_facts(load_test_loader(cfg, torch.device("cpu"), _own(cfg, name, checkpoint)))
    elif min(num_classes, *height_width(side)) < 1:
        raise UserError("--num-classes and --image-size must be at least 1")
    else:
        source = data_spec(cfg)
        given = source.statistics if dataset or cfg.DATASET.MEAN else None
        mean, std = given or ((), ())
        data = {
            "zoo": source.zoo,
            "image_size": height_width(side),
            "mean": mean,
            "std": std,
            "num_classes": num_classes,
            "classes": [],
        }
    named = cfg.DATASET.TYPE if dataset or num_classes is None else ""
    path = None if checkpoint == "pretrain" else Path(checkpoint)
    return _load(cfg, name, path, data, named, None)


def recorded_side(cfg: Config, name: str, checkpoint: str) -> ImageSize:
    """The size of a network's images that its file records; 0 if it does not."""
    preprocessing = _own(cfg, name, checkpoint)
    return preprocessing.image_size if preprocessing is not None and preprocessing.recorded else 0


def _own(cfg: Config, name: str, checkpoint: str) -> Preprocessing | None:
    """How the images of a network in a file are prepared, as far as that is not the data's."""
    released = checkpoint == "pretrain"
    stated = None if released else recorded_facts(checkpoint)
    entry = get_model_entry(name, data_spec(cfg).zoo)
    weights = PRETRAINED if released else checkpoint
    return own_preprocessing(cfg, "STUDENT", entry, weights, stated)


def _load(
    cfg: Config,
    name: str,
    path: Path | None,
    data: Mapping[str, Any],
    dataset: str,
    run: RunFacts | None,
) -> Student:
    """Build and load; without a path, the zoo's released weights."""
    settings = arguments(cfg, "STUDENT")
    released = settings.pop("pretrained", False) or True
    student = Student(
        net=nn.Identity(),
        name=name,
        zoo=data["zoo"],
        settings=settings,
        num_classes=data["num_classes"],
        classes=list(data["classes"]),
        image_size=tuple(data["image_size"]),
        mean=tuple(data["mean"]),
        std=tuple(data["std"]),
        dataset=dataset,
        checkpoint="released weights" if path is None else path.name,
        cfg=cfg,
        run=run,
    )
    stated = None
    if path is None:
        entry = get_model_entry(name, student.zoo)
        require_classes(entry, {**settings, "pretrained": released}, student.num_classes)
        student.net = student.build(pretrained=released)
    else:
        student.net = student.build()
        stated = load_network(student.net, path, name, student.num_classes)
        student.classes = stated_classes(path, stated) or student.classes
    _set_preprocessing(student, data, path or PRETRAINED, stated)
    student.net.eval().requires_grad_(False)
    return student


def _set_preprocessing(
    student: Student, data: Mapping[str, Any], weights: str | Path, stated: Any
) -> None:
    """What the network itself wants: a run may have normalised for the teacher, and this one anew.

    Args:
        stated: what `load_network` found in the file, if the weights are from one.
    """
    cfg, entry = student.cfg, get_model_entry(student.name, student.zoo)
    preprocessing = own_preprocessing(cfg, "STUDENT", entry, weights, stated)
    given = student.mean, student.std
    student.mean, student.std = map(tuple, statistics_of(cfg, "STUDENT", preprocessing, given))
    if preprocessing is not None and states_nothing(entry, weights, stated):
        print_log(taken_line(student.name, "STUDENT", preprocessing, weights))
    if "preprocessing" in data:
        student.preprocessing = recorded_preprocessing(data, student.name)
    elif preprocessing is not None and preprocessing.resize:
        student.preprocessing = preprocessing


def _evaluated(cfg: Config, path: Path, data: Mapping[str, Any]) -> tuple[nn.Module, Statistics]:
    """The network as `eval` builds it, and what the loader's images are normalised with."""
    facts: Any = SimpleNamespace(**{**data, "image_size": tuple(data["image_size"])})
    net = build_network(cfg, "STUDENT", facts, path)
    return net.eval().requires_grad_(False), (facts.mean, facts.std)
