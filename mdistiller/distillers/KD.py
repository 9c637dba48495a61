"""KD. Hinton, Vinyals, Dean: Distilling the Knowledge in a Neural Network, NIPS 2014 workshop,
arXiv 1503.02531.

With q = softmax(z_teacher / T) and p = softmax(z_student / T), over a batch of N samples:

    loss = T^2 / N * sum_n sum_c q_nc (log q_nc - log p_nc)

KD.DIVERGENCE puts another divergence of q and p in the sum's place; see
`helpers/losses/divergence.py`.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from mdistiller.distillers._base import DISTILLERS, Distiller, Output
from mdistiller.distillers.helpers.losses.divergence import read_divergence
from mdistiller.distillers.helpers.losses.logit_losses import kd_loss, kd_rows
from mdistiller.distillers.helpers.losses.numerics import divergence
from mdistiller.distillers.helpers.losses.split import Split, split_terms
from mdistiller.distillers.helpers.training.settings import require_positive
from mdistiller.registry import UserError

__all__ = ["KD", "kd_loss", "kd_rows"]


@DISTILLERS.register(
    "KD",
    config={
        "TEMPERATURE": 4.0,
        "DIVERGENCE": "kl",  # kl, reverse_kl or ab(ALPHA, BETA)
        "LOSS": {"CE_WEIGHT": 0.1, "KD_WEIGHT": 0.9},
    },
)
class KD(Distiller):
    """Soft targets: the student matches the teacher's softened class probabilities."""

    takes_standardized_logits = True
    teacher_logits_only = True
    soft_labels = True

    def __init__(self, student: nn.Module, teacher: nn.Module, cfg: Any):
        super().__init__(student, teacher, cfg)
        self.temperature = require_positive("KD.TEMPERATURE", cfg.KD.TEMPERATURE)
        self.divergence = read_divergence("KD.DIVERGENCE", cfg.KD.DIVERGENCE)
        self.ce_loss_weight = cfg.KD.LOSS.CE_WEIGHT
        self.kd_loss_weight = cfg.KD.LOSS.KD_WEIGHT

    def distill(self, student: Output, teacher: Output, target: Tensor, **batch: Any) -> Tensor:
        return self.kd_loss_weight * kd_loss(
            student.logits, teacher.logits, self.temperature, self.divergence
        )

    def distill_rows(
        self, student: Output, teacher: Output, target: Tensor, **batch: Any
    ) -> Tensor:
        logits = student.logits, teacher.logits
        return self.kd_loss_weight * kd_rows(*logits, self.temperature, self.divergence)

    def distill_split(
        self, student: Output, teacher: Output, target: Tensor, split: Split, **batch: Any
    ) -> tuple[Tensor, Tensor]:
        if self.divergence is not divergence:
            raise UserError("KD.DIVERGENCE must be kl where KD is split by the target class")
        logits = student.logits, teacher.logits
        terms = split_terms(*logits, target, self.temperature, split, batch["epoch"], as_kd=True)
        return self.kd_loss_weight * terms[0], self.kd_loss_weight * terms[1]
