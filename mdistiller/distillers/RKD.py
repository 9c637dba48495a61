"""RKD. Park, Kim, Lu, Cho: Relational Knowledge Distillation, CVPR 2019, arXiv 1904.05068.

For pooled features x_1 ... x_N, D_ij = |x_i - x_j| (or its square), mu the mean of the positive
D_ij, and A_ijk the cosine of the angle at x_i between x_j and x_k (0 where two points coincide):

    distance = mean_ij  huber(D_student / mu_student - D_teacher / mu_teacher)
    angle    = mean_ijk huber(A_student - A_teacher)
    loss     = DISTANCE_WEIGHT * distance + ANGLE_WEIGHT * angle

Both follow from the Gram matrix G of the centred features: D_ij^2 = G_ii + G_jj - 2 G_ij and
A_ijk = (G_jk - G_ij - G_ik + G_ii) / (D_ij D_ik); no N x N x D tensor arises. Points nearer than
rounding can tell count as coincident, at distance sqrt(eps) and without gradient. The batch is that
of all processes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from mdistiller.distillers._base import DISTILLERS, Distiller, Output
from mdistiller.distillers.helpers.losses.numerics import full_precision, gram
from mdistiller.distillers.helpers.training.gather import gather_batch

ANGLES_AT_ONCE = 2**24
"""Larger batches (N > 256) go through the N^3 angles in parts, which backward computes again."""


class Geometry(NamedTuple):
    """Relations of N points: Gram matrix, squared distances, and which pairs are apart; [N, N]."""

    products: Tensor
    squares: Tensor
    apart: Tensor

    @classmethod
    def of(cls, features: Tensor, eps: float) -> Geometry:
        """Of features [N, ...]; pairs are apart if their squared distance exceeds `eps`."""
        flat = full_precision(features).flatten(1)
        flat = flat - flat.mean(dim=0)
        products = gram(flat)
        lengths = products.diagonal()
        sums = lengths[:, None] + lengths
        squares = sums - 2 * products
        rounding = 4 * torch.finfo(flat.dtype).eps * sums.detach()
        apart = (squares > eps) & (squares > rounding)
        return cls(products, squares, apart.fill_diagonal_(False))

    def distances(self, squared: bool, eps: float) -> Tensor:
        """Distances over their mean [N, N]."""
        apart = torch.where(self.apart, self.squares, eps)
        values = apart if squared else apart.sqrt()
        values = values - torch.diag(values.diagonal())
        mean = values.sum() / (values > 0).sum().clamp(min=1)
        return values / mean.clamp(min=torch.finfo(values.dtype).tiny)

    def angles(self, first: int, stop: int) -> Tensor:
        """Cosines at the points from `first` up to `stop`: [stop - first, N, N]."""
        rows = slice(first, stop)
        inverse = torch.where(self.apart, self.squares, 1.0).rsqrt() * self.apart
        offset = self.products.diagonal()[rows, None] - self.products[rows]
        products = self.products + offset[:, :, None] - self.products[rows, None, :]
        return products * inverse[rows, :, None] * inverse[rows, None, :]


def angle_loss(student: Geometry, teacher: Geometry) -> Tensor:
    """Mean Huber difference of all N^3 angles."""
    count = len(student.products)
    step = max(1, ANGLES_AT_ONCE // max(1, count * count))

    def part(first: int) -> Tensor:
        stop = min(first + step, count)
        angles = student.angles(first, stop)
        return F.smooth_l1_loss(angles, teacher.angles(first, stop), reduction="sum")

    if step >= count:
        return part(0) / count**3
    again: Callable[..., Tensor] = checkpoint
    parts = [again(part, first, use_reentrant=False) for first in range(0, count, step)]
    return torch.stack(parts).sum() / count**3


def rkd_loss(
    f_s: Tensor,
    f_t: Tensor,
    squared: bool = False,
    eps: float = 1e-12,
    distance_weight: float = 25,
    angle_weight: float = 50,
) -> Tensor:
    """Weighted sum of distance and angle loss, a scalar.

    Args:
        f_s, f_t: [N, D] and [N, D'] of student and teacher.
        squared: compare squared distances.
        eps: squared distance below which points coincide.
    """
    student, teacher = (Geometry.of(features, eps) for features in (f_s, f_t))
    distances = student.distances(squared, eps)
    distance = F.smooth_l1_loss(distances, teacher.distances(squared, eps))
    return distance_weight * distance + angle_weight * angle_loss(student, teacher)


@DISTILLERS.register(
    "RKD",
    config={
        "DISTANCE_WEIGHT": 25.0,
        "ANGLE_WEIGHT": 50.0,
        "LOSS": {"CE_WEIGHT": 1.0, "FEAT_WEIGHT": 1.0},
        "PDIST": {"EPSILON": 1e-12, "SQUARED": False},
    },
)
class RKD(Distiller):
    """Relational knowledge: distances and angles between samples, up to a common scale."""

    needs_teacher_classifier = False
    teacher_summary_only = True
    needs_labels = False
    soft_labels = True

    def __init__(self, student: nn.Module, teacher: nn.Module, cfg: Any):
        super().__init__(student, teacher)
        self.ce_loss_weight = cfg.RKD.LOSS.CE_WEIGHT
        self.feat_loss_weight = cfg.RKD.LOSS.FEAT_WEIGHT
        self.settings = {
            "squared": cfg.RKD.PDIST.SQUARED,
            "eps": cfg.RKD.PDIST.EPSILON,
            "distance_weight": cfg.RKD.DISTANCE_WEIGHT,
            "angle_weight": cfg.RKD.ANGLE_WEIGHT,
        }

    def distill(self, student: Output, teacher: Output, target: Tensor, **batch: Any) -> Tensor:
        s_feat, t_feat = gather_batch(student["pooled_feat"], teacher["pooled_feat"])
        return self.feat_loss_weight * rkd_loss(s_feat, t_feat, **self.settings)
