"""KD. Hinton, Vinyals, Dean: Distilling the Knowledge in a Neural Network, NIPS 2014 workshop,
arXiv 1503.02531.

With q = softmax(z_teacher / T) and p = softmax(z_student / T), over a batch of N samples:

    loss = T^2 / N * sum_n sum_c q_nc (log q_nc - log p_nc)
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from mdistiller.distillers._base import DISTILLERS, Distiller, Output
from mdistiller.distillers._common import require_positive
from mdistiller.distillers.logit_losses import kd_loss, kd_rows

__all__ = ["KD", "kd_loss", "kd_rows"]


@DISTILLERS.register(
    "KD", config={"TEMPERATURE": 4.0, "LOSS": {"CE_WEIGHT": 0.1, "KD_WEIGHT": 0.9}}
)
class KD(Distiller):
    """Soft targets: the student matches the teacher's softened class probabilities."""

    takes_standardized_logits = True
    teacher_logits_only = True
    soft_labels = True

    def __init__(self, student: nn.Module, teacher: nn.Module, cfg: Any):
        super().__init__(student, teacher, cfg)
        self.temperature = require_positive("KD.TEMPERATURE", cfg.KD.TEMPERATURE)
        self.ce_loss_weight = cfg.KD.LOSS.CE_WEIGHT
        self.kd_loss_weight = cfg.KD.LOSS.KD_WEIGHT

    def distill(self, student: Output, teacher: Output, target: Tensor, **batch: Any) -> Tensor:
        return self.kd_loss_weight * kd_loss(student.logits, teacher.logits, self.temperature)
