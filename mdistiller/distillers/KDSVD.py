"""KDSVD. Lee, Kim, Song: Self-supervised Knowledge Distillation Using Singular Value Decomposition,
ECCV 2018, arXiv 1807.06819.

A sample's map of a stage, as a matrix [C H, W], has singular values s and right singular vectors
v_b [W]. The student's counterpart of the teacher's v_b is that of its first K + 3 vectors with the
largest |cosine|, its sign turned to match. With both scaled by the teacher's s_b / |s_1..K|, and
R[u, w, b] = exp(-(v_b,u of stage i - v_b,w of stage i - 1)^2 / 8):

    loss = mean_n sum over consecutive stages and u, w, b of (R_student - R_teacher)^2

Only stages of equal width W can be compared. As in the original library the rows of the matrix are
channel x height; RepDistiller has the channels as columns, and other values.

The sign of a singular vector is arbitrary, yet R depends on the teacher's signs relative to each
other in consecutive stages. SIGNS chooses them: "lapack" (the default; the original's numbers
need it) takes those of LAPACK's decomposition in float32, on a GPU those of its own
library; "canonical" makes the sum of every vector non-negative, the same on every machine.
The two agree on most samples where maps are non-negative.

Everything else follows from W x W matrices, decomposed in float64. In the backward pass
1 / (s_i^2 - s_j^2) is damped where the two differ by less than about 1e-6 of s_1^2, so that samples
of rank 1, zero maps and equal singular values give finite gradients.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from mdistiller.distillers._base import DISTILLERS, Distiller, Output
from mdistiller.distillers.helpers.features.shapes import Size, probe
from mdistiller.distillers.helpers.features.stages import pair_by_height, paired_stages
from mdistiller.distillers.helpers.losses.numerics import full_precision, unit
from mdistiller.distillers.helpers.training.settings import require_one_of, require_positive
from mdistiller.registry import UserError

EXTRA = 3
"""Number of vectors that the student offers beyond the teacher's."""
GAP = 1e-6
"""Squared singular values nearer than this share of the largest count as equal in backward."""


class _RightVectors(torch.autograd.Function):
    """The first `count` right singular vectors of matrices [N, R, W], as float64 [N, W, count]."""

    @staticmethod
    def forward(ctx: Any, matrix: Tensor, count: int) -> Tensor:
        squares, vectors = eigen(matrix)
        ctx.save_for_backward(matrix, squares, vectors)
        return vectors[..., :count].clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        matrix, squares, vectors = ctx.saved_tensors
        count = grads[0].shape[-1]
        gap = squares[:, None, :count] - squares[:, :, None]
        damping = (GAP * squares[:, :1, None]).square()
        inner = (vectors.mT @ grads[0]) * gap / (gap.square() + damping).clamp(min=1e-300)
        product = vectors @ inner @ vectors[..., :count].mT
        return matrix @ (product + product.mT).to(matrix.dtype), None


