"""KD and DKD as two loss terms, about the target class and about the others, for trainers that
give each a gradient of its own.

Of the softmaxes at temperature T, as in `DKD.py`: TCKD compares (p_y, 1 - p_y), NCKD the classes
other than y. KD is TCKD + (1 - q_y) NCKD sample by sample, q_y the teacher's probability of the
label. With `topk`, NCKD is over those of the teacher's k largest classes that are not the target.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from mdistiller.distillers.helpers.losses.decoupled import (
    decoupled_log_probs,
    labelled_shares,
    target_column,
)
from mdistiller.distillers.helpers.losses.divergence import Divergence
from mdistiller.distillers.helpers.losses.numerics import divergence, scale_logits
from mdistiller.distillers.helpers.training.gather import gather_batch
from mdistiller.registry import UserError


@dataclass(frozen=True)
class Split:
    """How a trainer wants the distillation loss split.

    Attributes:
        topk: classes in NCKD, the target among them if the teacher ranks it there; 0: all.
        grows: k rises evenly from `topk` in the first epoch to all classes in the last.
        batch_weight: NCKD's weight in KD is the batch's mean of 1 - q_y, else each sample's own.
        epochs: of the training.
    """

    topk: int = 0
    grows: bool = False
    batch_weight: bool = False
    epochs: int = 1

    def __post_init__(self) -> None:
        if self.topk < 0 or self.topk == 1:  # with one class there may be none but the target
            raise UserError(
                f"SOLVER.DEEPKD.TOPK must be 0 (all classes) or at least 2, got {self.topk}"
            )

    def classes(self, epoch: int, count: int) -> int:
        """k in an epoch (from 1) of `count` classes; 0: all."""
        if not self.topk or not self.grows:
            return self.topk if self.topk < count else 0
        done = (epoch - 1) / max(self.epochs - 1, 1)
        k = round(self.topk + done * (count - self.topk))
        return k if k < count else 0


def split_rows(
    logits_student: Tensor,
    logits_teacher: Tensor,
    target: Tensor,
    temperature: float,
    split: Split,
    epoch: int,
    as_kd: bool = True,
    form: Divergence = divergence,
) -> tuple[Tensor, Tensor]:
    """TCKD and NCKD with T² of each sample, [N] and [N]; 0 where the sample has no label.

    Args: as of :func:`split_terms`.
    """
    rows, labelled = _rows(
        logits_student, logits_teacher, target, temperature, split, epoch, as_kd, form
    )
    scale = labelled.to(rows[0].dtype) * temperature**2
    return rows[0] * scale, rows[1] * scale


def split_terms(
    logits_student: Tensor,
    logits_teacher: Tensor,
    target: Tensor,
    temperature: float,
    split: Split,
    epoch: int,
    as_kd: bool,
    form: Divergence = divergence,
) -> tuple[Tensor, Tensor]:
    """TCKD and NCKD with T², means over the labelled samples: two scalars.

    Args:
        logits_student, logits_teacher: [N, C].
        target: [N] class indices, or [N, C] probabilities of which the largest counts.
        temperature: T > 0.
        as_kd: weight NCKD by 1 - q_y, so that the two add up to KD.
        form: what is measured in place of KL.
    """
    rows, labelled = _rows(
        logits_student, logits_teacher, target, temperature, split, epoch, as_kd, form
    )
    shares = labelled_shares(labelled, rows[0].dtype) * temperature**2
    return torch.dot(rows[0], shares), torch.dot(rows[1], shares)


def _rows(
    logits_student: Tensor,
    logits_teacher: Tensor,
    target: Tensor,
    temperature: float,
    split: Split,
    epoch: int,
    as_kd: bool,
    form: Divergence,
) -> tuple[tuple[Tensor, Tensor], Tensor]:
    """TCKD and NCKD without T² of every sample, and which ones have a label."""
    column, labelled = target_column(target)
    student, teacher = (scale_logits(z, temperature) for z in (logits_student, logits_teacher))
    (s_binary, s_within), (t_binary, t_within) = (
        decoupled_log_probs(z, column) for z in (student, teacher)
    )
    topk = split.classes(epoch, student.shape[1])
    if topk:
        top = teacher.topk(topk, dim=1).indices
        s_within, t_within = (_within(z.gather(1, top), top == column) for z in (student, teacher))
    target_rows, other_rows = form(t_binary, s_binary), form(t_within, s_within)
    if as_kd:
        weight = t_binary[:, 1].exp()
        other_rows = other_rows * (_batch_mean(weight, labelled) if split.batch_weight else weight)
    return (target_rows, other_rows), labelled


def _within(logits: Tensor, target: Tensor) -> Tensor:
    """Log-softmax of logits [N, K] without those marked, where it is 0. K is at least 2."""
    rest = logits.masked_fill(target, float("-inf"))
    return (rest - rest.logsumexp(dim=1, keepdim=True)).masked_fill(target, 0.0)


def _batch_mean(weight: Tensor, labelled: Tensor) -> Tensor:
    """Mean over the labelled samples of all processes, a scalar."""
    weight, labelled = gather_batch(weight, labelled)
    return torch.dot(weight, labelled_shares(labelled, weight.dtype))
