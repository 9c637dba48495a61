"""SP. Tung, Mori: Similarity-Preserving Knowledge Distillation, ICCV 2019, arXiv 1907.09682.

With X [N, CHW] the flattened last map of a network and G the matrix X X^T with rows scaled to
length 1:

    loss = 1 / N^2 * sum_ij (G_student - G_teacher)_ij^2

The batch is that of all processes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from mdistiller.distillers._base import DISTILLERS, Distiller, Output
from mdistiller.distillers.helpers.losses.numerics import full_precision, gram, unit
from mdistiller.distillers.helpers.training.gather import gather_batch


def similarities(features: Tensor) -> Tensor:
    """Scalar products of samples [N, ...], rows scaled to length 1: [N, N]; 0 for zero samples."""
    return unit(gram(full_precision(features).flatten(1)))


def sp_loss(g_s: Sequence[Tensor], g_t: Sequence[Tensor]) -> Tensor:
    """Mean squared difference of the similarity matrices, summed over the given maps; a scalar.

    Args:
        g_s, g_t: equally many tensors [N, ...] of student and teacher.
    """
    pairs = zip(g_s, g_t, strict=True)
    losses = [F.mse_loss(similarities(s), similarities(t)) for s, t in pairs]
    return sum(losses[1:], losses[0])


@DISTILLERS.register("SP", config={"LOSS": {"CE_WEIGHT": 1.0, "FEAT_WEIGHT": 3000.0}})
class SP(Distiller):
    """Similarity preserving: samples that are alike for the teacher are so for the student."""

    needs_teacher_classifier = False
    needs_labels = False
    soft_labels = True
    relates_images = True

    def __init__(self, student: nn.Module, teacher: nn.Module, cfg: Any):
        super().__init__(student, teacher)
        self.ce_loss_weight = cfg.SP.LOSS.CE_WEIGHT
        self.feat_loss_weight = cfg.SP.LOSS.FEAT_WEIGHT

    def distill(self, student: Output, teacher: Output, target: Tensor, **batch: Any) -> Tensor:
        s_maps, t_maps = gather_batch(student["feats"][-1], teacher["feats"][-1])
        return self.feat_loss_weight * sp_loss([s_maps], [t_maps])
