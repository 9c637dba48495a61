"""DML. Zhang, Xiang, Hospedales, Lu: Deep Mutual Learning, CVPR 2018, arXiv 1706.00384.

K networks (the student and DISTILLER.PEERS) are trained at once. With p_k = softmax(z_k / T) of the
k-th, its loss beside the cross-entropy is

    1 / (K - 1) * sum over l != k of T^2 / N * sum_n KL(p_l,n || p_k,n)

without gradient to the others. T = 1 and both weights 1 are the paper's formula. There, a network
is updated before the others compute their predictions anew; here, as in most implementations, one
forward pass of each gives all losses, and all are updated together.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mdistiller.distillers._base import DISTILLERS
from mdistiller.distillers._peers import PeerMethod
from mdistiller.distillers.helpers.losses.logit_losses import kd_loss


def dml_losses(logits: Sequence[Tensor], temperature: float) -> list[Tensor]:
    """The loss of each network, scalars, from the logits [N, C] of two or more."""
    return [
        torch.stack(
            [
                kd_loss(mine, other.detach(), temperature)
                for number, other in enumerate(logits)
                if number != k
            ]
        ).mean()
        for k, mine in enumerate(logits)
    ]


@DISTILLERS.register("DML", config={"T": 1.0, "LOSS": {"CE_WEIGHT": 1.0, "KD_WEIGHT": 1.0}})
class DML(PeerMethod):
    """Mutual learning: each network matches the class probabilities of all others."""

    section = "DML"

    def peer_losses(self, logits: list[Tensor], target: Tensor) -> list[Tensor]:
        return dml_losses(logits, self.temperature)
