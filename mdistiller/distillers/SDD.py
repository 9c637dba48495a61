"""SDD. Luo: Scale Decoupled Distillation, CVPR 2024, arXiv 2403.13512.

A logit loss is evaluated on regions of the image. For every m in SCALES the last map of either
network is cut into m x m cells, and the network's own classifier is applied to the average of each:
R = sum of m^2 logit vectors, that of the whole image first. With l_nr the loss of sample n, region
r by SDD.BASE (KD, DKD or NKD; settings under SDD.KD, ...):

    w_nr = COMP_WEIGHT where the teacher is right about just one of region r and the whole image,
           else 1
    loss = min(epoch / WARMUP, 1) * 1 / (N R) * sum_nr w_nr l_nr

NORM sum leaves out 1 / R, as the paper does; the code divides. In the paper w follows from the
teacher naming the same class for region and image, which is CONSISTENCY class; the code compares
with the label, so that two wrong classes agree. NKD of a row, with r = softmax over the classes
other than t at temperature T, is

    l = -q_t log p_t - GAMMA T^2 sum_{i != t} r_teacher,i log r_student,i

In the authors' code (FORM code) r includes t, and T and GAMMA are DKD's 4 and 8; FORM fixed is the
method as published for whole images (there T 1, GAMMA 1.5, on CIFAR T 3, GAMMA 3.5).

Cells have equal area; pixels on a border count by their share, and cells smaller than a pixel
repeat it. The authors pool to 4 x 4 and from there on: the same for sides of 1, 2 or a multiple of
4 (all CIFAR networks). For others, 7 x 7 say, their cells overlap, and the first region's logits
are not those of the image.
Samples without label are left out. Networks whose logits are not a linear layer on the average of
`final_map` are refused. The authors clip gradients at norm 40 (SOLVER.CLIP_GRAD_NORM).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mdistiller.distillers._base import DISTILLERS, Distiller, Output
from mdistiller.distillers.helpers.features.heads import classify, linear_head
from mdistiller.distillers.helpers.losses.decoupled import labelled_mean
from mdistiller.distillers.helpers.losses.logit_losses import dkd_rows, kd_rows, nkd_rows
from mdistiller.distillers.helpers.losses.numerics import IGNORE_INDEX, scale_logits
from mdistiller.distillers.helpers.training.settings import require_positive, warmup_factor
from mdistiller.registry import UserError

RowLoss = Callable[[Tensor, Tensor, Tensor], Tensor]
"""Loss of each row [M] from logits of student and teacher [M, C] and classes [M]."""

DEFAULTS: dict[str, Any] = {
    "BASE": "DKD",
    "SCALES": [1, 2],
    "COMP_WEIGHT": 2.0,
    "NORM": "mean",
    "CONSISTENCY": "label",
    "KD": {"CE_WEIGHT": 0.1, "KD_WEIGHT": 0.9, "T": 4.0, "WARMUP": 0},
    "DKD": {"CE_WEIGHT": 1.0, "ALPHA": 1.0, "BETA": 8.0, "T": 4.0, "WARMUP": 20},
    "NKD": {"CE_WEIGHT": 1.0, "GAMMA": 8.0, "T": 4.0, "FORM": "code", "WARMUP": 20},
}


def cells(side: int, parts: int) -> Tensor:
    """Weights [parts, side], float64, that average a row of pixels over equal parts of it."""
    start = torch.arange(parts)[:, None] * side  # in 1 / parts of a pixel
    pixel = torch.arange(side) * parts
    overlap = torch.minimum(start + side, pixel + parts) - torch.maximum(start, pixel)
    return overlap.clamp(min=0).double() / side


@lru_cache(maxsize=16)
def region_grid(
    size: tuple[int, int], scales: tuple[int, ...], dtype: torch.dtype, device: torch.device
) -> Tensor:
    """Weights [H W, R] that average a map of `size` over every region."""
    grids = [torch.kron(*(cells(side, parts) for side in size)) for parts in scales]
    return torch.cat(grids).T.to(dtype).to(device)  # in two steps: not all devices know float64


def region_logits(head: nn.Linear | nn.Conv2d, maps: Tensor, scales: Sequence[int]) -> Tensor:
    """Logits [N, C, R] of the regions of maps [N, D, H, W], scale by scale, row by row."""
    grid = region_grid(tuple(maps.shape[2:]), tuple(scales), maps.dtype, maps.device)
    return classify(head, maps.flatten(2) @ grid)


def region_nkd(
    logits_student: Tensor,
    logits_teacher: Tensor,
    target: Tensor,
    temperature: float,
    gamma: float,
    form: str = "code",
) -> Tensor:
    """NKD of each row [N], see the module's text; `form` is code or fixed."""
    target_rows, other_rows = nkd_rows(logits_student, logits_teacher, target, temperature)
    if form == "code":
        log_p = F.log_softmax(scale_logits(logits_student, temperature), dim=1)
        log_q = F.log_softmax(scale_logits(logits_teacher, temperature), dim=1)
        other_rows = -(log_q.exp() * log_p).sum(dim=1) * temperature**2
    return target_rows + gamma * other_rows


