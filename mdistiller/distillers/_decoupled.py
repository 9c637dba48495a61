"""The softmax split into the target class and the others, as DKD and its successors need it."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from mdistiller.distillers._common import IGNORE_INDEX


def target_mask(target: Tensor, classes: int) -> tuple[Tensor, Tensor]:
    """Where each sample's target class is, bool [N, C], and which samples have one, bool [N].

    Args:
        target: [N] class indices, IGNORE_INDEX where unlabelled (class 0 is marked there); or
            [N, C] class probabilities, of which the largest counts.
    """
    if target.is_floating_point():
        target = target.argmax(dim=1)
    labelled = target != IGNORE_INDEX
    return F.one_hot(target.masked_fill(~labelled, 0), classes).bool(), labelled


def decoupled_log_probs(logits: Tensor, is_target: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Split log-softmax into target, rest, and the distribution within the rest.

    Args:
        logits: [N, C], already divided by the temperature.
        is_target: [N, C] bool, one True a row.

    Returns:
        log p_t [N]; log(1 - p_t) [N]; log r [N, C] with 0 in the target's place.
    """
    log_p = F.log_softmax(logits, dim=1)
    log_target = log_p.masked_fill(~is_target, 0.0).sum(dim=1)
    log_rest = log_p.masked_fill(is_target, float("-inf")).logsumexp(dim=1)
    # From the logits: log_p - log_rest would lose digits where the target dominates.
    log_within = F.log_softmax(logits.masked_fill(is_target, float("-inf")), dim=1)
    return log_target, log_rest, log_within.masked_fill(is_target, 0.0)


def labelled_mean(rows: Tensor, labelled: Tensor) -> Tensor:
    """Mean of `rows` [N] over the labelled samples; 0 if there are none."""
    return rows.masked_fill(~labelled, 0.0).sum() / labelled.sum().clamp(min=1)
