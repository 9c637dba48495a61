"""PKT. Passalis, Tefas: Learning Deep Representations with Probabilistic Knowledge Transfer,
ECCV 2018, arXiv 1803.10837.

Cosine similarities c_ij of the pooled features become conditional probabilities
P_ij = (c_ij + 1) / sum_k (c_ik + 1), the diagonal included. With q = P of the teacher and p = P of
the student:

    loss = 1 / N^2 * sum_ij q_ij log((q_ij + eps) / (p_ij + eps))

Since rows of q and p have the same sum, d_ij = q_ij - p_ij can be subtracted from every term. So
written, as q log1p(d / (p + eps)) - d with the derivative (eps - d) / (p + eps) in p, value and
gradient keep their digits where q and p nearly agree, which is the usual case: the logarithm of the
quotient alone rounds to noise there. The batch is that of all processes.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from mdistiller.distillers._base import DISTILLERS, Distiller, Output
from mdistiller.distillers.helpers.losses.numerics import full_precision
from mdistiller.distillers.helpers.training.gather import gather_batch


def cosines(features: Tensor, eps: float) -> Tensor:
    """c of features [N, ...]: [N, N]; a zero row has cosine 0 to all."""
    flat = full_precision(features).flatten(1)
    lengths = torch.linalg.vector_norm(flat, dim=1, keepdim=True)
    directions = flat * (lengths + eps).reciprocal().masked_fill(lengths == 0, 0.0)
    # plain: on features this short `gram` costs more than the product that it saves
    return directions @ directions.T


class _Divergence(torch.autograd.Function):
    """The loss of the student's and the teacher's cosines; the latter are constant."""

    @staticmethod
    def forward(ctx: Any, student: Tensor, teacher: Tensor, eps: float) -> Tensor:
        (p, total), (q, _) = (_row_shares(similarities) for similarities in (student, teacher))
        difference, ctx.eps = q - p, eps
        raised = p + eps
        excess = difference / raised
        ctx.save_for_backward(p, total, raised, excess)
        return (q * excess.log1p()).sub_(difference).mean()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        p, total, raised, excess = ctx.saved_tensors
        slope = ctx.eps / raised - excess  # in p
        slope -= (slope * p).sum(dim=1, keepdim=True)  # p's rows sum to 1
        return slope * (grads[0] / (total * p.numel())), None, None


def _row_shares(cosine: Tensor) -> tuple[Tensor, Tensor]:
    """P of cosines [N, N], and the sums [N, 1] by which c + 1 was divided."""
    similarities = cosine + 1
    total = similarities.sum(dim=1, keepdim=True)
    return similarities.div_(total), total


def pkt_loss(f_s: Tensor, f_t: Tensor, eps: float = 1e-7) -> Tensor:
    """Divergence of the conditional probabilities, a scalar.

    Args:
        f_s, f_t: [N, D] and [N, D'] of student and teacher; only the student's get a gradient.
        eps: added to lengths and probabilities.
    """
    loss: Tensor = _Divergence.apply(cosines(f_s, eps), cosines(f_t, eps), eps)
    return loss


@DISTILLERS.register("PKT", config={"LOSS": {"CE_WEIGHT": 1.0, "FEAT_WEIGHT": 30000.0}})
class PKT(Distiller):
    """Probabilistic knowledge transfer: samples have the same probable neighbours."""

    needs_teacher_classifier = False
    teacher_summary_only = True
    needs_labels = False
    soft_labels = True

    def __init__(self, student: nn.Module, teacher: nn.Module, cfg: Any):
        super().__init__(student, teacher)
        self.ce_loss_weight = cfg.PKT.LOSS.CE_WEIGHT
        self.feat_loss_weight = cfg.PKT.LOSS.FEAT_WEIGHT

    def distill(self, student: Output, teacher: Output, target: Tensor, **batch: Any) -> Tensor:
        s_feat, t_feat = gather_batch(student["pooled_feat"], teacher["pooled_feat"])
        return self.feat_loss_weight * pkt_loss(s_feat, t_feat)
