"""DGKD, "DKD Align": a research idea without a paper. DKD, with a reward for TCKD and NCKD pulling
at the logits in different directions.

With g_T, g_N the gradients of TCKD and NCKD (see DKD) in the student's logits z, [N, C], and D the
mean over samples and classes of (g_T - g_N)^2:

    TERM "off":    L = ALPHA * TCKD + BETA * NCKD
    TERM "plain":  L - EPSILON * D
    TERM "log":    L - EPSILON * D / (D' + 1e-8),   D' = D without gradient
    loss = min(epoch / WARMUP, 1) * L

"log" has the value of about -EPSILON (no measure of progress) and the gradient of -EPSILON log D;
for D far below 1e-8, near a perfect student, it fades. D is of the order 1 / (N^2 C), 1e-7 for
CIFAR-100, so "plain" does next to nothing. With q_t, p_t the target's probabilities of student and
teacher, r_s, r_t those of the other classes among themselves (0 for the target), all of logits / T,
and e the target's one-hot vector,

    g_T = T / N * (q_t - p_t) (e - r_s),   g_N = T / N * (r_s - r_t),

so D needs no second backward pass. The batch is that of all processes. The original counts epochs
from 0, so its first has weight 0; here they count as in DKD, which "off" is exactly.

Metrics, of the batch: avg_grad_similarity, the mean cosine of the samples' rows of g_T and g_N;
target_norm and nontarget_norm, lengths of the student's target logits and of the others;
target_gradmag and nontarget_gradmag, lengths of g_T and g_N; covariance, the cosine of their sums
over the samples.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from mdistiller.distillers._base import DISTILLERS, Distiller, Losses, Output
from mdistiller.distillers.helpers.losses.decoupled import (
    decoupled_log_probs,
    labelled_mean,
    target_column,
    target_mask,
)
from mdistiller.distillers.helpers.losses.logit_losses import dkd_terms
from mdistiller.distillers.helpers.losses.numerics import scale_logits, unit
from mdistiller.distillers.helpers.training.gather import gather_batch
from mdistiller.distillers.helpers.training.settings import (
    require_one_of,
    require_positive,
    warmup_factor,
)


def term_gradients(
    logits_student: Tensor, logits_teacher: Tensor, target: Tensor, temperature: float
) -> tuple[Tensor, Tensor]:
    """Gradients of TCKD and NCKD in the student's logits, [N, C] each; 0 for unlabelled samples.

    Args: as of :func:`dkd_terms`.
    """
    is_target, labelled = target_mask(target, logits_student.shape[1])
    column, _ = target_column(target)
    (s_target, r_s), (t_target, r_t) = (
        (log_b[:, 0].exp(), log_r.exp().masked_fill(is_target, 0.0))
        for log_b, log_r in (
            decoupled_log_probs(scale_logits(z, temperature), column)
            for z in (logits_student, logits_teacher)
        )
    )
    scale = labelled[:, None] * (temperature / labelled.sum().clamp(min=1))
    of_target = (s_target - t_target)[:, None] * (is_target.to(r_s.dtype) - r_s)
    return of_target * scale, (r_s - r_t) * scale


def dgkd_loss(
    logits_student: Tensor,
    logits_teacher: Tensor,
    target: Tensor,
    alpha: float,
    beta: float,
    epsilon: float,
    temperature: float,
    term: str = "log",
) -> Tensor:
    """L as above, a scalar.

    Args:
        logits_student, logits_teacher: [N, C], C >= 2.
        target: [N] class indices; rows with IGNORE_INDEX do not count.
        term: "off", "plain" or "log".
    """
    logits = logits_student, logits_teacher
    tckd, nckd = dkd_terms(*logits, target, temperature)
    loss = alpha * tckd + beta * nckd
    if term == "off":
        return loss
    of_target, of_others = term_gradients(*logits, target, temperature)
    _, labelled = target_column(target)
    distance = labelled_mean((of_target - of_others).square().mean(dim=1), labelled)
    return loss - epsilon * (distance if term == "plain" else distance / (distance.detach() + 1e-8))


@torch.no_grad()
def gradient_metrics(
    logits_student: Tensor, logits_teacher: Tensor, target: Tensor, temperature: float
) -> Losses:
    """The metrics named above, scalars."""
    of_target, of_others = term_gradients(logits_student, logits_teacher, target, temperature)
    is_target, labelled = target_mask(target, logits_student.shape[1])
    is_target, others = is_target & labelled[:, None], ~is_target & labelled[:, None]
    cosines = (unit(of_target) * unit(of_others)).sum(dim=1)
    length = torch.linalg.vector_norm
    return {
        "avg_grad_similarity": cosines.sum() / labelled.sum().clamp(min=1),
        "target_norm": length(logits_student * is_target),
        "nontarget_norm": length(logits_student * others),
        "target_gradmag": length(of_target),
        "nontarget_gradmag": length(of_others),
        "covariance": (unit(of_target.sum(dim=0)) * unit(of_others.sum(dim=0))).sum(),
    }


@DISTILLERS.register(
    "DGKD",
    config={
        "CE_WEIGHT": 1.0,
        "ALPHA": 1.0,
        "BETA": 8.0,
        "EPSILON": 1.0,
        "T": 4.0,
        "TERM": "log",  # or plain, off
        "WARMUP": 20,
    },
)
class DGKD(Distiller):
    """DKD whose two terms are kept from pulling the logits the same way."""

    takes_standardized_logits = True
    teacher_logits_only = True

    def __init__(self, student: nn.Module, teacher: nn.Module, cfg: Any):
        super().__init__(student, teacher, cfg)
        node = cfg.DGKD
        self.ce_loss_weight = node.CE_WEIGHT
        self.warmup = node.WARMUP
        self.temperature = require_positive("DGKD.T", node.T)
        self.settings = {
            "alpha": node.ALPHA,
            "beta": node.BETA,
            "epsilon": node.EPSILON,
            "temperature": self.temperature,
            "term": require_one_of("DGKD.TERM", node.TERM, ("off", "plain", "log")),
        }

    def distill(self, student: Output, teacher: Output, target: Tensor, **batch: Any) -> Tensor:
        s_logits, t_logits, labels = gather_batch(student.logits, teacher.logits, target)
        self.metrics = gradient_metrics(s_logits, t_logits, labels, self.temperature)
        loss = dgkd_loss(s_logits, t_logits, labels, **self.settings)
        return warmup_factor(batch["epoch"], self.warmup) * loss
