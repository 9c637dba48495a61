"""CRLD. Zhang, Liu, Cai, Ma: Cross-View Consistency Regularisation for Knowledge Distillation,
ACM MM 2024, arXiv 2412.16493.

Student and teacher see a weakly and a strongly augmented view of each image, w and s. With v_i the
teacher's logits on view i, z_j the student's on view j, KD_ij = T^2 KL(softmax(v_i / T) ||
softmax(z_j / T)) of a sample, and m_i = 1 where the teacher's highest probability on view i at
temperature 1 is at least TAU_W (or TAU_S), else 0:

    within = 1 / N * sum_n m_w (KD_ww + KD_ss)
    cross  = 1 / N * sum_n m_s (KD_ws + KD_sw)
    loss   = CE_WEIGHT * (CE(z_w) + CE(z_s)) + WV_WEIGHT * within + CV_WEIGHT * cross

The means are over all samples of the batch. The student runs once for each view, so batch norm sees
them apart. The strong view is MLKD's: another crop and mirror, two random operations, and a square
of up to half the side cut out. Under LSKD, the divergences take standardised logits, m plain ones.

The trainer `deepkd` splits each KD_ij by the target class (`helpers/losses/split.py`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mdistiller.distillers._base import DISTILLERS, Distiller, Losses
from mdistiller.distillers.helpers.losses.numerics import scale_logits, weighted_divergence
from mdistiller.distillers.helpers.losses.split import Split, split_rows
from mdistiller.distillers.helpers.training.settings import require_positive

Pair = tuple[Tensor, Tensor]


def confident(logits_teacher: Tensor, threshold: float) -> Tensor:
    """m: 1 where the highest probability of logits [N, C] is at least `threshold`, else 0; [N]."""
    highest = scale_logits(logits_teacher, 1.0).softmax(dim=1).amax(dim=1)
    return (highest >= threshold).to(highest.dtype)


def crld_terms(
    weak: Pair,
    strong: Pair,
    temperature: float,
    thresholds: tuple[float, float],
    standardize: Callable[[Tensor], Tensor] = lambda logits: logits,
) -> Losses:
    """within and cross as above, unweighted scalars.

    Args:
        weak, strong: logits of student and teacher on a view, [N, C] each.
        temperature: T > 0.
        thresholds: TAU_W and TAU_S.
        standardize: what the divergences do with logits [N, C] first.
    """
    (z_w, v_w), (z_s, v_s) = (
        [F.log_softmax(scale_logits(standardize(logits), temperature), dim=1) for logits in view]
        for view in (weak, strong)
    )
    scale = temperature**2 / len(z_w)
    in_weak, in_strong = (
        confident(view[1], threshold) * scale
        for view, threshold in zip((weak, strong), thresholds, strict=True)
    )
    return {
        "within": weighted_divergence(v_w, z_w, in_weak) + weighted_divergence(v_s, z_s, in_weak),
        "cross": weighted_divergence(v_w, z_s, in_strong)
        + weighted_divergence(v_s, z_w, in_strong),
    }


def split_crld_terms(
    weak: Pair,
    strong: Pair,
    target: Tensor,
    temperature: float,
    thresholds: tuple[float, float],
    weights: tuple[float, float],
    split: Split,
    epoch: int,
    standardize: Callable[[Tensor], Tensor] = lambda logits: logits,
) -> tuple[Tensor, Tensor]:
    """The weighted sum of within and cross as two scalars, of the target class and of the others.

    Args: as of :func:`crld_terms`, and
        target: [N] class indices; the terms of samples without a label are 0.
        weights: WV_WEIGHT and CV_WEIGHT.
    """
    views = [tuple(standardize(logits) for logits in view) for view in (weak, strong)]
    within, cross = weights
    masks = [confident(view[1], t) for view, t in zip((weak, strong), thresholds, strict=True)]
    totals = [weak[0].new_zeros(()), weak[0].new_zeros(())]
    for teacher, student in ((0, 0), (1, 1), (0, 1), (1, 0)):
        mask = within * masks[0] if teacher == student else cross * masks[1]
        rows = split_rows(views[student][0], views[teacher][1], target, temperature, split, epoch)
        totals = [
            total + torch.dot(part, mask) / len(mask)
            for total, part in zip(totals, rows, strict=True)
        ]
    return totals[0], totals[1]


@DISTILLERS.register(
    "CRLD",
    config={
        "CE_WEIGHT": 1.0,
        "WV_WEIGHT": 2.0,
        "CV_WEIGHT": 0.5,
        "T": 4.0,
        "TAU_W": 0.9,
        "TAU_S": 0.2,
    },
)
class CRLD(Distiller):
    """Two views of an image, each taught by the teacher's confident predictions on both.

    The unweighted terms are kept as metrics.
    """

    takes_standardized_logits = True
    uses_hard_label_loss = True

    def __init__(self, student: nn.Module, teacher: nn.Module, cfg: Any):
        super().__init__(student, teacher, cfg)
        node = cfg.CRLD
        self.ce_loss_weight = node.CE_WEIGHT
        self.weights = node.WV_WEIGHT, node.CV_WEIGHT
        self.temperature = require_positive("CRLD.T", node.T)
        self.thresholds = node.TAU_W, node.TAU_S

    @classmethod
    def can_split(cls) -> bool:
        """Whether the loss can be split by the target class."""
        return cls.forward_train is CRLD.forward_train

    def forward_train(  # type: ignore[override]
        self, image_weak: Tensor, image_strong: Tensor, target: Tensor, **batch: Any
    ) -> tuple[Tensor, Losses]:
        """Logits of the weak view, and the loss terms."""
        z_w, z_s = (self.run_student(image).logits for image in (image_weak, image_strong))
        v_w, v_s = (self.run_teacher(image).logits for image in (image_weak, image_strong))
        with torch.autocast(target.device.type, enabled=False):
            loss_ce = self.ce_loss_weight * (
                self.hard_label_loss(z_w, target) + self.hard_label_loss(z_s, target)
            )
            views, settings = ((z_w, v_w), (z_s, v_s)), (self.temperature, self.thresholds)
            if self.split is not None:
                tckd, nckd = split_crld_terms(
                    *views,
                    target,
                    *settings,
                    self.weights,
                    self.split,
                    batch["epoch"],
                    self.standardize,
                )
                return z_w, {"loss_ce": loss_ce, "loss_tckd": tckd, "loss_nckd": nckd}
            terms = crld_terms(*views, *settings, self.standardize)
            self.metrics = {name: term.detach() for name, term in terms.items()}
            within, cross = self.weights
            loss_kd = within * terms["within"] + cross * terms["cross"]
            return z_w, {"loss_ce": loss_ce, "loss_kd": loss_kd}
