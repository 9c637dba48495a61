"""KDCL. Guo, Wang, Wu, Yu, Liang, Hu, Luo: Online Knowledge Distillation via Collaborative
Learning, CVPR 2020.

K networks (the student and DISTILLER.PEERS) are trained at once, each on the cross-entropy and on
soft targets that their logits z_1 ... z_K make together:

    loss of the k-th = T^2 / N * sum_n KL(softmax(e_n / T) || softmax(z_k,n / T))

without gradient to e. TARGET chooses e for a sample with label y:

    naive      the logits of the network whose cross-entropy on the sample is least
    minlogit   e_c = min over k of (z_k,c - z_k,y): the label's logit is 0 in all of them
    mean       e_c = mean over k of z_k,c
    linear     e = sum_k a_k z_k, where a >= 0 with sum 1 minimises the cross-entropy of e, averaged
               over the labelled samples of the process's batch

All but mean are averaged over the labelled samples. linear takes a fixed number of accelerated
mirror-descent steps from equal weights, so that the step waits for nothing. The paper's fifth
target, with weights from the errors on held-out images, is not here, and neither is its
augmentation of the image for each network apart: all see the same one. The defaults, T 2 and both
weights 1, are ours.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mdistiller.distillers._base import DISTILLERS
from mdistiller.distillers._peers import PeerMethod
from mdistiller.distillers.helpers.losses.decoupled import (
    labelled_mean,
    labelled_shares,
    target_column,
)
from mdistiller.distillers.helpers.losses.logit_losses import kd_rows
from mdistiller.distillers.helpers.losses.numerics import scale_logits
from mdistiller.distillers.helpers.training.settings import require_one_of

TARGETS = ("naive", "minlogit", "mean", "linear")
STEPS = 50  # of the weights of `linear`


@torch.no_grad()
def ensemble(
    logits: Sequence[Tensor], column: Tensor, target: str, labelled: Tensor | None = None
) -> Tensor:
    """e [N, C] of the networks' logits [N, C] and the labels [N, 1]; `target` is one of TARGETS.

    Args:
        labelled: which samples have a label, bool [N]; by default all.
    """
    stacked = torch.stack([scale_logits(z, 1.0) for z in logits])
    if target == "mean":
        return stacked.mean(dim=0)
    index = column.expand(len(stacked), -1, -1)
    if target == "linear":
        labelled = torch.ones_like(column[:, 0], dtype=torch.bool) if labelled is None else labelled
        weights = linear_weights(stacked, index, labelled_shares(labelled, stacked.dtype))
        return torch.einsum("k,knc->nc", weights, stacked)
    if target == "minlogit":
        return (stacked - stacked.gather(2, index)).amin(dim=0)
    right = F.log_softmax(stacked, dim=2).gather(2, index)
    best = right.argmax(dim=0, keepdim=True)
    return stacked.gather(0, best.expand(-1, -1, stacked.shape[2]))[0]


def linear_weights(stacked: Tensor, index: Tensor, shares: Tensor) -> Tensor:
    """The weights [K], on the simplex, whose mix of logits has the least cross-entropy.

    Only differences between the networks count. With entropy as the distance, the mean of half
    their squared ranges bounds the curvature, and Tseng's accelerated descent stays on the simplex.

    Args:
        stacked: logits, [K, N, C].
        index: the labels, [K, N, 1].
        shares: weights of the samples in the mean, [N].
    """
    mean = stacked.mean(dim=0)
    apart = stacked - mean
    ranges = (apart.amax(dim=2) - apart.amin(dim=2)).amax(dim=0)
    curvature = torch.dot(shares, ranges.clamp(1e-6, 1e18).square() / 4).clamp(min=1e-12)
    right = apart.gather(2, index)[:, :, 0]
    scores = apart.new_zeros(len(apart))  # log-weights of the mirror point
    weights = mirror = scores.softmax(dim=0)
    for step in range(STEPS):
        theta = 2 / (step + 2)
        between = (1 - theta) * weights + theta * mirror
        probs = torch.einsum("k,knc->nc", between, apart).add(mean).softmax(dim=1)
        gradient = (((apart * probs).sum(dim=2) - right) * shares).sum(dim=1)
        scores = scores - gradient / (theta * curvature)
        mirror = scores.softmax(dim=0)
        weights = (1 - theta) * weights + theta * mirror
    return weights


def kdcl_losses(
    logits: Sequence[Tensor], target: Tensor, temperature: float, kind: str
) -> list[Tensor]:
    """The loss of each network, scalars.

    Args:
        logits: [N, C] of each network.
        target: [N] class indices, IGNORE_INDEX where unlabelled; or [N, C] probabilities, of which
            the largest counts.
        kind: one of TARGETS.
    """
    column, labelled = target_column(target)
    taught = ensemble(logits, column, kind, labelled)
    counts = torch.ones_like(labelled) if kind == "mean" else labelled
    return [labelled_mean(kd_rows(z, taught, temperature), counts) for z in logits]


@DISTILLERS.register(
    "KDCL",
    config={
        "TARGET": "minlogit",  # or naive, mean, linear
        "T": 2.0,
        "LOSS": {"CE_WEIGHT": 1.0, "KD_WEIGHT": 1.0},
    },
)
class KDCL(PeerMethod):
    """Collaborative learning: each network matches soft targets made of all their logits."""

    section = "KDCL"

    def __init__(
        self,
        student: nn.Module,
        teacher: nn.Module | None,
        cfg: Any,
        peers: Sequence[nn.Module] = (),
    ):
        super().__init__(student, teacher, cfg, peers)
        self.kind = require_one_of("KDCL.TARGET", cfg.KDCL.TARGET, TARGETS)

    def peer_losses(self, logits: list[Tensor], target: Tensor) -> list[Tensor]:
        return kdcl_losses(logits, target, self.temperature, self.kind)
