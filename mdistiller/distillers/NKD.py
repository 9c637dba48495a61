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

import torch.nn.functional as F
from torch import Tensor, nn

from mdistiller.distillers._base import DISTILLERS, Distiller, Output
from mdistiller.distillers._common import require_positive, soften
from mdistiller.distillers._decoupled import labelled_mean, rest_log_probs, target_column


def nkd_rows(
    logits_student: Tensor, logits_teacher: Tensor, target: Tensor, temperature: float
) -> tuple[Tensor, Tensor]:
    """The target's term, and that of the other classes with its T², of each sample: [N] both.

    Args:
        logits_student, logits_teacher: [N, C], C >= 2.
        target: [N] class indices, or [N, C] probabilities; rows with IGNORE_INDEX mean nothing.
        temperature: T > 0, of the other classes only.
    """
    column, _ = target_column(target)
    both = logits_student, logits_teacher
    s_target, t_target = (
        F.log_softmax(soften(z, 1.0), dim=1).gather(1, column).squeeze(1) for z in both
    )
    s_within, t_within = (rest_log_probs(soften(z, temperature), column)[1] for z in both)
    others = -(t_within.exp() * s_within).sum(dim=1) * temperature**2
    return -t_target.exp() * s_target, others


def nkd_terms(
    logits_student: Tensor, logits_teacher: Tensor, target: Tensor, temperature: float
) -> tuple[Tensor, Tensor]:
    """Two scalars: means of :func:`nkd_rows` over the labelled samples."""
    _, labelled = target_column(target)
    own, others = (
        labelled_mean(rows, labelled)
        for rows in nkd_rows(logits_student, logits_teacher, target, temperature)
    )
    return own, others


def nkd_loss(
    logits_student: Tensor,
    logits_teacher: Tensor,
    target: Tensor,
    temperature: float,
    gamma: float,
) -> Tensor:
    """Target term + gamma * other classes' term, a scalar; see :func:`nkd_terms`."""
    own, others = nkd_terms(logits_student, logits_teacher, target, temperature)
    return own + gamma * others


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
