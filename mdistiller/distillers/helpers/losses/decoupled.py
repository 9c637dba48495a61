"""The softmax split into the target class and the others, or into groups of classes, as DKD and its
successors need it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from mdistiller.distillers.helpers.losses.numerics import IGNORE_INDEX

HIDDEN = -1e38
"""Added to a logit within ±1e30 (`scale_logits`) it leaves a probability of 0. Added to all logits
of a sample, it makes them equal in float32."""


def target_column(target: Tensor) -> tuple[Tensor, Tensor]:
    """Each sample's target class, [N, 1] (0 if unlabelled), and which samples have one, bool [N].

    Args:
        target: [N] class indices, IGNORE_INDEX where unlabelled; or [N, C] class probabilities, of
            which the largest counts.
    """
    if target.is_floating_point():
        target = target.argmax(dim=1)
    return target.clamp(min=0)[:, None], target != IGNORE_INDEX


def target_mask(target: Tensor, classes: int) -> tuple[Tensor, Tensor]:
    """:func:`target_column` with the classes marked: bool [N, C], and bool [N]."""
    column, labelled = target_column(target)
    return F.one_hot(column[:, 0], classes).bool(), labelled


def rest_log_probs(logits: Tensor, column: Tensor) -> tuple[Tensor, Tensor]:
    """The classes other than the target: logsumexp of their logits, and their log-softmax.

    Args:
        logits: [N, C], already divided by the temperature.
        column: [N, 1] target classes; or [N, k], k < C different classes that are all left out.

    Returns:
        [N, 1]; log r [N, C] with 0 in the place of the target, or of all k.
    """
    rest = logits.scatter(1, column, float("-inf"))
    log_sum = rest.logsumexp(dim=1, keepdim=True)
    return log_sum, (rest - log_sum).scatter(1, column, 0.0)


def decoupled_log_probs(logits: Tensor, column: Tensor) -> tuple[Tensor, Tensor]:
    """Split log-softmax into target, rest, and the distribution within the rest.

    p_t is the logistic function of the target's logit less the logsumexp of the others; so no
    digits are lost where either side dominates.

    Args: as of :func:`rest_log_probs`.

    Returns:
        log of b = (p_t, 1 - p_t), [N, 2]; log r [N, C] with 0 in the target's place.
    """
    log_sum, log_within = rest_log_probs(logits, column)
    odds = logits.gather(1, column) - log_sum
    return F.logsigmoid(torch.cat([odds, -odds], dim=1)), log_within


def binary_split(logits: Tensor, column: Tensor) -> tuple[Tensor, Tensor]:
    """log of b = (p_t, 1 - p_t), [N, 2], and the softmax within the rest, 0 for the target, [N, C].

    Without logarithms of r it takes a third of the time of :func:`decoupled_log_probs`; it is for
    gradients in closed form and has none by autograd. Args: as there.
    """
    rest = logits.scatter(1, column, HIDDEN)
    within = rest.softmax(dim=1)
    # the largest probability is 1 / sum_c exp(rest_c - max)
    log_sum = rest.amax(dim=1, keepdim=True) - within.amax(dim=1, keepdim=True).log()
    odds = logits.gather(1, column) - log_sum
    return F.logsigmoid(torch.cat([odds, -odds], dim=1)), within


def group_log_probs(logits: Tensor, columns: Sequence[Tensor]) -> tuple[Tensor, list[Tensor]]:
    """Split log-softmax into several groups of classes, and the distribution within each.

    Args:
        logits: [N, C], already divided by the temperature.
        columns: classes of every group but the last, [N, k] each, none twice; the last group is
            all other classes. Without other classes, there is no such group.

    Returns:
        log of the groups' probabilities, [N, groups]; log-softmax within each of them: [N, k] and,
        for the last, [N, C] with 0 in the place of the classes in `columns`.
    """
    heads = [logits.gather(1, column) for column in columns]
    sums = [head.logsumexp(dim=1, keepdim=True) for head in heads]
    within = [head - log_sum for head, log_sum in zip(heads, sums, strict=True)]
    if sum(column.shape[1] for column in columns) < logits.shape[1]:
        log_sum, rest = rest_log_probs(logits, torch.cat(list(columns), dim=1))
        sums.append(log_sum)
        within.append(rest)
    if len(sums) == 2:  # no digits are lost where either side dominates
        odds = sums[0] - sums[1]
        return F.logsigmoid(torch.cat([odds, -odds], dim=1)), within
    return F.log_softmax(torch.cat(sums, dim=1), dim=1), within


def labelled_shares(labelled: Tensor, dtype: torch.dtype) -> Tensor:
    """Each sample's share in a mean over the labelled ones, [N]; 0 without a label."""
    ones = labelled.to(dtype)
    return ones / ones.sum().clamp(min=1)


def labelled_rows(rows: Tensor, labelled: Tensor) -> Tensor:
    """`rows` [N], all finite, scaled so that their mean is :func:`labelled_mean`."""
    return rows * labelled_shares(labelled, rows.dtype) * len(rows)


def labelled_mean(rows: Tensor, labelled: Tensor) -> Tensor:
    """Mean of `rows` [N], all finite, over the labelled samples; 0 if there are none."""
    return torch.dot(rows, labelled_shares(labelled, rows.dtype))
