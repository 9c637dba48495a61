"""Any number of networks, with their teacher or without one, in one pass over the data."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor

from mdistiller.console import progress
from mdistiller.distillers import Output
from mdistiller.distillers.helpers.features.stages import pair_by_height
from mdistiller.evaluation.features import Cka, Collapse, CollapseSums
from mdistiller.evaluation.predictions import (
    Comparison,
    ComparisonSums,
    Quality,
    QualitySums,
)
from mdistiller.evaluation.subjects import Subject, side_by_side


@dataclass
class Evaluation:
    """The results of one network.

    Attributes:
        comparison: with the teacher, if there is one.
        teacher: its label.
        collapse: of the pooled feature, if asked for.
        cka: with the teacher's features, by the pair of stages ("1-1" is the first after the stem
            of the student with that of the teacher) and "pooled"; empty if not asked for.
    """

    subject: Subject
    quality: Quality
    comparison: Comparison | None = None
    collapse: Collapse | None = None
    cka: dict[str, float] = field(default_factory=dict)
    teacher: str = ""

    def record(self) -> dict[str, Any]:
        """Plain values, by name; percentages as such."""
        source, quality = self.subject.source, self.quality
        facts: dict[str, Any] = {
            "label": source.label,
            "model": source.name,
            "weights": str(source.weights),
            "note": source.note,
            "parameters": sum(p.numel() for p in self.subject.net.parameters()) or None,
            "images": quality.images,
            **{key: getattr(quality, key) for key in ("top1", "top5")},
            "balanced_accuracy": quality.macro["recall"],
            **{f"macro_{name}": value for name, value in quality.macro.items()},
            **{key: getattr(quality, key) for key in ("nll", "ece")},
        }
        if self.comparison is not None:
            extra = {key: getattr(self.comparison, key) for key in ("agreement", "gap")}
            facts["teacher"] = {"label": self.teacher, **extra, **asdict(self.comparison)}
        if self.collapse is not None:
            facts["collapse"] = asdict(self.collapse)
        if self.cka:
            facts["cka"] = self.cka
        lists = {f"class_{name}": values for name, values in quality.class_scores.items()}
        lists["class_accuracy"] = quality.class_accuracy
        return {**facts, **lists, "confusion": quality.confusion}


class _Sums:
    """All sums of one network."""

    def __init__(
        self,
        subject: Subject,
        classes: int,
        device: torch.device,
        teacher: Subject | None,
        features: bool,
    ):
        self.subject, self.teacher = subject, teacher
        self.quality = QualitySums(classes, device)
        self.comparison = ComparisonSums(device) if teacher else None
        self.collapse = CollapseSums(classes) if features else None
        self.cka: dict[str, Cka] = {}

    def add(self, student: Output, teacher: Output | None, target: Tensor) -> None:
        self.quality.add(student.logits, target)
        if self.comparison is not None and teacher is not None:
            self.comparison.add(student.logits, teacher.logits, target)
        if self.collapse is None:
            return
        self.collapse.add(student["pooled_feat"], target)
        if teacher is not None:
            for name, x, y in matched_features(student, teacher):
                self.cka.setdefault(name, Cka()).add(x, y)

    def result(self) -> Evaluation:
        return Evaluation(
            self.subject,
            self.quality.result(),
            self.comparison.result() if self.comparison else None,
            self.collapse.result() if self.collapse else None,
            {name: cka.value() for name, cka in self.cka.items()},
            self.teacher.source.label if self.teacher else "",
        )


def matched_features(student: Output, teacher: Output) -> list[tuple[str, Tensor, Tensor]]:
    """Names and features of the stages that belong together, and of the embeddings.

    Stages are paired as by methods that compare maps; the stem is left out.
    """
    ours, theirs = (output["feats"][1:] for output in (student, teacher))
    heights = ([feat.shape[2] for feat in feats] for feats in (ours, theirs))
    pairs = [(f"{i + 1}-{j + 1}", ours[i], theirs[j]) for i, j in pair_by_height(*heights)]
    return [*pairs, ("pooled", student["pooled_feat"], teacher["pooled_feat"])]


def _on(device: torch.device, images: Sequence[Tensor]) -> list[Tensor]:
    """The images on the device; what several networks share is moved once."""
    moved = {id(image): image.to(device, non_blocking=True) for image in images}
    return [moved[id(image)] for image in images]


@torch.inference_mode()
def evaluate(
    subjects: Sequence[Subject],
    loader: Iterable[Sequence[Tensor]],
    num_classes: int,
    device: torch.device,
    teacher: Subject | Sequence[Subject | None] | None = None,
    features: bool = False,
) -> list[Evaluation]:
    """Evaluate networks on the labelled batches (image, target) of a loader.

    Nothing is read from the device before the end.

    Args:
        teacher: to compare each network with; or one for each.
        features: measure neural collapse and, with a teacher, CKA.

    Returns:
        One result for each network; then one for each teacher.
    """
    of = list(teacher) if isinstance(teacher, Sequence) else [teacher] * len(subjects)
    pairs = zip(subjects, of, strict=True)
    sums = [_Sums(one, num_classes, device, its, features) for one, its in pairs]
    masters = {id(t): _Sums(t, num_classes, device, None, features) for t in of if t is not None}
    looked_at = [*subjects, *(master.subject for master in masters.values())]
    for views, batch in side_by_side(looked_at, progress(loader, "eval")):
        images = _on(device, views)
        target = batch[1].to(device, non_blocking=True)
        taught = {}
        for (key, master), image in zip(masters.items(), images[len(subjects) :], strict=True):
            taught[key] = Output(*master.subject.net(image))
            master.add(taught[key], None, target)
        for one, image in zip(sums, images, strict=False):
            one.add(Output(*one.subject.net(image)), taught.get(id(one.teacher)), target)
    return [one.result() for one in [*sums, *masters.values()]]
