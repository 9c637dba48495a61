"""VID. Ahn, Hu, Damianou, Lawrence, Dai: Variational Information Distillation for Knowledge
Transfer, CVPR 2019, arXiv 1904.05835.

A Gaussian with mean mu(F_student) (three 1x1 convolutions) and one variance per channel predicts
the teacher's map; its negative log-likelihood, without constants, is summed over stages:

    variance = softplus(rho) + EPS
    loss = sum over stages of mean(1/2 * ((mu(F_student) - F_teacher)^2 / variance + log variance))

The scales rho are trained, as in the paper. The original library left them at their start, which
makes the loss a weighted mean squared error. Trained, the loss can be negative.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mdistiller.distillers._base import DISTILLERS, Distiller, Output
from mdistiller.distillers.helpers.features.connectors import pool_to
from mdistiller.distillers.helpers.features.shapes import Size, get_feat_shapes, require_maps
from mdistiller.distillers.helpers.features.stages import pair_stages
from mdistiller.distillers.helpers.losses.numerics import full_precision
from mdistiller.distillers.helpers.training.settings import probe_size, require_positive
from mdistiller.registry import UserError

DEFAULTS: dict[str, Any] = {
    "LOSS": {"CE_WEIGHT": 1.0, "FEAT_WEIGHT": 1.0},
    "EPS": 1e-5,
    "INIT_PRED_VAR": 5.0,
    "INPUT_SIZE": (32, 32),
}


def vid_loss(
    regressor: nn.Module, student: Tensor, teacher: Tensor, log_scale: Tensor, eps: float
) -> Tensor:
    """Negative log-likelihood of a teacher's map under the student's prediction, a scalar.

    Args:
        regressor: maps [N, C_student, H, W] to [N, C_teacher, H, W].
        student, teacher: feature maps; the larger one is averaged to the smaller one's height.
        log_scale: rho [C_teacher]; the variance is softplus(rho) + eps.
    """
    student, teacher = full_precision(student), full_precision(teacher)
    if student.shape[2] > teacher.shape[2]:
        student = pool_to(student, teacher)
    else:
        teacher = pool_to(teacher, student)
    variance = (F.softplus(log_scale) + eps)[:, None, None]
    error = (regressor(student) - teacher).square()
    return 0.5 * (error / variance + variance.log()).mean()


def make_regressor(in_channels: int, out_channels: int) -> nn.Sequential:
    """Three 1x1 convolutions without bias, ReLUs between."""
    return nn.Sequential(
        nn.Conv2d(in_channels, out_channels, 1, bias=False),
        nn.ReLU(),
        nn.Conv2d(out_channels, out_channels, 1, bias=False),
        nn.ReLU(),
        nn.Conv2d(out_channels, out_channels, 1, bias=False),
    )


@DISTILLERS.register("VID", config=DEFAULTS)
class VID(Distiller):
    """Variational information: student stages predict teacher stages with a learned variance."""

    needs_teacher_classifier = False
    needs_labels = False
    soft_labels = True

    def __init__(self, student: nn.Module, teacher: nn.Module, cfg: Any, image_size: Size = None):
        super().__init__(student, teacher)
        self.ce_loss_weight = cfg.VID.LOSS.CE_WEIGHT
        self.feat_loss_weight = cfg.VID.LOSS.FEAT_WEIGHT
        self.eps = require_positive("VID.EPS", cfg.VID.EPS)
        excess = cfg.VID.INIT_PRED_VAR - self.eps
        if not excess > 0:
            raise UserError(f"VID.INIT_PRED_VAR must be above VID.EPS, got {cfg.VID.INIT_PRED_VAR}")
        start = excess + math.log(-math.expm1(-excess))  # softplus(start) = excess
        size = probe_size("VID", cfg, DEFAULTS["INPUT_SIZE"], image_size)
        s_maps, t_maps = (maps[1:] for maps in get_feat_shapes(student, teacher, size))
        require_maps("feats", [*s_maps, *t_maps])
        heights = ([shape[2] for shape in maps] for maps in (s_maps, t_maps))
        self.pairs = pair_stages(*heights)
        widths = [(s_maps[i][1], t_maps[j][1]) for i, j in self.pairs]
        self.regressors = nn.ModuleList(make_regressor(s, t) for s, t in widths)
        self.log_scales = nn.ParameterList(torch.full((t,), start) for _, t in widths)

    def distill(self, student: Output, teacher: Output, target: Tensor, **batch: Any) -> Tensor:
        s_maps, t_maps = student["feats"][1:], teacher["feats"][1:]
        terms = [
            vid_loss(regressor, s_maps[i], t_maps[j], log_scale, self.eps)
            for (i, j), regressor, log_scale in zip(
                self.pairs, self.regressors, self.log_scales, strict=True
            )
        ]
        return self.feat_loss_weight * torch.stack(terms).sum()
