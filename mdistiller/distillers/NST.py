"""NST. Huang, Wang: Like What You Like: Knowledge Distill via Neuron Selectivity Transfer, 2017,
arXiv 1707.01219.

Squared maximum mean discrepancy with the kernel k(a, b) = (a . b)^2 between the channels of two
networks, each channel's map flattened and scaled to length 1. With S [C, HW] and T [D, HW] the
scaled maps of one sample, the larger average-pooled first:

    loss = sum over stages of mean_n ( |S S^T|^2 / C^2 + |T T^T|^2 / D^2 - 2 |S T^T|^2 / (C D) )

which is also mean_n |S^T S / C - T^T T / D|^2 in HW x HW matrices (squared Frobenius norms). The
form with the fewer multiplications is used; no N x C x D x HW tensor arises in either.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from mdistiller.distillers._base import DISTILLERS, Distiller, Output
from mdistiller.distillers.helpers.features.stages import match_size, paired_stages
from mdistiller.distillers.helpers.losses.numerics import full_precision, unit


def single_stage_nst_loss(f_s: Tensor, f_t: Tensor) -> Tensor:
    """The loss of one stage; maps [N, C, H, W] and [N, D, H', W'], a scalar."""
    matched = match_size(full_precision(f_s), full_precision(f_t))
    student, teacher = (unit(feature.flatten(2)) for feature in matched)
    c, d, positions = student.shape[1], teacher.shape[1], student.shape[2]
    if positions * (c + d) < c * c + c * d + d * d:
        difference = student.mT @ student / c - teacher.mT @ teacher / d
        return difference.square().sum() / len(student)

    def kernel(a: Tensor, b: Tensor) -> Tensor:
        return (a @ b.mT).square().mean()

    return kernel(student, student) + kernel(teacher, teacher) - 2 * kernel(student, teacher)


def nst_loss(g_s: Sequence[Tensor], g_t: Sequence[Tensor]) -> Tensor:
    """Neuron selectivity transfer summed over stages, a scalar.

    Args:
        g_s, g_t: equally many maps [N, C, H, W] of student and teacher; within a pair C, H and W
            may differ.
    """
    losses = [single_stage_nst_loss(s, t) for s, t in zip(g_s, g_t, strict=True)]
    return sum(losses[1:], losses[0])


@DISTILLERS.register("NST", config={"LOSS": {"CE_WEIGHT": 1.0, "FEAT_WEIGHT": 50.0}})
class NST(Distiller):
    """Neuron selectivity transfer: the student's channels are distributed as the teacher's."""

    needs_teacher_classifier = False
    needs_labels = False
    soft_labels = True

    def __init__(self, student: nn.Module, teacher: nn.Module, cfg: Any):
        super().__init__(student, teacher)
        self.ce_loss_weight = cfg.NST.LOSS.CE_WEIGHT
        self.feat_loss_weight = cfg.NST.LOSS.FEAT_WEIGHT

    def distill(self, student: Output, teacher: Output, target: Tensor, **batch: Any) -> Tensor:
        return self.feat_loss_weight * nst_loss(*paired_stages(student, teacher))
