"""What a network's predictions are worth, and how they differ from its teacher's.

Sums over batches stay on the device and are read once, at the end. They are in float64 where the
device has it.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from mdistiller.distillers.helpers.losses.numerics import divergence
from mdistiller.engine.metrics import class_scores, correct_counts, count_cells

BINS = 15
"""Of confidence, equally wide, for the calibration error."""


def wide(device: torch.device) -> torch.dtype:
    """The widest floating-point type of a device."""
    return torch.float32 if device.type == "mps" else torch.float64


@dataclass(frozen=True)
class Quality:
    """A network on a labelled set.

    Attributes:
        top1, top5: accuracy in percent.
            NaN, like all other numbers, if the network gives NaN for an image.
        nll: mean cross-entropy, the negative log-likelihood of an image's class, in nats.
        ece: expected calibration error in percent: the mean over images of the difference between
            accuracy and mean confidence of their bin; [a, b) is a bin, as in torchmetrics,
            the last one [a, 1].
        confusion: images by true class (row) and predicted class (column).
    """

    top1: float
    top5: float
    nll: float
    ece: float
    confusion: list[list[int]]

    @property
    def images(self) -> int:
        return sum(map(sum, self.confusion))

    @functools.cached_property
    def class_scores(self) -> dict[str, list[float]]:
        """`precision`, `recall` and `f1` by class, in percent; NaN for a class without images."""
        scores = class_scores(torch.tensor(self.confusion, dtype=torch.float64))
        return dict(zip(("precision", "recall", "f1"), scores.tolist(), strict=True))

    @property
    def class_accuracy(self) -> list[float]:
        """The same as the recall by class."""
        return self.class_scores["recall"]

    @property
    def macro(self) -> dict[str, float]:
        """Means of the three over the classes that have images; that of the recall is the balanced
        accuracy. NaN if the network gives NaN for an image."""
        means = torch.tensor(list(self.class_scores.values()), dtype=torch.float64).nanmean(dim=1)
        values = [math.nan] * 3 if math.isnan(self.nll) else means.tolist()
        return dict(zip(self.class_scores, values, strict=True))


class QualitySums:
    """Sums over batches that make a :class:`Quality`."""

    def __init__(self, num_classes: int, device: torch.device):
        self.dtype = wide(device)
        self.totals = torch.zeros(3, dtype=self.dtype, device=device)  # top-1, top-5, NLL
        self.bins = torch.zeros(BINS, 2, dtype=self.dtype, device=device)  # right, confidence
        # counted in floats, whose sums by index every device has
        self.confusion = torch.zeros(num_classes**2, dtype=self.dtype, device=device)
        self.edges = torch.linspace(0, 1, BINS + 1, device=device)

    def add(self, logits: Tensor, target: Tensor) -> None:
        """Add a batch: logits [N, C], target [N] class indices."""
        logits = logits.float()
        confidence, right = logits.softmax(dim=1).amax(dim=1), logits.argmax(dim=1) == target
        self.totals[:2] += correct_counts(logits, target)
        self.totals[2] += F.cross_entropy(logits.to(self.dtype), target, reduction="sum")
        place = (torch.bucketize(confidence, self.edges, right=True) - 1).clamp(0, BINS - 1)
        self.bins.index_add_(0, place, torch.stack([right, confidence], dim=1).to(self.dtype))
        count_cells(self.confusion, logits, target)

    def result(self) -> Quality:
        """The means; at least one batch must have been added."""
        side = round(len(self.confusion) ** 0.5)
        confusion = self.confusion.round().long().view(side, side).tolist()
        images = sum(map(sum, confusion))
        gaps = (self.bins[:, 0] - self.bins[:, 1]).abs().sum()
        top1, top5, nll, ece = (torch.cat([self.totals, gaps[None]]) / images).tolist()
        if math.isnan(nll):  # argmax of NaN is the first class
            top1 = top5 = math.nan
        return Quality(100 * top1, 100 * top5, nll, 100 * ece, confusion)


OUTCOMES = ("both_right", "only_teacher", "only_student", "both_wrong_same", "both_wrong_other")


@dataclass(frozen=True)
class Comparison:
    """A student beside its teacher; shares of the images in percent, which sum to 100.

    Attributes:
        both_right, only_teacher, only_student: who names the class.
        both_wrong_same, both_wrong_other: neither does; whether they name the same one.
        kl: mean KL(teacher || student) at temperature 1, in nats.
    """

    both_right: float
    only_teacher: float
    only_student: float
    both_wrong_same: float
    both_wrong_other: float
    kl: float

    @property
    def agreement(self) -> float:
        """Images that both assign to the same class, in percent."""
        return self.both_right + self.both_wrong_same

    @property
    def gap(self) -> float:
        """The teacher's top-1 accuracy minus the student's, in points."""
        return self.only_teacher - self.only_student


class ComparisonSums:
    """Sums over batches that make a :class:`Comparison`."""

    def __init__(self, device: torch.device):
        self.dtype = wide(device)
        self.outcomes = torch.zeros(len(OUTCOMES), dtype=self.dtype, device=device)
        self.kl = torch.zeros((), dtype=self.dtype, device=device)

    def add(self, student: Tensor, teacher: Tensor, target: Tensor) -> None:
        """Add a batch: logits [N, C] of both, target [N] class indices."""
        ours, theirs = (logits.to(self.dtype) for logits in (student, teacher))
        self.kl += divergence(theirs.log_softmax(dim=1), ours.log_softmax(dim=1)).sum()
        student_class, teacher_class = ours.argmax(dim=1), theirs.argmax(dim=1)
        right, taught = student_class == target, teacher_class == target
        other_class = (student_class != teacher_class).long()
        when_wrong = torch.where(right, 2, 3 + other_class)
        place = torch.where(taught, torch.where(right, 0, 1), when_wrong)
        self.outcomes.index_add_(0, place, torch.ones_like(place, dtype=self.dtype))

    def result(self) -> Comparison:
        """The means; at least one batch must have been added."""
        counts = dict(zip(OUTCOMES, self.outcomes.tolist(), strict=True))
        images = sum(counts.values())
        shares = {name: 100 * count / images for name, count in counts.items()}
        return Comparison(**shares, kl=self.kl.item() / images)
