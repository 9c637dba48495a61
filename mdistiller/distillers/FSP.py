"""FSP. Yim, Joo, Bae, Kim: A Gift from Knowledge Distillation: Fast Optimization, Network
Minimization and Transfer Learning, CVPR 2017.

What a layer does is described by the products of its input's and output's channels, the flow of
solution procedure. With consecutive maps A, B of a network (the stem's, then every stage's), the
larger average-pooled to the size of the other:

    M[a, b] = 1/HW sum_hw A_ahw B_bhw
    loss = sum over pairs of mean((M_student - M_teacher)^2)

Two stages, as published: the student's stem and stages are trained on this loss alone
(FSP.INIT.EPOCHS), then the whole student on cross-entropy. One stage: INIT.EPOCHS 0 and a
LOSS.FEAT_WEIGHT above 0. M has the networks' channels for its sides, so these must agree.

FORM sum, 30 epochs at the run's own rate is RepDistiller (its weight 50 has no effect). The
Knowledge-Distillation-Zoo is FORM mean over pairs, 50 epochs at a tenth of the run's rate with
LR_DECAY_STAGES [30, 40]; unlike there, the classifier has no weight decay in the first stage,
and momentum restarts in the second.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from mdistiller.distillers._base import DISTILLERS, Distiller, Output
from mdistiller.distillers.helpers.features.shapes import Size, get_feat_shapes
from mdistiller.distillers.helpers.features.stages import FORMS, match_size, reduce_stages
from mdistiller.distillers.helpers.losses.numerics import full_precision
from mdistiller.distillers.helpers.training.init_stage import (
    INIT,
    InitPlan,
    require_transfer,
    stage_modules,
)
from mdistiller.distillers.helpers.training.settings import require_one_of
from mdistiller.registry import UserError


def flow(first: Tensor, second: Tensor) -> Tensor:
    """FSP matrices [N, A, B] of maps [N, A, H, W] and [N, B, H', W']."""
    first, second = (x.flatten(2) for x in match_size(first, second))
    return first @ second.mT / first.shape[2]


def fsp_loss(g_s: Sequence[Tensor], g_t: Sequence[Tensor], form: str = "sum") -> Tensor:
    """Squared difference of the FSP matrices of consecutive maps, a scalar.

    Args:
        g_s, g_t: equally many maps [N, C, H, W] of student and teacher, at least two; C agrees
            within a pair, H and W may differ.
        form: "sum" or "mean" over the pairs of consecutive maps.
    """
    student, teacher = (pairwise(full_precision(maps)) for maps in (g_s, g_t))
    losses = [F.mse_loss(flow(*s), flow(*t)) for s, t in zip(student, teacher, strict=True)]
    return reduce_stages(losses, form)


@DISTILLERS.register(
    "FSP",
    config={
        "FORM": "sum",  # or mean
        "INIT": {**INIT, "WEIGHT": 1.0},
        "LOSS": {"CE_WEIGHT": 1.0, "FEAT_WEIGHT": 0.0},  # FEAT_WEIGHT of the main stage
    },
)
class FSP(Distiller):
    """Flow of solution procedure: layers relate their inputs and outputs as the teacher's do."""

    needs_teacher_classifier = False
    soft_labels = True

    def __init__(self, student: nn.Module, teacher: nn.Module, cfg: Any, image_size: Size = None):
        super().__init__(student, teacher)
        self.ce_loss_weight = cfg.FSP.LOSS.CE_WEIGHT
        self.feat_loss_weight = cfg.FSP.LOSS.FEAT_WEIGHT
        self.distills = self.feat_loss_weight != 0
        self.form = require_one_of("FSP.FORM", cfg.FSP.FORM, FORMS)
        self.init, self.init_weight = InitPlan.read("FSP", cfg), cfg.FSP.INIT.WEIGHT
        require_transfer("FSP", self.init, self.feat_loss_weight)
        shapes = get_feat_shapes(student, teacher, image_size or (32, 32))
        s_widths, t_widths = ([shape[1] for shape in maps] for maps in shapes)
        if s_widths != t_widths or len(s_widths) < 2:
            raise UserError(
                "FSP compares products of channels, so stem and stages of both networks must have "
                f"equal widths; the student has {s_widths}, the teacher {t_widths}"
            )
        self.trained_first = stage_modules(student, -1, image_size)

    def init_modules(self) -> list[nn.Module]:
        return self.trained_first

    def init_loss(self, student: Output, teacher: Output, target: Tensor, **batch: Any) -> Tensor:
        return self.init_weight * fsp_loss(student["feats"], teacher["feats"], self.form)

    def distill(self, student: Output, teacher: Output, target: Tensor, **batch: Any) -> Tensor:
        return self.feat_loss_weight * fsp_loss(student["feats"], teacher["feats"], self.form)
