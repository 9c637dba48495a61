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
from typing import Any

import torch
from torch import Tensor, nn

from mdistiller.distillers._base import DISTILLERS
from mdistiller.distillers._peers import PeerMethod
from mdistiller.distillers.helpers.losses.logit_losses import kd_loss
from mdistiller.distillers.helpers.training.settings import require_positive


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

    def __init__(
        self,
        student: nn.Module,
        teacher: nn.Module | None,
        cfg: Any,
        peers: Sequence[nn.Module] = (),
    ):
        super().__init__(student, teacher, cfg, peers)
        self.temperature = require_positive("DML.T", cfg.DML.T)
        self.ce_loss_weight = cfg.DML.LOSS.CE_WEIGHT
        self.kd_loss_weight = cfg.DML.LOSS.KD_WEIGHT

    def peer_losses(self, logits: list[Tensor], target: Tensor) -> list[Tensor]:
        return [self.kd_loss_weight * loss for loss in dml_losses(logits, self.temperature)]
