"""LDRLD. Xu et al.: Local Dense Logit Relations for Enhanced Knowledge Distillation, ICCV 2025,
arXiv 2507.15911.

The student's k = TOPK largest logits, the first of rank 1, are compared in pairs and as a set, the
other classes among themselves. KL_S is the divergence of the two softmaxes at temperature T over
the classes of S alone:

    local = sum_{i<j<=k} w_ij KL_{i,j} + KL_{1..k},  w_ij = 2 exp(-0.05 (i + j)) / (1.5 + |i - j|)
    loss  = R (CE + ALPHA T^2 local / (k (k - 1) / 2 + 1) + BETA T^2 KL_rest),  means over samples

A softmax over two classes is a logistic function of the difference of their logits, so the k x k
matrix of differences has both probabilities of every pair: there is no loop over pairs. With k
classes or fewer KL_rest is 0.

R, ALPHA, BETA and T are the authors' for resnet32x4 -> resnet8x4. Their k is an unpublished option
of a script; 5 is our choice.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mdistiller.distillers._base import DISTILLERS, Distiller, Output
from mdistiller.distillers.helpers.losses.decoupled import rest_log_probs
from mdistiller.distillers.helpers.losses.numerics import divergence, scale_logits
from mdistiller.distillers.helpers.training.settings import require_positive
from mdistiller.registry import UserError


def ldrld_terms(
    logits_student: Tensor, logits_teacher: Tensor, topk: int, temperature: float
) -> tuple[Tensor, Tensor]:
    """The local relations' term and that of the other classes, with T², two scalars.

    Args:
        logits_student, logits_teacher: [N, C].
        topk: k >= 2; all classes where there are fewer.
        temperature: T > 0.
    """
    student, teacher = (scale_logits(z, temperature) for z in (logits_student, logits_teacher))
    top = student.detach().topk(min(topk, student.shape[1]), dim=1).indices
    scale = temperature**2 / len(student)
    local = _local(student.gather(1, top), teacher.gather(1, top)) * scale
    if top.shape[1] == student.shape[1]:
        return local, torch.zeros_like(local)
    log_p, log_q = (rest_log_probs(z, top)[1] for z in (student, teacher))
    return local, divergence(log_q, log_p, dim=None) * scale


def _local(student: Tensor, teacher: Tensor) -> Tensor:
    """Of logits [N, k] by rank: the weighted mean over pairs and the set, summed over samples."""
    weights = _pair_weights(student.shape[1], student.device, student.dtype)
    log_p, log_q = (F.logsigmoid(z[:, :, None] - z[:, None]) for z in (student, teacher))
    pairs = (log_q.exp() * (log_q - log_p) * weights).sum()
    whole = divergence(F.log_softmax(teacher, 1), F.log_softmax(student, 1), dim=None)
    return (pairs + whole) / (student.shape[1] * (student.shape[1] - 1) / 2 + 1)


@lru_cache(maxsize=8)
def _pair_weights(count: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    """w_ij of ranks 1 .. count, [count, count], 0 on the diagonal."""
    ranks = torch.arange(1, count + 1, dtype=torch.float64)
    total, gap = ranks[:, None] + ranks, (ranks[:, None] - ranks).abs()
    weights = 2 * torch.exp(-0.05 * total) / (1.5 + gap)
    return weights.fill_diagonal_(0).to(device, dtype)


@DISTILLERS.register("LDRLD", config={"R": 1.0, "ALPHA": 10.5, "BETA": 7.0, "T": 4.0, "TOPK": 5})
class LDRLD(Distiller):
    """The student's leading classes in pairs and as a set, and the others among themselves.

    The unweighted terms are kept as metrics `local` and `rest`.
    """

    takes_standardized_logits = True
    teacher_logits_only = True
    soft_labels = True

    def __init__(self, student: nn.Module, teacher: nn.Module, cfg: Any):
        super().__init__(student, teacher, cfg)
        node = cfg.LDRLD
        self.ce_loss_weight = node.R
        self.alpha, self.beta = node.R * node.ALPHA, node.R * node.BETA
        self.temperature = require_positive("LDRLD.T", node.T)
        if node.TOPK < 2:
            raise UserError(f"LDRLD.TOPK must be at least 2, got {node.TOPK}")
        self.topk = node.TOPK

    def distill(self, student: Output, teacher: Output, target: Tensor, **batch: Any) -> Tensor:
        local, rest = ldrld_terms(student.logits, teacher.logits, self.topk, self.temperature)
        self.metrics = {"local": local.detach(), "rest": rest.detach()}
        return self.alpha * local + self.beta * rest
