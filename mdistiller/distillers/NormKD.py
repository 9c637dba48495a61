"""NormKD. Chi et al.: NormKD: Normalized Logits for Knowledge Distillation, 2023, arXiv 2308.00520.

Every sample and network has its own temperature, by the standard deviation of its logits over the
classes (squares divided by C - 1): T_v = TEMPERATURE std(v) for the teacher's logits v,
T_z = TEMPERATURE std(z) for the student's z.

    loss = KD_WEIGHT / N * sum_n T_v^2 KL(softmax(v / T_v) || softmax(z / T_z))

This is LSKD's KD at temperature TEMPERATURE with each sample weighted by the teacher's variance;
the two agree where that is 1, as it is for standardised logits. The gradient flows through std(z),
too.

Where a sample's logits are constant up to rounding, they count as 0 without gradient. Logits beyond
±1e14 are cut there, since their squares would overflow.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mdistiller.distillers._base import DISTILLERS, Distiller, Output
from mdistiller.distillers.helpers.losses.numerics import full_precision, weighted_divergence
from mdistiller.distillers.helpers.training.settings import require_positive

_LARGEST = 1e14  # of a logit
_SMALLEST = 1e-7  # of a standard deviation


def _normalized(logits: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """Log-softmax at T = `temperature` * std, [N, C], and T, [N, 1]: infinite for constant rows."""
    logits = F.hardtanh(full_precision(logits), -_LARGEST, _LARGEST)
    mean = logits.mean(dim=1, keepdim=True)
    centred = logits - mean
    scale = temperature / math.sqrt(max(logits.shape[1] - 1, 1))
    t_v = torch.linalg.vector_norm(centred, dim=1, keepdim=True) * scale
    noise = mean.detach().abs() * (8 * temperature * torch.finfo(logits.dtype).eps)
    constant = t_v.detach() <= noise.clamp(min=_SMALLEST * temperature)
    t_v = t_v.masked_fill(constant, math.inf)
    return F.log_softmax(centred / t_v, dim=1), t_v


def normkd_loss(logits_student: Tensor, logits_teacher: Tensor, temperature: float) -> Tensor:
    """Mean over samples of T_v² KL(teacher || student), a scalar.

    Args:
        logits_student, logits_teacher: [N, C], C >= 2.
        temperature: of logits with standard deviation 1, > 0.
    """
    log_p, _ = _normalized(logits_student, temperature)
    log_q, t_v = _normalized(logits_teacher, temperature)
    weights = t_v.masked_fill(t_v == math.inf, 0.0).square().flatten() / len(log_p)
    return weighted_divergence(log_q, log_p, weights)


@DISTILLERS.register(
    "NORMKD", config={"TEMPERATURE": 2.0, "LOSS": {"CE_WEIGHT": 0.1, "KD_WEIGHT": 0.9}}
)
class NormKD(Distiller):
    """Soft targets at temperatures that follow each sample's spread of logits."""

    soft_labels = True
    takes_standardized_logits = True
    teacher_logits_only = True

    def __init__(self, student: nn.Module, teacher: nn.Module, cfg: Any):
        super().__init__(student, teacher, cfg)
        self.temperature = require_positive("NORMKD.TEMPERATURE", cfg.NORMKD.TEMPERATURE)
        self.ce_loss_weight = cfg.NORMKD.LOSS.CE_WEIGHT
        self.kd_loss_weight = cfg.NORMKD.LOSS.KD_WEIGHT

    def distill(self, student: Output, teacher: Output, target: Tensor, **batch: Any) -> Tensor:
        return self.kd_loss_weight * normkd_loss(student.logits, teacher.logits, self.temperature)
