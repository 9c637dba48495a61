"""What DML and KDCL share: several networks that are trained at once and teach one another."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from mdistiller.distillers._base import Distiller, Losses
from mdistiller.distillers.helpers.losses.numerics import full_precision
from mdistiller.distillers.helpers.training.checks import logits_and_features
from mdistiller.distillers.helpers.training.settings import require_positive


def like(net: nn.Module) -> nn.Module:
    """A copy of a network with new random weights, as `reset_parameters` of its modules draws."""
    other = copy.deepcopy(net)
    for module in other.modules():
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()  # type: ignore[operator]
    return other


class PeerMethod(Distiller):
    """Networks that learn from the labels and from one another; the student is the first.

    Each has its cross-entropy and the distillation loss of :meth:`peer_losses`; `loss_ce` and
    `loss_kd` are the sums over the networks, so that each learns as fast as alone. The metric
    `peer1_loss` is what the first peer beside the student adds to both. The student alone
    predicts.

    Attributes:
        section: the method's node of the config, with T, LOSS.CE_WEIGHT and LOSS.KD_WEIGHT.
        reads_held_out: whether to call :meth:`take_held_out` after each epoch.

    Args:
        peers: the other networks (DISTILLER.PEERS); by default one like the student.
    """

    section: str
    uses_teacher = False
    uses_hard_label_loss = True
    trains_peers = True
    reads_held_out = False
    soft_labels = True

    def __init__(
        self,
        student: nn.Module,
        teacher: nn.Module | None,
        cfg: Any,
        peers: Sequence[nn.Module] = (),
    ):
        super().__init__(student, None)
        self.peers = nn.ModuleList(peers or [like(student)])
        node = cfg[self.section]
        self.temperature = require_positive(f"{self.section}.T", node.T)
        self.ce_loss_weight = node.LOSS.CE_WEIGHT
        self.kd_loss_weight = node.LOSS.KD_WEIGHT

    def students(self) -> list[nn.Module]:
        return [self.student, *self.peers]

    def held_out_sums(self, logits: list[Tensor], target: Tensor) -> Tensor:
        """What :meth:`take_held_out` needs of a held-out batch; added up over the batches."""
        raise NotImplementedError

    def take_held_out(self, total: Tensor) -> dict[str, float]:
        """Learn from those sums, over all processes; returns numbers for the epoch's record."""
        raise NotImplementedError

    def peer_losses(self, logits: list[Tensor], target: Tensor) -> list[Tensor]:
        """The distillation loss of each network, unweighted scalars in order.

        Args:
            logits: [N, C] of each network.
            target: [N] class indices, IGNORE_INDEX where unlabelled; or [N, C] probabilities.
        """
        raise NotImplementedError

    def all_logits(self, image: Tensor) -> list[Tensor]:
        """Logits [N, C] of each network."""
        return [full_precision(logits_and_features(net(image), net)[0]) for net in self.students()]

    def forward_train(self, image: Tensor, target: Tensor, **batch: Any) -> tuple[Tensor, Losses]:
        logits = self.all_logits(image)
        with torch.autocast(image.device.type, enabled=False):
            ce = [self.ce_loss_weight * self.hard_label_loss(z, target) for z in logits]
            kd = [self.kd_loss_weight * loss for loss in self.peer_losses(logits, target)]
            terms = zip(ce[1:], kd[1:], strict=True)
            self.metrics = {f"peer{k}_loss": (a + b).detach() for k, (a, b) in enumerate(terms, 1)}
            losses = {"loss_ce": torch.stack(ce).sum(), "loss_kd": torch.stack(kd).sum()}
        return logits[0], losses
