"""Losses on logits that several methods share: those of KD, DKD and NKD.

The formulas are in KD.py, DKD.py and NKD.py, which give these functions under their names. Methods
import them from here: a fork's file may then take the place of any method's.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from mdistiller.distillers.helpers.losses.decoupled import (
    decoupled_log_probs,
    labelled_shares,
    rest_log_probs,
    target_column,
)
from mdistiller.distillers.helpers.losses.divergence import Divergence
from mdistiller.distillers.helpers.losses.numerics import divergence, scale_logits


def kd_rows(
    logits_student: Tensor,
    logits_teacher: Tensor,
    temperature: float | Tensor,
    form: Divergence = divergence,
) -> Tensor:
    """Kullback-Leibler divergence of softened predictions times T², for each sample: [N].

    Args:
        logits_student, logits_teacher: [N, C].
        temperature: T > 0, a number or a tensor with one value.
        form: what is measured in place of the Kullback-Leibler divergence.
    """
    log_p, log_q = _kd_log_probs(logits_student, logits_teacher, temperature)
    return form(log_q, log_p) * temperature**2


def kd_loss(
    logits_student: Tensor,
    logits_teacher: Tensor,
    temperature: float | Tensor,
    form: Divergence = divergence,
) -> Tensor:
    """Mean of :func:`kd_rows`, a scalar.

    Args:
        form: what is measured in place of the Kullback-Leibler divergence.
    """
    log_p, log_q = _kd_log_probs(logits_student, logits_teacher, temperature)
    # one sum over all samples is cheaper than that of each and their mean
    return form(log_q, log_p, dim=None) * (temperature**2 / len(log_p))


def _kd_log_probs(
    logits_student: Tensor, logits_teacher: Tensor, temperature: float | Tensor
) -> tuple[Tensor, Tensor]:
    log_p = F.log_softmax(scale_logits(logits_student, temperature), dim=1)
    return log_p, F.log_softmax(scale_logits(logits_teacher, temperature), dim=1)


def dkd_rows(
    logits_student: Tensor,
    logits_teacher: Tensor,
    target: Tensor,
    temperature: float | Tensor,
    form: Divergence = divergence,
) -> tuple[Tensor, Tensor]:
    """TCKD and NCKD of each sample, [N] both, with the factor T².

    Args:
        logits_student, logits_teacher: [N, C], C >= 2 (with two classes NCKD is 0).
        target: [N] class indices, or [N, C] probabilities of which the largest counts; rows with
            IGNORE_INDEX mean nothing.
        temperature: T > 0; as a tensor with one value, or [N, 1] for one of each sample.
        form: what is measured in place of the Kullback-Leibler divergence.
    """
    column = target_column(target)[0]
    binary, within = _dkd_rows(logits_student, logits_teacher, column, temperature, form)
    square = _square(temperature)
    return binary * square, within * square


def dkd_terms(
    logits_student: Tensor,
    logits_teacher: Tensor,
    target: Tensor,
    temperature: float | Tensor,
    form: Divergence = divergence,
) -> tuple[Tensor, Tensor]:
    """TCKD and NCKD, two scalars: means of :func:`dkd_rows` over the labelled samples.

    Args:
        form: what is measured in place of the Kullback-Leibler divergence.
    """
    column, labelled = target_column(target)
    binary, within = _dkd_rows(logits_student, logits_teacher, column, temperature, form)
    shares = labelled_shares(labelled, binary.dtype) * _square(temperature)
    return torch.dot(binary, shares), torch.dot(within, shares)


def _square(temperature: float | Tensor) -> float | Tensor:
    """T²: a number, or one for every sample, [1] or [N]."""
    square = temperature**2
    return square.flatten() if isinstance(square, Tensor) else square


def _dkd_rows(
    logits_student: Tensor,
    logits_teacher: Tensor,
    column: Tensor,
    temperature: float | Tensor,
    form: Divergence = divergence,
) -> tuple[Tensor, Tensor]:
    """:func:`dkd_rows` without T²."""
    (s_binary, s_within), (t_binary, t_within) = (
        decoupled_log_probs(scale_logits(z, temperature), column)
        for z in (logits_student, logits_teacher)
    )
    return form(t_binary, s_binary), form(t_within, s_within)


def dkd_loss(
    logits_student: Tensor,
    logits_teacher: Tensor,
    target: Tensor,
    alpha: float,
    beta: float,
    temperature: float | Tensor,
) -> Tensor:
    """alpha * TCKD + beta * NCKD (equation 7 of the paper), a scalar; see :func:`dkd_terms`."""
    tckd, nckd = dkd_terms(logits_student, logits_teacher, target, temperature)
    return alpha * tckd + beta * nckd


def nkd_rows(
    logits_student: Tensor, logits_teacher: Tensor, target: Tensor, temperature: float
) -> tuple[Tensor, Tensor]:
    """The target's term, and that of the other classes with its T², of each sample: [N] both.

    Args:
        logits_student, logits_teacher: [N, C], C >= 2.
        target: [N] class indices, or [N, C] probabilities; rows with IGNORE_INDEX mean nothing.
        temperature: T > 0, of the other classes only.
    """
    column, _ = target_column(target)
    both = logits_student, logits_teacher
    s_target, t_target = (
        F.log_softmax(scale_logits(z, 1.0), dim=1).gather(1, column).squeeze(1) for z in both
    )
    s_within, t_within = (rest_log_probs(scale_logits(z, temperature), column)[1] for z in both)
    others = -(t_within.exp() * s_within).sum(dim=1) * temperature**2
    return -t_target.exp() * s_target, others
