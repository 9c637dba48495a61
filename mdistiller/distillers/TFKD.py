"""TFKD. Yuan, Tay, Li, Wang, Feng: Revisiting Knowledge Distillation via Label Smoothing
Regularization, CVPR 2020, arXiv 1909.11723.

Tf-KD_reg: the teacher is made by hand. With C classes and t the label, it gives the label the
probability A, every other class (1 - A) / (C - 1). Softened like any teacher, with
v = log of these probabilities and z the student's logits:

    loss = T^2 / N * sum_n KL(softmax(v / T) || softmax(z / T))

For soft labels, v is the log of their mean of these teachers. Samples without a label do not count.
The paper asks for A of at least 0.9 and a high temperature; the numbers here (A 0.99, T 20, weights
0.9 and 0.1) and the factor T^2, as in KD, are ours.

Tf-KD_self, the paper's other method, is KD with a trained copy of the student as the teacher:
TYPE KD, TEACHER the student's name, TEACHER_CFG the config that trains it
(`configs/digits/tfkd_self.yaml`).
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mdistiller.distillers._base import DISTILLERS, Distiller, Losses
from mdistiller.distillers.helpers.losses.decoupled import labelled_mean, target_column
from mdistiller.distillers.helpers.losses.logit_losses import kd_rows
from mdistiller.distillers.helpers.training.settings import require_positive
from mdistiller.registry import UserError


def virtual_teacher(target: Tensor, classes: int, a: float) -> Tensor:
    """Logits of the hand-made teacher, float32 [N, classes], at temperature 1.

    Args:
        target: [N] class indices, or [N, classes] probabilities. Without a label: of class 0.
        a: probability of the label, within 0 and 1.
    """
    if not target.is_floating_point():
        target = F.one_hot(target_column(target)[0][:, 0], classes)
    other = (1 - a) / max(classes - 1, 1)
    return (other + (a - other) * target.float()).log()


def tfkd_loss(logits: Tensor, target: Tensor, a: float, temperature: float) -> Tensor:
    """Mean divergence from the hand-made teacher over the labelled samples times T², a scalar.

    Args:
        logits: [N, C] of the student.
        target: [N] class indices, IGNORE_INDEX where unlabelled; or [N, C] probabilities.
    """
    _, labelled = target_column(target)
    teacher = virtual_teacher(target, logits.shape[1], a)
    return labelled_mean(kd_rows(logits, teacher, temperature), labelled)


@DISTILLERS.register(
    "TFKD", config={"A": 0.99, "T": 20.0, "LOSS": {"CE_WEIGHT": 0.9, "KD_WEIGHT": 0.1}}
)
class TFKD(Distiller):
    """Soft targets from a teacher made of the labels alone."""

    soft_labels = True
    uses_teacher = False
    uses_hard_label_loss = True

    def __init__(self, student: nn.Module, teacher: nn.Module | None, cfg: Any):
        super().__init__(student, None)
        node = cfg.TFKD
        self.a, self.temperature = node.A, require_positive("TFKD.T", node.T)
        if not 0 < self.a < 1:
            raise UserError(f"TFKD.A must lie between 0 and 1, got {self.a}")
        self.ce_loss_weight = node.LOSS.CE_WEIGHT
        self.kd_loss_weight = node.LOSS.KD_WEIGHT

    def forward_train(self, image: Tensor, target: Tensor, **batch: Any) -> tuple[Tensor, Losses]:
        logits = self.run_student(image).logits
        with torch.autocast(image.device.type, enabled=False):
            loss = tfkd_loss(logits, target, self.a, self.temperature)
            return logits, {
                "loss_ce": self.ce_loss_weight * self.hard_label_loss(logits, target),
                "loss_kd": self.kd_loss_weight * loss,
            }