def eigen(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Squared singular values, descending, and right singular vectors of [N, R, W], in float64."""
    # Short sums in the matrix's own precision, added up in float64: nearly as good as float64
    # throughout (vectors to 1e-6), at a quarter of the cost.
    parts = [(part.mT @ part).double() for part in matrix.chunk(8, dim=1)]
    gram = torch.nan_to_num(sum(parts[1:], parts[0]), nan=0.0, posinf=0.0, neginf=0.0)
    squares, vectors = torch.linalg.eigh(gram)
    return squares.flip(-1).clamp(min=0.0), vectors.flip(-1)


def teacher_vectors(matrix: Tensor, k: int, signs: str) -> tuple[Tensor, Tensor]:
    """First k right singular vectors [N, W, k], and their values as a unit vector [N, 1, k]."""
    if signs == "canonical":
        squares, vectors = eigen(matrix)
        values = squares.sqrt()
        vectors = torch.where(vectors.sum(dim=1, keepdim=True) < 0, -vectors, vectors)
    else:  # that of R in matrix = Q R has the same signs, and is cheaper
        triangle = torch.linalg.qr(matrix.float(), mode="r").R
        _, values, rows = torch.linalg.svd(torch.nan_to_num(triangle), full_matrices=False)
        values, vectors = values.double(), rows.mT.double()
    return vectors[..., :k], unit(values[:, None, :k])


def aligned_vectors(student: Tensor, teacher: Tensor, k: int, signs: str) -> tuple[Tensor, Tensor]:
    """The matched, scaled vectors of both networks; maps [N, C, H, W] -> two of [N, W, k]."""
    s_maps, t_maps = (feature.flatten(1, 2) for feature in (student, teacher))
    with torch.no_grad():
        target, scale = teacher_vectors(t_maps, k, signs)
    vectors = _RightVectors.apply(s_maps, min(k + EXTRA, *s_maps.shape[1:]))
    with torch.no_grad():
        cosine = vectors.mT @ target
        largest = cosine.abs().amax(dim=1, keepdim=True)
        choice = torch.where(cosine.abs() == largest, cosine.sign(), 0.0)
    return vectors @ choice * scale, target * scale


def relation(shallow: Tensor, deep: Tensor) -> Tensor:
    """R of the vectors of consecutive stages, [N, W', k] and [N, W, k]: [N, W, W', k]."""
    return (-(deep[:, :, None] - shallow[:, None]).square() / 8).exp()


def kdsvd_loss(
    g_s: Sequence[Tensor], g_t: Sequence[Tensor], k: int, signs: str = "lapack"
) -> Tensor:
    """The loss over all consecutive stages, a scalar.

    Args:
        g_s, g_t: equally many maps [N, C, H, W] of student and teacher, at least two; W must be
            the same within a pair.
        k: number of singular vectors.
        signs: "lapack" or "canonical".

    Raises:
        UserError: the widths differ, or there are too few stages or columns.
    """
    g_s, g_t = full_precision(list(g_s)), full_precision(list(g_t))
    check_widths([f.shape[3] for f in g_s], [f.shape[3] for f in g_t], k)
    pairs = [aligned_vectors(s, t, k, signs) for s, t in zip(g_s, g_t, strict=True)]
    total = pairs[0][0].new_zeros(())
    for shallow, deep in pairwise(pairs):
        relation_s, relation_t = (relation(*both) for both in zip(shallow, deep, strict=True))
        total = total + (relation_s - relation_t).square().sum()
    return (total / len(g_s[0])).to(g_s[0].dtype)


def check_widths(student: Sequence[int], teacher: Sequence[int], k: int) -> None:
    """Refuse stages that the method cannot compare."""
    if list(student) != list(teacher):
        raise UserError(
            f"KDSVD compares singular vectors over the columns of maps, so student and teacher "
            f"need equal widths at every stage, but have {list(student)} and {list(teacher)}"
        )
    if len(student) < 2:
        raise UserError("KDSVD relates consecutive stages, but these networks have only one")
    if k > min(student):
        raise UserError(f"KDSVD.K is {k}, but the narrowest map has only {min(student)} columns")


@DISTILLERS.register(
    "KDSVD", config={"K": 1, "SIGNS": "lapack", "LOSS": {"CE_WEIGHT": 1.0, "FEAT_WEIGHT": 1.0}}
)
class KDSVD(Distiller):
    """Singular vectors of the student's maps change from stage to stage as the teacher's do."""

    needs_teacher_classifier = False
    soft_labels = True

    def __init__(self, student: nn.Module, teacher: nn.Module, cfg: Any, image_size: Size = None):
        super().__init__(student, teacher)
        self.k = int(require_positive("KDSVD.K", cfg.KDSVD.K))
        self.signs = require_one_of("KDSVD.SIGNS", cfg.KDSVD.SIGNS, ("lapack", "canonical"))
        self.ce_loss_weight = cfg.KDSVD.LOSS.CE_WEIGHT
        self.feat_loss_weight = cfg.KDSVD.LOSS.FEAT_WEIGHT
        if image_size is not None:  # else the first step tells
            maps = [probe(net, image_size)["feats"][1:] for net in (student, teacher)]
            pairs = pair_by_height(*([shape[2] for shape in shapes] for shapes in maps))
            widths = [[maps[side][pair[side]][3] for pair in pairs] for side in (0, 1)]
            check_widths(widths[0], widths[1], self.k)

    def distill(self, student: Output, teacher: Output, target: Tensor, **batch: Any) -> Tensor:
        s_maps, t_maps = paired_stages(student, teacher)
        return self.feat_loss_weight * kdsvd_loss(s_maps, t_maps, self.k, self.signs)
