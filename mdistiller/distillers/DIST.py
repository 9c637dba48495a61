"""DIST. Huang, You, Wang, Qian, Xu: Knowledge Distillation from A Stronger Teacher, NeurIPS 2022,
arXiv 2205.10536.

With P and Q the predictions softmax(z / TAU) of student and teacher over a batch, [N, C], and
rho(a, b) = <a - mean a, b - mean b> / (|a - mean a| |b - mean b| + EPS) Pearson's correlation:

    inter = 1 - mean over samples of rho(P_n., Q_n.)
    intra = 1 - mean over classes of rho(P_.c, Q_.c)
    loss  = TAU^2 * (BETA * inter + GAMMA * intra)

EPS is added to the product of the lengths, as in the authors' code: a class that the batch hardly
touches (probabilities of 1e-5) then correlates little even with itself, and is left out in effect.
Rows and columns that are constant up to rounding have correlation 0 and no gradient. The batch is
that of all processes; the authors' code takes each process's own.

TAU is 4 on CIFAR-100 and 1 on ImageNet; BETA = GAMMA = 1 with weight 2 are the paper's 2 and 2.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mdistiller.distillers._base import DISTILLERS, Distiller, Output
from mdistiller.distillers.helpers.losses.numerics import centre, scale_logits
from mdistiller.distillers.helpers.training.gather import gather_batch
from mdistiller.distillers.helpers.training.settings import require_positive


def correlation(a: Tensor, b: Tensor, dim: int, eps: float) -> Tensor:
    """Pearson's correlation of two tensors along `dim`, with `eps` in the denominator."""
    a, b = centre(a, dim), centre(b, dim)
    lengths = torch.linalg.vector_norm(a, dim=dim) * torch.linalg.vector_norm(b, dim=dim)
    return (a * b).sum(dim=dim) / (lengths + eps)


def dist_loss(
    logits_student: Tensor,
    logits_teacher: Tensor,
    beta: float = 1.0,
    gamma: float = 1.0,
    tau: float = 1.0,
    eps: float = 1e-8,
) -> Tensor:
    """TAU² (beta * inter + gamma * intra), a scalar.

    Args:
        logits_student, logits_teacher: [N, C]; with N = 1 intra is the constant 1.
        beta, gamma: weights of the relation of classes and of samples.
        tau: temperature, > 0.
        eps: > 0.
    """
    student, teacher = (
        F.softmax(scale_logits(z, tau), dim=1) for z in (logits_student, logits_teacher)
    )
    inter, intra = (1 - correlation(student, teacher, dim, eps).mean() for dim in (1, 0))
    return tau**2 * (beta * inter + gamma * intra)


@DISTILLERS.register(
    "DIST",
    config={
        "BETA": 1.0,
        "GAMMA": 1.0,
        "TAU": 4.0,
        "EPS": 1e-8,
        "LOSS": {"CE_WEIGHT": 1.0, "KD_WEIGHT": 2.0},
    },
)
class DIST(Distiller):
    """Predictions correlate with the teacher's, over classes and over the samples of a batch."""

    soft_labels = True
    takes_standardized_logits = True
    teacher_logits_only = True

    def __init__(self, student: nn.Module, teacher: nn.Module, cfg: Any):
        super().__init__(student, teacher, cfg)
        self.ce_loss_weight = cfg.DIST.LOSS.CE_WEIGHT
        self.kd_loss_weight = cfg.DIST.LOSS.KD_WEIGHT
        self.settings = {
            "beta": cfg.DIST.BETA,
            "gamma": cfg.DIST.GAMMA,
            "tau": require_positive("DIST.TAU", cfg.DIST.TAU),
            "eps": require_positive("DIST.EPS", cfg.DIST.EPS),
        }

    def distill(self, student: Output, teacher: Output, target: Tensor, **batch: Any) -> Tensor:
        s_logits, t_logits = gather_batch(student.logits, teacher.logits)
        return self.kd_loss_weight * dist_loss(s_logits, t_logits, **self.settings)
