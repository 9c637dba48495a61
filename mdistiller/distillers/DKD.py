"""DKD. Zhao, Cui, Song, Qiu, Liang: Decoupled Knowledge Distillation, CVPR 2022, arXiv 2203.08679.

KD splits into knowledge about the target class t and about the others. With b = (p_t, 1 - p_t) the
binary probabilities and r = softmax over the classes j != t, both of logits / T:

    TCKD = T^2 / N * sum_n KL(b_teacher || b_student)
    NCKD = T^2 / N * sum_n KL(r_teacher || r_student)
    loss = min(epoch / WARMUP, 1) * (ALPHA * TCKD + BETA * NCKD)

Everything is evaluated on log-probabilities: log(1 - p_t) is a logsumexp over j != t, never the log
of a rounded probability, so the loss stays finite where the textbook form gives inf and NaN.
"""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from mdistiller.distillers._base import DISTILLERS, Distiller, Output
from mdistiller.distillers._common import (
    IGNORE_INDEX,
    mean_of_labelled,
    require_positive,
    soften,
    warmup_factor,
)

Split = tuple[Tensor, Tensor, Tensor]


def decoupled_log_probs(logits: Tensor, is_target: Tensor) -> Split:
    """Split log-softmax into target, rest, and the distribution within the rest.

    Args:
        logits: [N, C], already divided by the temperature.
        is_target: [N, C] bool, one True a row.

    Returns:
        log p_t [N]; log(1 - p_t) [N]; log r [N, C] with 0 in the target's place.
    """
    log_p = F.log_softmax(logits, dim=1)
    log_target = log_p.masked_fill(~is_target, 0.0).sum(dim=1)
    log_rest = log_p.masked_fill(is_target, float("-inf")).logsumexp(dim=1)
    return log_target, log_rest, (log_p - log_rest[:, None]).masked_fill(is_target, 0.0)


def split_logits(
    logits_student: Tensor, logits_teacher: Tensor, target: Tensor, temperature: float
) -> tuple[Split, Split]:
    """:func:`decoupled_log_probs` of both networks' logits / T; class 0 stands for no label."""
    is_target = F.one_hot(target.masked_fill(target == IGNORE_INDEX, 0), logits_student.shape[1])
    student, teacher = (
        decoupled_log_probs(soften(z, temperature), is_target.bool())
        for z in (logits_student, logits_teacher)
    )
    return student, teacher


def dkd_rows(
    logits_student: Tensor, logits_teacher: Tensor, target: Tensor, temperature: float
) -> tuple[Tensor, Tensor]:
    """TCKD and NCKD of each sample, [N] both, with the factor T²; rows without label mean nothing.

    Args: as for :func:`dkd_terms`.
    """
    (s_target, s_rest, s_within), (t_target, t_rest, t_within) = split_logits(
        logits_student, logits_teacher, target, temperature
    )
    binary = t_target.exp() * (t_target - s_target) + t_rest.exp() * (t_rest - s_rest)
    within = (t_within.exp() * (t_within - s_within)).sum(dim=1)
    return binary * temperature**2, within * temperature**2


def dkd_terms(
    logits_student: Tensor, logits_teacher: Tensor, target: Tensor, temperature: float
) -> tuple[Tensor, Tensor]:
    """TCKD and NCKD, two scalars, each with the factor T².

    Args:
        logits_student, logits_teacher: [N, C], C >= 2 (with two classes NCKD is 0).
        target: [N] class indices; rows with IGNORE_INDEX count neither in sum nor in mean.
        temperature: T > 0.
    """
    tckd, nckd = dkd_rows(logits_student, logits_teacher, target, temperature)
    return mean_of_labelled(tckd, target), mean_of_labelled(nckd, target)


def dkd_loss(
    logits_student: Tensor,
    logits_teacher: Tensor,
    target: Tensor,
    alpha: float,
    beta: float,
    temperature: float,
) -> Tensor:
    """alpha * TCKD + beta * NCKD (equation 7 of the paper), a scalar; see :func:`dkd_terms`."""
    tckd, nckd = dkd_terms(logits_student, logits_teacher, target, temperature)
    return alpha * tckd + beta * nckd


@DISTILLERS.register(
    "DKD",
    config={"CE_WEIGHT": 1.0, "ALPHA": 1.0, "BETA": 8.0, "T": 4.0, "WARMUP": 20},
)
class DKD(Distiller):
    """Target-class and non-target-class knowledge with a weight each, after a linear warm-up.

    The unweighted terms are kept as metrics `tckd` and `nckd`.
    """

    def __init__(self, student: nn.Module, teacher: nn.Module, cfg: Any):
        super().__init__(student, teacher)
        self.ce_loss_weight = cfg.DKD.CE_WEIGHT
        self.alpha = cfg.DKD.ALPHA
        self.beta = cfg.DKD.BETA
        self.temperature = require_positive("DKD.T", cfg.DKD.T)
        self.warmup = cfg.DKD.WARMUP

    def distill(self, student: Output, teacher: Output, target: Tensor, **batch: Any) -> Tensor:
        tckd, nckd = dkd_terms(student.logits, teacher.logits, target, self.temperature)
        self.metrics = {"tckd": tckd.detach(), "nckd": nckd.detach()}
        return warmup_factor(batch["epoch"], self.warmup) * (self.alpha * tckd + self.beta * nckd)
