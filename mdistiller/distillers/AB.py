"""AB. Heo, Lee, Yun, Choi: Knowledge Transfer via Distillation of Activation Boundaries Formed by
Hidden Neurons, AAAI 2019, arXiv 1811.03233.

A neuron's boundary is where its pre-activation changes sign. With the student's maps S (after a
connector: convolution and batch norm), the teacher's T, both before the last ReLU of a stage, and a
margin m:

    d = max(0, m - S)^2 where T > 0, max(0, m + S)^2 elsewhere
    loss = sum over stages i = 1..n of 2^(i - n) * 3 / (1000 N) * sum(d)

Two stages, as published: connectors and the student's stages are trained on this loss alone
(AB.INIT.EPOCHS), then the student on cross-entropy. One stage: INIT.EPOCHS 0 and a LOSS.FEAT_WEIGHT
above 0.

FORM sum with MARGIN 1, above, 30 epochs at the run's own rate is RepDistiller (its weight 1 has no
effect). The Knowledge-Distillation-Zoo is FORM mean, the mean over elements and stages, with MARGIN
2, INIT.WEIGHT 10 and 50 epochs at a tenth of the run's rate, LR_DECAY_STAGES [30, 40]; unlike
there, the classifier has no weight decay in the first stage, and momentum restarts in the second.

Stages of equal shape need no connector. Where a student's map can be neither halved, doubled nor
cut to the teacher's size, the teacher's is average-pooled. A network without pre-activations
(MobileNetV2) gives `feats`, which are linear there.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from mdistiller.distillers._base import DISTILLERS, Distiller, Output
from mdistiller.distillers.helpers.features.connectors import ConvReg, pool_to
from mdistiller.distillers.helpers.features.shapes import Size, probe
from mdistiller.distillers.helpers.features.stages import FORMS, pair_stages, reduce_stages
from mdistiller.distillers.helpers.losses.numerics import full_precision
from mdistiller.distillers.helpers.training.init_stage import (
    INIT,
    InitPlan,
    require_transfer,
    stage_modules,
)
from mdistiller.distillers.helpers.training.settings import require_one_of, require_positive


def boundary_error(student: Tensor, teacher: Tensor, margin: float) -> Tensor:
    """d of every element; `teacher` is averaged to the size of `student` where that differs."""
    teacher = pool_to(teacher, student)
    side = (teacher > 0).to(student.dtype) * 2 - 1
    return (margin - side * student).relu().square()


def ab_loss(
    g_s: Sequence[Tensor], g_t: Sequence[Tensor], margin: float = 1.0, form: str = "sum"
) -> Tensor:
    """Activation boundaries over stages, a scalar.

    Args:
        g_s, g_t: equally many pre-activations [N, C, H, W] of student and teacher, from shallow to
            deep; C agrees within a pair.
        margin: how far beyond the boundary a neuron must be.
        form: "sum" or "mean"; see above.
    """
    pairs = zip(full_precision(g_s), full_precision(g_t), strict=True)
    errors = [boundary_error(student, teacher, margin) for student, teacher in pairs]
    if form == "mean":
        losses = [error.mean() for error in errors]
    else:
        weights = [0.003 * 0.5 ** (len(errors) - 1 - i) for i in range(len(errors))]
        losses = [w * e.sum() / len(e) for w, e in zip(weights, errors, strict=True)]
    return reduce_stages(losses, form)


@DISTILLERS.register(
    "AB",
    config={
        "FORM": "sum",  # or mean
        "MARGIN": 1.0,
        "INIT": {**INIT, "WEIGHT": 1.0},
        "LOSS": {"CE_WEIGHT": 1.0, "FEAT_WEIGHT": 0.0},  # FEAT_WEIGHT of the main stage
    },
)
class AB(Distiller):
    """Activation boundaries: hidden neurons are active where the teacher's are."""

    needs_teacher_classifier = False
    soft_labels = True

    def __init__(self, student: nn.Module, teacher: nn.Module, cfg: Any, image_size: Size = None):
        super().__init__(student, teacher)
        self.ce_loss_weight = cfg.AB.LOSS.CE_WEIGHT
        self.feat_loss_weight = cfg.AB.LOSS.FEAT_WEIGHT
        self.distills = self.feat_loss_weight != 0
        self.form = require_one_of("AB.FORM", cfg.AB.FORM, FORMS)
        self.margin = require_positive("AB.MARGIN", cfg.AB.MARGIN)
        self.init, self.init_weight = InitPlan.read("AB", cfg), cfg.AB.INIT.WEIGHT
        require_transfer("AB", self.init, self.feat_loss_weight)
        shapes = [probe(net, image_size) for net in (student, teacher)]
        self.keys = ["preact_feats" if "preact_feats" in s else "feats" for s in shapes]
        s_maps, t_maps = (s[key][1:] for s, key in zip(shapes, self.keys, strict=True))
        self.pairs = pair_stages([shape[2] for shape in s_maps], [shape[2] for shape in t_maps])
        self.connectors = nn.ModuleList(
            nn.Identity()
            if s_maps[i][1:] == t_maps[j][1:]
            else ConvReg(s_maps[i], t_maps[j], use_relu=False)
            for i, j in self.pairs
        )
        self.connectors.requires_grad_(self.distills)  # else only the first stage trains them
        self.trained_first = stage_modules(student, self.pairs[-1][0] + 1, image_size)

    def init_modules(self) -> list[nn.Module]:
        return [*self.trained_first, self.connectors]

    def init_loss(self, student: Output, teacher: Output, target: Tensor, **batch: Any) -> Tensor:
        return self.init_weight * self._loss(student, teacher)

    def distill(self, student: Output, teacher: Output, target: Tensor, **batch: Any) -> Tensor:
        return self.feat_loss_weight * self._loss(student, teacher)

    def _loss(self, student: Output, teacher: Output) -> Tensor:
        s_maps, t_maps = student[self.keys[0]][1:], teacher[self.keys[1]][1:]
        connected = [
            connect(s_maps[i]) for (i, _), connect in zip(self.pairs, self.connectors, strict=True)
        ]
        return ab_loss(connected, [t_maps[j] for _, j in self.pairs], self.margin, self.form)
