"""CATKD. Guo, Yan, Li, Lin: Class Attention Transfer Based Knowledge Distillation, CVPR 2023,
arXiv 2304.12777.

The class activation maps of a network are its classifier, without bias, at every position of its
last map: A = W F, [N, C, H, W]. With phi = average to RES x RES cells, then (NORMALIZE) division by
the length over the cells, 0 for a map of zeros:

    loss = BETA * mean over n, classes and cells of (phi(A_student) - phi(A_teacher))^2

The paper sums over cells, which is RES^2 times that; published BETAs belong to the mean.

    BINARIZE  the teacher's maps are 1 where above the mean of their |A|, else 0, before phi
    TOP, BOTTOM  per sample only the maps of the classes whose mean is largest or smallest in the
        teacher: exactly TOP or BOTTOM of them, with ties as well (the authors' code takes one less
        or more, and all on ties); 0: all classes
    ONLY  without cross-entropy (the paper's CAT)

As in the authors' code the student has no bias in its classifier, so that its logits are the means
of its maps. Here the bias is a constant 0 in its usual place: a student's file is an ordinary
network of its kind. The student starts from the same weights as under other methods (the authors
initialise classifier and convolutions again). The teacher predicts with its bias; only its
maps, and the choice of TOP and BOTTOM, go without. Networks whose logits are not a linear layer on
the average of `final_map` are refused.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mdistiller.distillers._base import DISTILLERS, Distiller, Output
from mdistiller.distillers.helpers.features.heads import classify, linear_head
from mdistiller.distillers.helpers.losses.numerics import full_precision, unit
from mdistiller.distillers.helpers.training.settings import require_positive
from mdistiller.registry import UserError


def binarize(maps: Tensor) -> Tensor:
    """1 where a map [N, C, H, W] is above the mean of its absolute values, else 0."""
    return (maps > maps.abs().mean(dim=(2, 3), keepdim=True)).to(maps.dtype)


def cells(maps: Tensor, res: int, normalize: bool) -> Tensor:
    """phi: maps [N, C, H, W] averaged to [N, C, res * res], perhaps of length 1."""
    pooled = F.adaptive_avg_pool2d(maps, res).flatten(2)
    return unit(pooled) if normalize else pooled


def select(maps: Tensor, top: int, bottom: int) -> Tensor:
    """Indices [N, count] of the classes with the largest (or smallest) means of maps."""
    return maps.mean(dim=(2, 3)).topk(top or bottom, dim=1, largest=top > 0).indices


def catkd_loss(
    student: Tensor,
    teacher: Tensor,
    res: int = 2,
    normalize: bool = True,
    binary: bool = False,
    top: int = 0,
    bottom: int = 0,
) -> Tensor:
    """Mean squared difference of class activation maps, a scalar.

    Args:
        student, teacher: maps [N, C, H, W]; H and W may differ between the two.
        res: cells a side.
        normalize: compare maps of length 1.
        binary: binarize the teacher's maps.
        top, bottom: number of classes that take part; at most one of them above 0.
    """
    student, teacher = full_precision(student), full_precision(teacher)
    chosen = select(teacher, top, bottom) if top or bottom else None
    if binary:
        teacher = binarize(teacher)
    s_maps, t_maps = (cells(maps, res, normalize) for maps in (student, teacher))
    if chosen is not None:
        index = chosen[:, :, None].expand(-1, -1, s_maps.shape[2])
        s_maps, t_maps = s_maps.gather(1, index), t_maps.gather(1, index)
    return F.mse_loss(s_maps, t_maps)


def drop_bias(layer: nn.Linear | nn.Conv2d) -> None:
    """Make a layer's bias a constant 0, a buffer of the same name; without bias, do nothing."""
    if layer.bias is not None:
        zeros = torch.zeros_like(layer.bias.detach())
        del layer.bias
        layer.register_buffer("bias", zeros)


@DISTILLERS.register(
    "CATKD",
    config={
        "BETA": 400.0,
        "RES": 2,
        "NORMALIZE": True,
        "ONLY": False,
        "BINARIZE": False,
        "TOP": 0,
        "BOTTOM": 0,
    },
)
class CATKD(Distiller):
    """Class attention transfer: the student looks where the teacher does, for every class."""

    soft_labels = True

    def __init__(self, student: nn.Module, teacher: nn.Module, cfg: Any):
        super().__init__(student, teacher)
        node = cfg.CATKD
        self.ce_loss_weight = 0.0 if node.ONLY else 1.0
        self.beta = node.BETA
        require_positive("CATKD.RES", node.RES)
        classes = len(linear_head(teacher, "teacher").weight)
        if min(node.TOP, node.BOTTOM) != 0 or not 0 <= node.TOP + node.BOTTOM <= classes:
            raise UserError(
                f"CATKD.TOP {node.TOP} and BOTTOM {node.BOTTOM}: set one of them, to a number of "
                f"classes up to {classes}, or none (0)"
            )
        self.options = {
            "res": node.RES,
            "normalize": node.NORMALIZE,
            "binary": node.BINARIZE,
            "top": node.TOP,
            "bottom": node.BOTTOM,
        }
        drop_bias(linear_head(student, "student"))

    def distill(self, student: Output, teacher: Output, target: Tensor, **batch: Any) -> Tensor:
        s_maps = classify(linear_head(self.student, "student"), student["final_map"], bias=False)
        with torch.no_grad():
            head = linear_head(self.teacher, "teacher")
            t_maps = classify(head, teacher["final_map"], bias=False)
        return self.beta * catkd_loss(s_maps, t_maps, **self.options)
