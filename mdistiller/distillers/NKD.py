"""NKD. Yang, Zeng, Li, Zhang, Yuan, Li: From Knowledge Distillation to Self-Knowledge
Distillation: A Unified Approach with Normalized Loss and Customized Soft Labels, ICCV 2023,
arXiv 2303.13005.

With p and q the probabilities of teacher and student at temperature 1, t the target class, and r
the softmax over the classes j != t of logits / T:

    loss = -1/N * sum_n p_t log q_t - GAMMA T^2 / N * sum_n sum_{j != t} r_teacher,j log r_student,j

The second term is a cross-entropy: its gradient is that of DKD's NCKD with weight GAMMA, its value
is not 0 for equal networks. Of soft labels the largest counts as the target. T = 1 and GAMMA = 1.5
are the authors' numbers on ImageNet, 3 and 3.5 on CIFAR-100 (ResNet34 -> ResNet18).
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from mdistiller.distillers._base import DISTILLERS, Distiller, Output
from mdistiller.distillers.helpers.losses.decoupled import (
    labelled_mean,
    labelled_rows,
    target_column,
)
from mdistiller.distillers.helpers.losses.logit_losses import nkd_rows
from mdistiller.distillers.helpers.training.settings import require_positive

__all__ = ["NKD", "nkd_loss", "nkd_rows", "nkd_terms"]


def nkd_terms(
    logits_student: Tensor, logits_teacher: Tensor, target: Tensor, temperature: float
) -> tuple[Tensor, Tensor]:
    """Two scalars: means of :func:`nkd_rows` over the labelled samples."""
    _, labelled = target_column(target)
    target_term, other_term = (
        labelled_mean(rows, labelled)
        for rows in nkd_rows(logits_student, logits_teacher, target, temperature)
    )
    return target_term, other_term


def nkd_loss(
    logits_student: Tensor,
    logits_teacher: Tensor,
    target: Tensor,
    temperature: float,
    gamma: float,
) -> Tensor:
    """Target term + gamma * other classes' term, a scalar; see :func:`nkd_terms`."""
    target_term, other_term = nkd_terms(logits_student, logits_teacher, target, temperature)
    return target_term + gamma * other_term


@DISTILLERS.register(
    "NKD", config={"T": 1.0, "GAMMA": 1.5, "LOSS": {"CE_WEIGHT": 1.0, "KD_WEIGHT": 1.0}}
)
class NKD(Distiller):
    """Soft cross-entropy of the target class, and of the others normalised among themselves."""

    soft_labels = True
    takes_standardized_logits = True
    teacher_logits_only = True

    def __init__(self, student: nn.Module, teacher: nn.Module, cfg: Any):
        super().__init__(student, teacher, cfg)
        self.temperature = require_positive("NKD.T", cfg.NKD.T)
        self.gamma = cfg.NKD.GAMMA
        self.ce_loss_weight = cfg.NKD.LOSS.CE_WEIGHT
        self.kd_loss_weight = cfg.NKD.LOSS.KD_WEIGHT

    def distill(self, student: Output, teacher: Output, target: Tensor, **batch: Any) -> Tensor:
        logits = student.logits, teacher.logits
        return self.kd_loss_weight * nkd_loss(*logits, target, self.temperature, self.gamma)

    def distill_rows(
        self, student: Output, teacher: Output, target: Tensor, **batch: Any
    ) -> Tensor:
        _, labelled = target_column(target)
        logits = student.logits, teacher.logits
        own, others = nkd_rows(*logits, target, self.temperature)
        return self.kd_loss_weight * labelled_rows(own + self.gamma * others, labelled)
