"""AT. Zagoruyko, Komodakis: Paying More Attention to Attention, ICLR 2017, arXiv 1612.03928.

The attention map of a feature map F [C, H, W] is a(F) = v / |v| with v_hw = mean_c F_chw^p. With
the larger of two maps average-pooled to the size of the other:

    loss = sum over stages of the mean over n, h, w of (a(F_student) - a(F_teacher))^2

The power is taken as it is, without absolute values: an odd p lets signed maps (WRN, MobileNetV2)
cancel, and p must be whole for them.

AT.FORM mean is the form of the Knowledge-Distillation-Zoo: v_hw = sum_c |F_chw|^p, a(F) =
v / (|v| + 1e-6), and the mean over stages instead of the sum; its weight is 1000 as well.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mdistiller.distillers._base import DISTILLERS, Distiller, Output
from mdistiller.distillers.helpers.features.stages import (
    FORMS,
    match_size,
    paired_stages,
    reduce_stages,
)
from mdistiller.distillers.helpers.losses.numerics import full_precision, unit
from mdistiller.distillers.helpers.training.settings import require_one_of, require_positive


def attention(feature: Tensor, p: float) -> Tensor:
    """Attention map of a feature map [N, C, H, W]: [N, HW], rows of length 1 (0 for zero maps)."""
    powers = feature.square() if p == 2 else feature.pow(p)
    return unit(powers.mean(dim=1).flatten(1))


def absolute_attention(feature: Tensor, p: float) -> Tensor:
    """The Zoo's attention map of [N, C, H, W]: [N, HW], rows a little shorter than 1."""
    powers = feature.square() if p == 2 else feature.abs().pow(p)
    rows = powers.sum(dim=1).flatten(1)
    return rows / (torch.linalg.vector_norm(rows, dim=1, keepdim=True) + 1e-6)


def at_loss(g_s: Sequence[Tensor], g_t: Sequence[Tensor], p: float, form: str = "sum") -> Tensor:
    """Attention transfer over stages, a scalar.

    Args:
        g_s, g_t: equally many maps [N, C, H, W] of student and teacher; within a pair C, H and W
            may differ.
        p: power of the attention map.
        form: "sum" or "mean"; see above.

    Raises:
        UserError: there is no such form.
    """
    pairs = zip(full_precision(g_s), full_precision(g_t), strict=True)
    maps = (match_size(student, teacher) for student, teacher in pairs)
    attend = attention if form == "sum" else absolute_attention
    losses = [F.mse_loss(attend(s, p), attend(t, p)) for s, t in maps]
    return reduce_stages(losses, form)


@DISTILLERS.register(
    "AT",
    config={
        "FORM": "sum",  # or mean
        "P": 2,
        "LOSS": {"CE_WEIGHT": 1.0, "FEAT_WEIGHT": 1000.0},
    },
)
class AT(Distiller):
    """Attention transfer: where the student's maps are strong, the teacher's are."""

    needs_teacher_classifier = False
    needs_labels = False
    soft_labels = True

    def __init__(self, student: nn.Module, teacher: nn.Module, cfg: Any):
        super().__init__(student, teacher)
        self.p = require_positive("AT.P", cfg.AT.P)
        self.form = require_one_of("AT.FORM", cfg.AT.FORM, FORMS)
        self.ce_loss_weight = cfg.AT.LOSS.CE_WEIGHT
        self.feat_loss_weight = cfg.AT.LOSS.FEAT_WEIGHT

    def distill(self, student: Output, teacher: Output, target: Tensor, **batch: Any) -> Tensor:
        maps = paired_stages(student, teacher)
        return self.feat_loss_weight * at_loss(*maps, self.p, self.form)
