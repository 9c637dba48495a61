"""LOGITS. Ba, Caruana: Do Deep Nets Really Need to be Deep?, NIPS 2014, arXiv 1312.6184.

    loss = 1 / (N C) * sum_n sum_c (student_nc - teacher_nc)^2

Logits are compared as they are: a constant added to all of a sample's logits changes the loss,
though not the prediction. The default weight is that of Knowledge-Distillation-Zoo.
"""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from mdistiller.distillers._base import DISTILLERS, Distiller, Output
from mdistiller.distillers.helpers.losses.numerics import full_precision


def logits_loss(logits_student: Tensor, logits_teacher: Tensor) -> Tensor:
    """Mean squared difference of two tensors [N, C], a scalar."""
    return F.mse_loss(full_precision(logits_student), full_precision(logits_teacher))


@DISTILLERS.register("LOGITS", config={"LOSS": {"CE_WEIGHT": 1.0, "KD_WEIGHT": 0.1}})
class LOGITS(Distiller):
    """The student regresses the teacher's logits."""

    takes_standardized_logits = True
    teacher_logits_only = True
    soft_labels = True

    def __init__(self, student: nn.Module, teacher: nn.Module, cfg: Any):
        super().__init__(student, teacher, cfg)
        self.ce_loss_weight = cfg.LOGITS.LOSS.CE_WEIGHT
        self.kd_loss_weight = cfg.LOGITS.LOSS.KD_WEIGHT

    def distill(self, student: Output, teacher: Output, target: Tensor, **batch: Any) -> Tensor:
        return self.kd_loss_weight * logits_loss(student.logits, teacher.logits)

    def distill_rows(
        self, student: Output, teacher: Output, target: Tensor, **batch: Any
    ) -> Tensor:
        logits = full_precision(student.logits), full_precision(teacher.logits)
        return self.kd_loss_weight * F.mse_loss(*logits, reduction="none").mean(dim=1)
