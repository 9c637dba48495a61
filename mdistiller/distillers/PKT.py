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

import math
from typing import Any

import torch
from torch import Tensor, nn

from mdistiller.distillers._base import DISTILLERS, Distiller, Output
from mdistiller.distillers._common import full_precision, gram
from mdistiller.distillers._gather import gather_batch


def conditional_probabilities(features: Tensor, eps: float) -> Tensor:
    """P as above of features [N, ...]: [N, N], rows sum to 1; a zero row has cosine 0 to all."""
    flat = full_precision(features).flatten(1)
    lengths = torch.linalg.vector_norm(flat, dim=1, keepdim=True)
    directions = flat / (lengths + eps).masked_fill(lengths == 0, math.inf)
    similarities = gram(directions) + 1
    return similarities / similarities.sum(dim=1, keepdim=True)


class _Divergence(torch.autograd.Function):
    """The loss of p and q; q is constant."""

    @staticmethod
    def forward(ctx: Any, p: Tensor, q: Tensor, eps: float) -> Tensor:
        difference, ctx.eps = q - p, eps
        raised = p + eps
        excess = difference / raised
        ctx.save_for_backward(raised, excess)
        return (q * excess.log1p()).sub_(difference).mean()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        raised, excess = ctx.saved_tensors
        return (ctx.eps / raised - excess) * (grads[0] / excess.numel()), None, None


def pkt_loss(f_s: Tensor, f_t: Tensor, eps: float = 1e-7) -> Tensor:
    """Divergence of the conditional probabilities, a scalar.

    Args:
        f_s, f_t: [N, D] and [N, D'] of student and teacher; only the student's get a gradient.
        eps: added to lengths and probabilities.
    """
    p, q = (conditional_probabilities(features, eps) for features in (f_s, f_t))
    loss: Tensor = _Divergence.apply(p, q, eps)
    return loss


@DISTILLERS.register("PKT", config={"LOSS": {"CE_WEIGHT": 1.0, "FEAT_WEIGHT": 30000.0}})
class PKT(Distiller):
    """Probabilistic knowledge transfer: samples have the same probable neighbours."""

    soft_labels = True

    def __init__(self, student: nn.Module, teacher: nn.Module, cfg: Any):
        super().__init__(student, teacher)
        self.ce_loss_weight = cfg.PKT.LOSS.CE_WEIGHT
        self.feat_loss_weight = cfg.PKT.LOSS.FEAT_WEIGHT

    def distill(self, student: Output, teacher: Output, target: Tensor, **batch: Any) -> Tensor:
        own, other = gather_batch(student["pooled_feat"], teacher["pooled_feat"])
        return self.feat_loss_weight * pkt_loss(own, other)
