"""RLD. Sun et al.: Knowledge Distillation with Refined Logits, ICCV 2025,
arXiv 2408.07703.

The teacher may be wrong about the label y. With m = argmax_c v_c its guess, b = (p_c, 1 - p_c) the
two-point distribution of a class c at temperature ALPHA_T, and r = softmax over the classes that
the teacher ranks strictly below the label, {c: v_c < v_y}, at temperature T:

    SCD  = ALPHA_T^2 / N * sum_n KL(b_teacher,m || b_student,y)
    MCD  = T^2 / N * sum_n KL(r_teacher || r_student)
    loss = min(epoch / WARMUP, 1) * (ALPHA * SCD + BETA * MCD)

The student's confidence in the label follows the teacher's in its guess, and the label, with all
that the teacher ranks at or above it, is left out of the classes that are compared one by one. A
sample that has none left adds 0 to MCD.

The authors mask classes by -1e9 and take logarithms of probabilities; here both are exact for any
finite logits. Their flag `--same-t` is ALPHA_T equal to T.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from mdistiller.distillers._base import DISTILLERS, Distiller, Output
from mdistiller.distillers.helpers.losses.decoupled import (
    HIDDEN,
    binary_split,
    labelled_shares,
    target_column,
)
from mdistiller.distillers.helpers.losses.numerics import full_precision, scale_logits
from mdistiller.distillers.helpers.training.settings import require_positive, warmup_factor


class _Terms(torch.autograd.Function):
    """SCD and MCD; what the student's gradients need is made along with the values.

    Autograd's nodes would take more time than their arithmetic for a batch of 64 and 100 classes,
    and for the same reason operations are done once for both networks.
    """

    @staticmethod
    def forward(
        ctx: Any,
        logits_student: Tensor,
        logits_teacher: Tensor,
        column: Tensor,
        shares: Tensor,
        temperatures: tuple[float, float],
    ) -> tuple[Tensor, Tensor]:
        upper, lower = temperatures
        both = scale_logits(torch.stack([logits_student, logits_teacher]), upper)
        v = both[1]
        columns = torch.cat([column, v.argmax(dim=1, keepdim=True)])
        log_binary, within = binary_split(both.flatten(0, 1), columns)
        log_p, log_q = log_binary.chunk(2)
        q = log_q.exp()
        scd = (q * (log_q - log_p)).sum(dim=1).dot(shares)
        slope = (log_p.exp() - q)[:, :1]  # by the odds of p_y

        hidden = torch.ge(v, v.gather(1, column), out=torch.empty_like(v)).mul_(HIDDEN)
        log_below = F.log_softmax(torch.add(hidden, both, alpha=upper / lower), dim=2)
        p, q = log_below.softmax(dim=2)
        p -= q
        log_p, log_q = log_below
        mcd = log_q.sub_(log_p).mul_(q).sum(dim=1).dot(shares)
        ctx.save_for_backward(within[: len(v)], column, slope, p, shares[:, None])
        ctx.temperatures = temperatures
        return scd * upper**2, mcd * lower**2

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None, None]:
        within, column, slope, difference, shares = ctx.saved_tensors
        # T² of the term, 1 / T of the logits
        of_scd, of_mcd = (shares * (g * t) for g, t in zip(grads, ctx.temperatures, strict=True))
        slope = slope * of_scd
        gradient = (within * -slope).scatter_(1, column, slope)
        return gradient.addcmul_(difference, of_mcd), None, None, None, None


def rld_terms(
    logits_student: Tensor,
    logits_teacher: Tensor,
    target: Tensor,
    alpha_temperature: float,
    temperature: float,
) -> tuple[Tensor, Tensor]:
    """SCD and MCD, two scalars: means over the labelled samples.

    Args:
        logits_student, logits_teacher: [N, C], C >= 2.
        target: [N] class indices, or [N, C] probabilities of which the largest counts.
        alpha_temperature, temperature: of SCD and of MCD, > 0.
    """
    column, labelled = target_column(target)
    z, v = full_precision([logits_student, logits_teacher])
    shares = labelled_shares(labelled, z.dtype)
    scd, mcd = _Terms.apply(z, v, column, shares, (alpha_temperature, temperature))
    return scd, mcd


def rld_loss(
    logits_student: Tensor,
    logits_teacher: Tensor,
    target: Tensor,
    alpha: float,
    beta: float,
    alpha_temperature: float,
    temperature: float,
) -> Tensor:
    """alpha * SCD + beta * MCD, a scalar; see :func:`rld_terms`."""
    scd, mcd = rld_terms(logits_student, logits_teacher, target, alpha_temperature, temperature)
    return alpha * scd + beta * mcd


@DISTILLERS.register(
    "RLD",
    config={
        "CE_WEIGHT": 1.0,
        "ALPHA": 1.0,
        "BETA": 8.0,
        "ALPHA_T": 1.0,
        "T": 4.0,
        "WARMUP": 20,
    },
)
class RLD(Distiller):
    """Confidence in the label, and the classes below it, from a teacher that may be wrong.

    The unweighted terms are kept as metrics `scd` and `mcd`.
    """

    takes_standardized_logits = True
    teacher_logits_only = True

    def __init__(self, student: nn.Module, teacher: nn.Module, cfg: Any):
        super().__init__(student, teacher, cfg)
        node = cfg.RLD
        self.ce_loss_weight = node.CE_WEIGHT
        self.alpha, self.beta = node.ALPHA, node.BETA
        self.alpha_temperature = require_positive("RLD.ALPHA_T", node.ALPHA_T)
        self.temperature = require_positive("RLD.T", node.T)
        self.warmup = node.WARMUP

    def distill(self, student: Output, teacher: Output, target: Tensor, **batch: Any) -> Tensor:
        temperatures = self.alpha_temperature, self.temperature
        scd, mcd = rld_terms(student.logits, teacher.logits, target, *temperatures)
        self.metrics = {"scd": scd.detach(), "mcd": mcd.detach()}
        return warmup_factor(batch["epoch"], self.warmup) * (self.alpha * scd + self.beta * mcd)