def complementary(teacher: Tensor, target: Tensor, consistency: str = "label") -> Tensor:
    """Which regions count COMP_WEIGHT-fold, bool [N, R].

    Args:
        teacher: logits [N, C, R], the whole image's first.
        target: [N] class indices.
        consistency: "label" or "class", see the module's text.
    """
    predicted = teacher.argmax(dim=1)
    if consistency == "label":
        predicted = predicted == target[:, None]
    return predicted != predicted[:, :1]


def sdd_loss(
    student: Tensor,
    teacher: Tensor,
    target: Tensor,
    row_loss: RowLoss,
    weights: Tensor,
    norm: str = "mean",
) -> Tensor:
    """Weighted loss of all regions, a scalar.

    Args:
        student, teacher: logits [N, C, R], the whole image's first.
        target: [N] class indices; rows with IGNORE_INDEX are left out.
        weights: [N, R].
        norm: "mean" or "sum" over regions.
    """
    count = student.shape[2]
    s_logits, t_logits = (logits.transpose(1, 2).flatten(0, 1) for logits in (student, teacher))
    rows = row_loss(s_logits, t_logits, target[:, None].expand(-1, count).flatten())
    total = (weights * rows.unflatten(0, (-1, count))).sum(dim=1)
    return labelled_mean(total / count if norm == "mean" else total, target != IGNORE_INDEX)


@DISTILLERS.register("SDD", config=DEFAULTS)
class SDD(Distiller):
    """KD, DKD or NKD on the logits of the image's regions.

    The metric `complementary` is the share of regions with the weight COMP_WEIGHT.
    """

    takes_standardized_logits = True

    def __init__(self, student: nn.Module, teacher: nn.Module, cfg: Any):
        super().__init__(student, teacher, cfg)
        self.node = check(cfg.SDD)
        name = self.node.BASE.upper()
        base = self.node[name]
        self.ce_loss_weight = base.CE_WEIGHT
        self.warmup = base.WARMUP
        self.row_loss = base_loss(name, base)
        for net, role in ((student, "student"), (teacher, "teacher")):
            linear_head(net, role)

    def distill(self, student: Output, teacher: Output, target: Tensor, **batch: Any) -> Tensor:
        node = self.node
        s_logits = region_logits(
            linear_head(self.student, "student"), student["final_map"], node.SCALES
        )
        with torch.no_grad():
            head = linear_head(self.teacher, "teacher")
            t_logits = region_logits(head, teacher["final_map"], node.SCALES)
            differs = complementary(t_logits, target, node.CONSISTENCY)
        self.metrics = {"complementary": differs.float().mean()}
        weights = 1.0 + (node.COMP_WEIGHT - 1.0) * differs
        s_logits, t_logits = self.standardize(s_logits), self.standardize(t_logits)
        loss = sdd_loss(s_logits, t_logits, target, self.row_loss, weights, node.NORM)
        return warmup_factor(batch["epoch"], self.warmup) * loss


def base_loss(name: str, node: Any) -> RowLoss:
    """The loss of a row for SDD.BASE, with the settings of its node."""
    temperature = require_positive(f"SDD.{name}.T", node.T)

    def kd(student: Tensor, teacher: Tensor, target: Tensor) -> Tensor:
        return node.KD_WEIGHT * kd_rows(student, teacher, temperature)

    def dkd(student: Tensor, teacher: Tensor, target: Tensor) -> Tensor:
        tckd, nckd = dkd_rows(student, teacher, target, temperature)
        return node.ALPHA * tckd + node.BETA * nckd

    def nkd(student: Tensor, teacher: Tensor, target: Tensor) -> Tensor:
        return region_nkd(student, teacher, target, temperature, node.GAMMA, node.FORM)

    return {"KD": kd, "DKD": dkd, "NKD": nkd}[name]


def check(node: Any) -> Any:
    """The SDD node, with its values checked."""
    for key, value, allowed in (
        ("BASE", node.BASE.upper(), ("KD", "DKD", "NKD")),
        ("NORM", node.NORM, ("mean", "sum")),
        ("CONSISTENCY", node.CONSISTENCY, ("label", "class")),
        ("NKD.FORM", node.NKD.FORM, ("code", "fixed")),
    ):
        if value not in allowed:
            raise UserError(f"SDD.{key} must be one of {', '.join(allowed)}, got {value!r}")
    if not node.SCALES or node.SCALES[0] != 1 or min(node.SCALES) < 1:
        raise UserError(
            f"SDD.SCALES must start with 1 (the whole image) and hold whole numbers above 0, "
            f"got {list(node.SCALES)}"
        )
    return node
