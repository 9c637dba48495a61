"""USKD. Yang, Zeng, Li, Zhang, Yuan, Li: From Knowledge Distillation to Self-Knowledge
Distillation: A Unified Approach with Normalized Loss and Customized Soft Labels, ICCV 2023,
arXiv 2303.13005.

Self-distillation: no teacher. With S = softmax(z) of the student, t the target class, W the softmax
of a linear head on the pooled output of the last stage but one, and r the softmax over the classes
j != t:

    target = -1/N * sum_n P_n log S_nt,   P_n = S_nt^2 + 1 - mean over the batch of S_t^2
    others = -1/N * sum_n sum_{j != t} zeta_j log r_j
    weak   = -1/N * sum_n sum_c y'_c log W_c,   y' = 0.9 onehot(t) + 0.1 / C
    loss   = ALPHA * target + BETA * others + MU * weak

zeta_j is 1 / rank of class j, scaled to sum 1 without the target, which takes part in the ranking;
rank 1 has the largest score R_j = W_j / (1 - W_t + 1e-6) + X_j / (1 - X_t + 1e-6). P and zeta carry
no gradient. Paper and code differ over X: RANK "log" (the default, as the authors' code) takes the
student's log-probabilities, "prob" its probabilities, as published.

Mixed labels ([N, C] probabilities) count with their two largest classes: P_k = S_k^2 + y_k - mean
for each, and both are left out of the others. The batch is that of all processes; the authors' code
takes the mean over each process's own. Defaults are those on CIFAR-100; on ImageNet ALPHA, BETA, MU
are 1, 0.1, 0.005.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mdistiller.distillers._base import DISTILLERS, Distiller, Losses
from mdistiller.distillers.helpers.features.shapes import Size, probe
from mdistiller.distillers.helpers.losses.decoupled import labelled_mean
from mdistiller.distillers.helpers.losses.numerics import IGNORE_INDEX, scale_logits
from mdistiller.distillers.helpers.training.gather import gather_batch
from mdistiller.distillers.helpers.training.settings import require_one_of


def label_weights(target: Tensor, classes: int) -> Tensor:
    """How much each class is a target [N, C]: the two largest of soft labels, 1 for a class index.

    Rows of unlabelled samples are 0.
    """
    if target.is_floating_point():
        values, index = target.topk(2, dim=1)
        return torch.zeros_like(target).scatter(1, index, values)
    labelled = target != IGNORE_INDEX
    return F.one_hot(target.masked_fill(~labelled, 0), classes) * labelled[:, None]


def rank_weights(score: Tensor, is_target: Tensor) -> Tensor:
    """zeta [N, C]: 1 / rank by descending score, 0 for targets, the others scaled to sum 1."""
    rank = 1 + score.argsort(dim=1, descending=True, stable=True).argsort(dim=1)
    weights = (1 / rank.to(score.dtype)).masked_fill(is_target, 0.0)
    return weights / weights.sum(dim=1, keepdim=True)


def uskd_terms(
    logits: Tensor, weak_logits: Tensor, target: Tensor, rank: str = "log"
) -> tuple[Tensor, Tensor, Tensor]:
    """The terms `target`, `others` and `weak`, scalars without their weights.

    Args:
        logits, weak_logits: [N, C] of the student and of its weak head, C >= 2; with mixed labels
            C >= 3.
        target: [N] class indices, or [N, C] probabilities; rows with IGNORE_INDEX do not count.
        rank: "log" or "prob", what of the student the ranking takes.
    """
    log_s, log_w = (F.log_softmax(scale_logits(z, 1.0), dim=1) for z in (logits, weak_logits))
    labels = label_weights(target, logits.shape[1]).to(log_s.dtype)
    is_target = labels > 0
    labelled = is_target.any(dim=1)
    with torch.no_grad():
        soft_target = labels + _above_average(log_s.exp().square(), labels)
        shares = log_w.exp(), (log_s if rank == "log" else log_s.exp())
        score = torch.stack([x / (1 - (x * is_target).sum(1, True) + 1e-6) for x in shares]).sum(0)
        zeta = rank_weights(score, is_target)
    smooth = 0.9 * (target if target.is_floating_point() else labels) + 0.1 / logits.shape[1]
    log_r = F.log_softmax(scale_logits(logits, 1.0).masked_fill(is_target, -math.inf), dim=1)
    log_r = log_r.masked_fill(is_target, 0.0)
    target_term, other_term, weak_term = (
        -labelled_mean((weights * logs).sum(dim=1), labelled)
        for weights, logs in ((soft_target, log_s), (zeta, log_r), (smooth, log_w))
    )
    return target_term, other_term, weak_term


def _above_average(squares: Tensor, labels: Tensor) -> Tensor:
    """S_k^2 minus its batch mean for the targets k [N, C], 0 elsewhere.

    The mean is over samples' first targets for first ones, and over second for second ones.
    """
    values, index = labels.topk(min(2, labels.shape[1]), dim=1)
    present = values > 0
    target_squares = squares.gather(1, index) * present
    mean = target_squares.sum(dim=0) / present.sum(dim=0).clamp(min=1)
    return torch.zeros_like(squares).scatter(1, index, (target_squares - mean) * present)


@DISTILLERS.register(
    "USKD",
    config={
        "ALPHA": 0.1,
        "BETA": 0.1,
        "MU": 0.1,
        "RANK": "log",  # or prob
        "LOSS": {"CE_WEIGHT": 1.0},
    },
)
class USKD(Distiller):
    """Soft labels from the student's own confidence and from a weak head's ranking of the classes.

    The unweighted terms are kept as metrics `target`, `others` and `weak`.
    """

    soft_labels = True
    uses_hard_label_loss = True
    uses_teacher = False

    def __init__(
        self, student: nn.Module, teacher: nn.Module | None, cfg: Any, image_size: Size = None
    ):
        super().__init__(student, None)
        node = cfg.USKD
        self.ce_loss_weight = node.LOSS.CE_WEIGHT
        self.weights = {"target": node.ALPHA, "others": node.BETA, "weak": node.MU}
        self.rank = require_one_of("USKD.RANK", node.RANK, ("log", "prob"))
        shapes = probe(student, image_size)
        self.head = nn.Linear(shapes["feats"][-2][1], shapes["logits"][1])

    def forward_train(self, image: Tensor, target: Tensor, **batch: Any) -> tuple[Tensor, Losses]:
        student = self.run_student(image)
        with torch.autocast(image.device.type, enabled=False):
            weak = self.head(student["feats"][-2].flatten(2).mean(dim=2))
            logits, weak, labels = gather_batch(student.logits, weak, target)
            values = uskd_terms(logits, weak, labels, self.rank)
            terms = dict(zip(self.weights, values, strict=True))
            self.metrics = {name: term.detach() for name, term in terms.items()}
            weighted = [weight * terms[name] for name, weight in self.weights.items()]
            losses = {
                "loss_ce": self.ce_loss_weight * self.hard_label_loss(student.logits, target),
                "loss_kd": torch.stack(weighted).sum(),
            }
        return student.logits, losses
