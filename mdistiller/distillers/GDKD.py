"""GDKD. Zheng, Cheng: Rethinking Decoupled Knowledge Distillation: A Predictive Distribution
Perspective, TNNLS 2025, arXiv 2512.04625.

DKD without a label: U are the TOPK classes of a sample with the largest teacher logits, R the
others. With g = (p_U, p_R) the probabilities of the two groups and u, r the softmax within each,
all at temperature T:

    high = T^2 / N * sum_n KL(g_teacher || g_student)
    top  = T^2 / N * sum_n KL(u_teacher || u_student)
    rest = T^2 / N * sum_n KL(r_teacher || r_student)
    loss = min(epoch / WARMUP, 1) * (W0 * high + W1 * top + W2 * rest)

With TOPK 1 and a teacher that is right this is DKD with ALPHA = W0, BETA = W2. KL_TYPE "reverse"
has KL(student || teacher) in all three, "both" the mean of the two directions. If there are no more
than TOPK classes, U is all of them: high is 0, there is no rest, and the loss is W1 times KD.

The authors mask classes by -1000, which fails once logits / T differ by more; here the classes are
left out.
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


def gdkd_terms(
    logits_student: Tensor,
    logits_teacher: Tensor,
    topk: int,
    temperature: float,
    kl_type: str = "forward",
) -> Losses:
    """high, top and rest (without other classes there is no rest), scalars with the factor T²."""
    high, within = group_terms(logits_student, logits_teacher, (topk,), temperature, kl_type)
    return {"high": high, **dict(zip(("top", "rest"), within, strict=False))}


def gdkd_loss(
    logits_student: Tensor,
    logits_teacher: Tensor,
    weights: tuple[float, float, float],
    topk: int,
    temperature: float,
    kl_type: str = "forward",
) -> Tensor:
    """W0 * high + W1 * top + W2 * rest, a scalar; see :func:`gdkd_terms`."""
    return weighted(gdkd_terms(logits_student, logits_teacher, topk, temperature, kl_type), weights)


@DISTILLERS.register("GDKD", config=CONFIG)
class GDKD(GroupedKD):
    """The teacher's TOPK classes, the others, and the shares of the two, with a weight each."""

    name = "GDKD"
    smallest = 1
    terms = staticmethod(gdkd_terms)
