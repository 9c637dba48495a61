"""CorrectedKD. KD from a teacher whose predictions the label corrects, in four ways that papers of
2021 to 2026 compare with one another.

With v, z the logits of teacher and student, y the label, KD(v, z) = T^2 KL(softmax(v / T) ||
softmax(z / T)), MODE chooses the loss of a sample; it is averaged over the labelled ones:

    swap       KD(v', z): v' is v with v_y and the largest logit exchanged
    soft_swap  KD(v', z): with w the best wrong class and d = max(0, v_w - v_y + MARGIN), v' is v
               with v_y + d/2 and v_w - d/2, so that the label leads w by MARGIN at least
    rc         KD(v, z) + RC_WEIGHT KD(z', z): z' is z with max z added to z_y, without gradient
    revision   where the teacher is right, cross-entropy + MSE_WEIGHT / C sum_c (z_c - v_c)^2; else
               1 / C sum_c (p_c(z) - u_c)^2 at temperature 1, where u = b p(v) + (1 - b) onehot(y)
               and b = SHARE / (max p(v) - p_y(v) + 1)

each times KD_WEIGHT. `revision` has its own cross-entropy and compares unscaled logits, so it
refuses a CE_WEIGHT other than 0, and LSKD. It cuts logits at ±1e15, whose squares would overflow
further out. It averages both kinds of samples over the whole batch, not over their kind, so the
value does not depend on how many of a kind a process has.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mdistiller.distillers._base import DISTILLERS, Distiller, Output
from mdistiller.distillers.helpers.losses.decoupled import labelled_mean, target_column
from mdistiller.distillers.helpers.losses.logit_losses import kd_rows
from mdistiller.distillers.helpers.losses.numerics import full_precision, scale_logits
from mdistiller.distillers.helpers.training.settings import require_one_of, require_positive
from mdistiller.registry import UserError

RowLoss = Callable[[Tensor, Tensor, Tensor], Tensor]
"""Loss of each sample [N] from logits of student and teacher [N, C] and labels [N, 1]."""

_LARGEST = 1e15  # of a logit whose difference is squared


def swap(logits: Tensor, column: Tensor) -> Tensor:
    """Logits [N, C] with those of the classes `column` [N, 1] and the largest ones exchanged."""
    logits = scale_logits(logits, 1.0)
    largest, best = logits.max(dim=1, keepdim=True)
    return logits.scatter(1, best, logits.gather(1, column)).scatter(1, column, largest)


def soft_swap(logits: Tensor, column: Tensor, margin: float = 0.05) -> Tensor:
    """Logits [N, C] where class `column` [N, 1] leads the best other one by `margin` or more."""
    logits = scale_logits(logits, 1.0)
    right = logits.gather(1, column)
    wrong, rival = logits.scatter(1, column, float("-inf")).max(dim=1, keepdim=True)
    half = (wrong - right + margin).clamp(min=0) / 2
    return logits.scatter(1, rival, wrong - half).scatter(1, column, right + half)


def raised(logits: Tensor, column: Tensor) -> Tensor:
    """Logits [N, C] with each sample's largest added to that of class `column`; no gradient."""
    logits = scale_logits(logits.detach(), 1.0)
    return logits.scatter_add(1, column, logits.amax(dim=1, keepdim=True))


def revision_rows(
    logits_student: Tensor,
    logits_teacher: Tensor,
    column: Tensor,
    mse_weight: float = 4.0,
    share: float = 0.8,
) -> Tensor:
    """Loss of each sample in mode revision, [N]; logits [N, C], column [N, 1]."""
    z, v = (
        F.hardtanh(full_precision(logits), -_LARGEST, _LARGEST)
        for logits in (logits_student, logits_teacher)
    )
    log_p, q = F.log_softmax(z, dim=1), v.softmax(dim=1)
    agreed = mse_weight * (z - v).square().mean(dim=1) - log_p.gather(1, column)[:, 0]
    keep = share / (q.amax(dim=1, keepdim=True) - q.gather(1, column) + 1)
    revised = (keep * q).scatter_add(1, column, 1 - keep)
    differing = (log_p.exp() - revised).square().mean(dim=1)
    return torch.where(v.argmax(dim=1) == column[:, 0], agreed, differing)


def mode_loss(node: Any) -> RowLoss:
    """The loss for CORRECTEDKD.MODE, with the settings of the node."""
    temperature = require_positive("CORRECTEDKD.T", node.T)

    def swapped(student: Tensor, teacher: Tensor, column: Tensor) -> Tensor:
        return kd_rows(student, swap(teacher, column), temperature)

    def softly_swapped(student: Tensor, teacher: Tensor, column: Tensor) -> Tensor:
        return kd_rows(student, soft_swap(teacher, column, node.MARGIN), temperature)

    def rc(student: Tensor, teacher: Tensor, column: Tensor) -> Tensor:
        correction = kd_rows(student, raised(student, column), temperature)
        return kd_rows(student, teacher, temperature) + node.RC_WEIGHT * correction

    def revision(student: Tensor, teacher: Tensor, column: Tensor) -> Tensor:
        return revision_rows(student, teacher, column, node.MSE_WEIGHT, node.SHARE)

    losses = {"swap": swapped, "soft_swap": softly_swapped, "rc": rc, "revision": revision}
    return losses[require_one_of("CORRECTEDKD.MODE", node.MODE, list(losses))]


@DISTILLERS.register(
    "CORRECTEDKD",
    config={
        "MODE": "swap",  # or soft_swap, rc, revision
        "T": 4.0,
        "MARGIN": 0.05,  # soft_swap
        "RC_WEIGHT": 0.1,  # rc
        "MSE_WEIGHT": 4.0,  # revision
        "SHARE": 0.8,  # revision
        "LOSS": {"CE_WEIGHT": 0.0, "KD_WEIGHT": 1.0},
    },
)
class CorrectedKD(Distiller):
    """Soft targets of a teacher that is set right where it contradicts the label."""

    takes_standardized_logits = True
    teacher_logits_only = True

    def __init__(self, student: nn.Module, teacher: nn.Module, cfg: Any):
        super().__init__(student, teacher, cfg)
        node = cfg.CORRECTEDKD
        self.ce_loss_weight = node.LOSS.CE_WEIGHT
        self.kd_loss_weight = node.LOSS.KD_WEIGHT
        self.row_loss = mode_loss(node)
        if node.MODE == "revision" and (self._lskd or self.ce_loss_weight):
            key = "LSKD.ENABLE" if self._lskd else "CORRECTEDKD.LOSS.CE_WEIGHT"
            raise UserError(
                f"{key}: CORRECTEDKD.MODE revision compares unscaled logits and has its own "
                f"cross-entropy; set {key} to {'False' if self._lskd else 0}"
            )

    def distill(self, student: Output, teacher: Output, target: Tensor, **batch: Any) -> Tensor:
        column, labelled = target_column(target)
        rows = self.row_loss(student.logits, teacher.logits, column)
        return self.kd_loss_weight * labelled_mean(rows, labelled)
