"""A detection run: data, networks and trainer from a config, for the engine's `train`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch

from mdistiller.console import print_log
from mdistiller.detection.batches import TrainBatches, ValBatches
from mdistiller.detection.coco.dataset import CocoDetectionSet
from mdistiller.detection.coco.evaluate import evaluate_detector
from mdistiller.detection.convert.weights import FACTS
from mdistiller.detection.data import check_same_classes, train_batches, val_loader
from mdistiller.detection.distillers import DetectionDistiller
from mdistiller.detection.methods import method_names, needs_same_classes
from mdistiller.detection.networks.detector import Detector
from mdistiller.detection.networks.models import build_detector, located
from mdistiller.detection.trainer import SCORE, DetectionTrainer, IterationEpochs
from mdistiller.distillers import Vanilla
from mdistiller.distributed import wrap
from mdistiller.engine.cfg import Config
from mdistiller.engine.trainer import seed_everything, trainer_dict
from mdistiller.networks.lone_image import refuse_lone_picture
from mdistiller.networks.sync_bn import synchronize_batch_norm
from mdistiller.registry import UserError
from mdistiller.run import train as engine
from mdistiller.run.overview import describe_network
from mdistiller.run.prepare import Prepared


@dataclass
class DetectionData:
    """The loaders of a run, as the engine expects them."""

    loaders: tuple[TrainBatches, ValBatches]
    test: None = None

    def close(self) -> None:
        for loader in self.loaders:
            loader.close()


def prepare(
    cfg: Config, name: str, device: torch.device, teacher_acc: float | None = None
) -> Prepared:
    """Data, networks and trainer of a config.

    Args:
        teacher_acc: the teacher's box AP in percent; None: measure it.
    """
    method_names(cfg.DISTILLER.TYPE)
    trainer_class = trainer_dict[cfg.SOLVER.TRAINER]
    if not issubclass(trainer_class, DetectionTrainer):
        raise UserError(f"SOLVER.TRAINER {cfg.SOLVER.TRAINER} is for classification; use detection")
    trainer_class.check(cfg)
    stream, val = train_batches(cfg, device), val_loader(cfg, device)
    data: CocoDetectionSet = stream.dataset
    check_same_classes(data, val.dataset)
    distiller = build_distiller(cfg, data.class_names, device)
    measured = cfg.DETECTION.EVALUATE_TEACHER and not cfg.DETECTION.TEACHER.NEW_HEAD
    teacher = cast(Detector | None, distiller.teacher)
    if teacher is not None and measured and teacher_acc is None:
        teacher_acc = measure_teacher(teacher, val, device, cfg)
    solver = cfg.SOLVER
    epochs = IterationEpochs(
        stream, solver.EVAL_PERIOD * solver.ACCUMULATE, solver.MAX_ITER * solver.ACCUMULATE
    )
    wrapped = wrap(distiller, solver.FIND_UNUSED_PARAMETERS)
    trainer = trainer_class(name, wrapped, epochs, val, cfg)
    refuse_lone_picture(stream, trainer, distiller, cfg)
    facts = {"num_classes": data.num_classes, "classes": data.class_names}
    about = describe(cfg, data, val.dataset, distiller, teacher_acc)
    return Prepared(trainer, DetectionData((stream, val)), facts, teacher_acc, about=about)


def describe(
    cfg: Config,
    data: CocoDetectionSet,
    val: CocoDetectionSet,
    distiller: DetectionDistiller,
    teacher_acc: float | None,
) -> dict[str, str]:
    """The lines about data and networks that a run begins with."""
    about = {"data": f"{data.describe()}; evaluated on {len(val)} images"}
    if distiller.teacher is not None:
        node = cfg.DETECTION.TEACHER
        accuracy = "" if teacher_acc is None else f"box AP {teacher_acc:.2f}"
        about["teacher"] = describe_network(node.ARCH, distiller.teacher, accuracy, node.WEIGHTS)
    node = cfg.DETECTION.STUDENT
    origin = node.WEIGHTS or node.BACKBONE_WEIGHTS
    about["student"] = describe_network(node.ARCH, distiller.student, origin=origin)
    return about


def build_distiller(
    cfg: Config, classes: Sequence[str], device: torch.device
) -> DetectionDistiller:
    """The distiller of a config, on `device`.

    The student is made first, right after seeding: with one seed it starts from the same weights
    under every method and teacher.

    Args:
        classes: names by label, with the background.
    """
    seed_everything(cfg.EXPERIMENT.SEED)
    where = "DETECTION.STUDENT"
    student, teacher = build_detector(cfg.DETECTION.STUDENT, len(classes), where, classes), None
    if method_names(cfg.DISTILLER.TYPE):
        teacher = build_teacher(cfg, classes).to(device)
    student.file_entries = {FACTS: student.facts}  # type: ignore[assignment]
    distiller = DetectionDistiller(student.to(device), teacher, cfg).to(device)
    distiller.try_methods()
    if cfg.SOLVER.SYNC_BN:
        synchronize_batch_norm(distiller)
    elif cfg.DETECTION.STUDENT.NORM == "sync":
        synchronize_batch_norm(Vanilla(student))
    return distiller


def build_teacher(cfg: Config, classes: Sequence[str]) -> Detector:
    """The teacher of a config, with its weights.

    Raises:
        UserError: the weights are missing, or settings of student and teacher are swapped.
    """
    node, name = located(cfg.DETECTION.TEACHER), cfg.DISTILLER.TYPE
    if not node.WEIGHTS:
        raise UserError(
            f"DISTILLER.TYPE {name} needs a trained teacher: set DETECTION.TEACHER.WEIGHTS to its "
            "file (of a run: student_best or student_latest; of detectron2's zoo: converted by "
            "tools/convert_detectron2.py), or to torchvision"
        )
    if node.WEIGHTS != "torchvision" and not Path(node.WEIGHTS).is_file():
        raise UserError(
            f"DETECTION.TEACHER.WEIGHTS: {node.WEIGHTS} does not exist; train the teacher first "
            "(its config without DISTILLER.TYPE), or name another file"
        )
    for role, input_format in (("TEACHER", "upstream_r18"), ("STUDENT", "upstream_r18_teacher")):
        if input_format == cfg.DETECTION[role].INPUT:
            other = "STUDENT" if role == "TEACHER" else "TEACHER"
            raise UserError(
                f"DETECTION.{role}.INPUT {input_format} is for the {other.lower()}: are teacher "
                "and student swapped?"
            )
    compares = [part for part in method_names(name) if needs_same_classes(part)]
    if node.NEW_HEAD and compares:
        raise UserError(
            f"DETECTION.TEACHER.NEW_HEAD starts the teacher's classifier anew, and {compares[0]} "
            "learns from it: set it to False"
        )
    return build_detector(node, len(classes), "DETECTION.TEACHER", classes)


def measure_teacher(teacher: Detector, val: Any, device: torch.device, cfg: Config) -> float:
    """The teacher's box AP in percent on the validation set; a warning is printed if it is low."""
    numbers = evaluate_detector(teacher, val, device, cfg.DETECTION.EVALUATOR)
    if numbers[SCORE] < 1:
        print_log("WARNING: the teacher detects almost nothing; is it the right file?")
    return numbers[SCORE]


train = partial(engine.train, prepare=prepare)
"""Train what a detection config describes; arguments and result as of `run.train`."""
