"""AT. Zagoruyko, Komodakis: Paying More Attention to Attention, ICLR 2017, arXiv 1612.03928.

The attention map of a feature map F [C, H, W] is a(F) = v / |v| with v_hw = mean_c F_chw^p. With
the larger of two maps average-pooled to the size of the other:

    loss = sum over stages of the mean over n, h, w of (a(F_student) - a(F_teacher))^2

The power is taken as it is, without absolute values: an odd p lets signed maps (WRN, MobileNetV2)
cancel, and p must be whole for them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from mdistiller.distillers._base import DISTILLERS, Distiller, Output
from mdistiller.distillers._common import full_precision, require_positive, unit
from mdistiller.distillers._stages import match_size, paired_stages


def attention(feature: Tensor, p: float) -> Tensor:
    """Attention map of a feature map [N, C, H, W]: [N, HW], rows of length 1 (0 for zero maps)."""
    powers = feature.square() if p == 2 else feature.pow(p)
    return unit(powers.mean(dim=1).flatten(1))


def at_loss(g_s: Sequence[Tensor], g_t: Sequence[Tensor], p: float) -> Tensor:
    """Attention transfer summed over stages, a scalar.

    Args:
        g_s, g_t: equally many maps [N, C, H, W] of student and teacher; within a pair C, H and W
            may differ.
        p: power of the attention map.
    """
    pairs = zip(full_precision(g_s), full_precision(g_t), strict=True)
    maps = (match_size(student, teacher) for student, teacher in pairs)
    losses = [F.mse_loss(attention(s, p), attention(t, p)) for s, t in maps]
    return sum(losses[1:], losses[0])


@DISTILLERS.register("AT", config={"P": 2, "LOSS": {"CE_WEIGHT": 1.0, "FEAT_WEIGHT": 1000.0}})
class AT(Distiller):
    """Attention transfer: where the student's maps are strong, the teacher's are."""

    soft_labels = True

    def __init__(self, student: nn.Module, teacher: nn.Module, cfg: Any):
        super().__init__(student, teacher)
        self.p = require_positive("AT.P", cfg.AT.P)
        self.ce_loss_weight = cfg.AT.LOSS.CE_WEIGHT
        self.feat_loss_weight = cfg.AT.LOSS.FEAT_WEIGHT

    def distill(self, student: Output, teacher: Output, target: Tensor, **batch: Any) -> Tensor:
        return self.feat_loss_weight * at_loss(*paired_stages(student, teacher), self.p)
