"""GDKD3. Zheng, Cheng: Rethinking Decoupled Knowledge Distillation: A Predictive Distribution
Perspective, TNNLS 2025, arXiv 2512.04625.

GDKD with three groups of classes by falling teacher logit: the first, the next up to TOPK, and the
rest. With g the probabilities of the groups, u and r the softmax within the last two, at
temperature T:

    high = T^2 / N * sum_n KL(g_teacher || g_student)
    next = T^2 / N * sum_n KL(u_teacher || u_student)
    rest = T^2 / N * sum_n KL(r_teacher || r_student)
    loss = min(epoch / WARMUP, 1) * (W0 * high + W1 * next + W2 * rest)

A group without classes, of a data set that has few, has no term.
"""

from __future__ import annotations

from torch import Tensor

from mdistiller.distillers._base import DISTILLERS, Losses
from mdistiller.distillers.helpers.losses.class_groups import (
    CONFIG,
    GroupedKD,
    group_terms,
    weighted,
)


def gdkd3_terms(
    logits_student: Tensor,
    logits_teacher: Tensor,
    topk: int,
    temperature: float,
    kl_type: str = "forward",
) -> Losses:
    """high, next and rest, scalars with the factor T²; arguments as of `GDKD.gdkd_terms`."""
    high, within = group_terms(logits_student, logits_teacher, (1, topk - 1), temperature, kl_type)
    return {"high": high, **dict(zip(("next", "rest"), within[1:], strict=False))}


def gdkd3_loss(
    logits_student: Tensor,
    logits_teacher: Tensor,
    weights: tuple[float, float, float],
    topk: int,
    temperature: float,
    kl_type: str = "forward",
) -> Tensor:
    """W0 * high + W1 * next + W2 * rest, a scalar; see :func:`gdkd3_terms`."""
    terms = gdkd3_terms(logits_student, logits_teacher, topk, temperature, kl_type)
    return weighted(terms, weights)


@DISTILLERS.register("GDKD3", config={**CONFIG, "TOPK": 4})
class GDKD3(GroupedKD):
    """GDKD whose first class is a group of its own."""

    name = "GDKD3"
    smallest = 2
    terms = staticmethod(gdkd3_terms)
