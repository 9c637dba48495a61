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
    general    e = sum_k w_k z_k with w = C^-1 1 / (1^T C^-1 1), which minimises w^T C w, the mix's
               squared error on the held-out images (DATASET.VAL_SPLIT): C_kl is the mean of
               (p_k - t)^T (p_l - t) with p_k = softmax(z_k) and t the label as a one-hot vector

naive, minlogit and linear are averaged over the labelled samples. linear takes a fixed number of
accelerated mirror-descent steps from equal weights, so that the step waits for nothing. general
finds w after each epoch, begins with equal weights, and adds RIDGE times the mean of C's diagonal
to that, as networks that agree would make C singular; the formula lets weights be negative.

Ours: p for the network's output in C, T 2 and both weights 1. The paper's augmentation of the image
for each network apart is not here: all see the same one.
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
from mdistiller.registry import UserError

TARGETS = ("naive", "minlogit", "mean", "linear", "general")
STEPS = 50  # of the weights of `linear`
RIDGE = 1e-6


@torch.no_grad()
def ensemble(
    logits: Sequence[Tensor],
    column: Tensor,
    target: str,
    labelled: Tensor | None = None,
    weights: Tensor | None = None,
) -> Tensor:
    """e [N, C] of the networks' logits [N, C] and the labels [N, 1]; `target` is one of TARGETS.

    Args:
        labelled: which samples have a label, bool [N]; by default all.
        weights: of the networks, [K], for "general"; by default equal.
    """
    stacked = torch.stack([scale_logits(z, 1.0) for z in logits])
    if target == "general" and weights is not None:
        return torch.einsum("k,knc->nc", weights.to(stacked.dtype), stacked)
    if target in ("mean", "general"):
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


def error_products(logits: Sequence[Tensor], target: Tensor) -> Tensor:
    """C times the number of samples, [K, K], of logits [N, C] each and their labels [N]."""
    probabilities = torch.stack([scale_logits(z, 1.0).softmax(dim=1) for z in logits])
    errors = (probabilities - F.one_hot(target, probabilities.shape[2])).flatten(1)
    return errors @ errors.T


def general_weights(products: Tensor) -> Tensor:
    """w [K], float64 on the CPU, from C [K, K] or a multiple of it."""
    c = products.detach().cpu().double()
    c = c / c.diagonal().mean().clamp(min=1e-30)
    c = c + RIDGE * torch.eye(len(c), dtype=c.dtype)
    weights = torch.linalg.solve(c, torch.ones(len(c), dtype=c.dtype))
    return weights / weights.sum()


def kdcl_losses(
    logits: Sequence[Tensor],
    target: Tensor,
    temperature: float,
    kind: str,
    weights: Tensor | None = None,
) -> list[Tensor]:
    """The loss of each network, scalars.

    Args:
        logits: [N, C] of each network.
        target: [N] class indices, IGNORE_INDEX where unlabelled; or [N, C] probabilities, of which
            the largest counts.
        kind: one of TARGETS.
        weights: see :func:`ensemble`.
    """
    column, labelled = target_column(target)
    taught = ensemble(logits, column, kind, labelled, weights)
    counts = torch.ones_like(labelled) if kind in ("mean", "general") else labelled
    return [labelled_mean(kd_rows(z, taught, temperature), counts) for z in logits]


@DISTILLERS.register(
    "KDCL",
    config={
        "TARGET": "minlogit",  # or naive, mean, linear, general
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
        self.weights: Tensor | None
        self.register_buffer("weights", None)
        if self.kind == "general":
            if not cfg.DATASET.VAL_SPLIT:
                raise UserError(
                    "KDCL.TARGET general weights the networks by their errors on held-out images: "
                    "set DATASET.VAL_SPLIT to their number, or choose another TARGET"
                )
            count = len(self.students())
            self.weights = torch.full((count,), 1 / count)
            self.reads_held_out = True

    def peer_losses(self, logits: list[Tensor], target: Tensor) -> list[Tensor]:
        return kdcl_losses(logits, target, self.temperature, self.kind, self.weights)

    def held_out_sums(self, logits: list[Tensor], target: Tensor) -> Tensor:
        return error_products(logits, target)

    def take_held_out(self, total: Tensor) -> dict[str, float]:
        assert self.weights is not None
        self.weights.copy_(general_weights(total))
        return {f"kdcl_weight{k}": value for k, value in enumerate(self.weights.tolist())}
