"""Stages of training before the main one: their settings, and the modules they train."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from mdistiller.distillers.helpers.features.shapes import blank_image, preserve_state
from mdistiller.distillers.helpers.training.checks import logits_and_features
from mdistiller.distillers.helpers.training.settings import require_positive
from mdistiller.registry import UserError

INIT: dict[str, Any] = {
    "EPOCHS": 30,  # 0: no such stage
    "LR": 0.0,  # 0: that of SOLVER
    "LR_DECAY_STAGES": [],  # empty: constant
    "LR_DECAY_RATE": 0.1,
}
"""Defaults of a method's config node INIT, read by :meth:`InitPlan.read`."""


@dataclass(frozen=True)
class InitPlan:
    """Length and learning rate of a stage; `lr` 0 means SOLVER.LR."""

    epochs: int
    lr: float
    decay_stages: Sequence[int]
    decay_rate: float

    @classmethod
    def read(cls, method: str, cfg: Any) -> InitPlan:
        """The plan in the INIT node of `method`."""
        node = cfg[method].INIT
        for key in ("EPOCHS", "LR"):
            if node[key] < 0:
                raise UserError(f"{method}.INIT.{key} must be at least 0, got {node[key]}")
        require_positive(f"{method}.INIT.LR_DECAY_RATE", node.LR_DECAY_RATE)
        return cls(node.EPOCHS, node.LR, list(node.LR_DECAY_STAGES), node.LR_DECAY_RATE)


def require_transfer(method: str, plan: InitPlan, weight: float) -> None:
    """Refuse a method that neither initialises nor distils in the main stage."""
    if not plan.epochs and not weight:
        raise UserError(
            f"{method}.INIT.EPOCHS 0 and {method}.LOSS.FEAT_WEIGHT 0 leave {method} without "
            "effect: set the first for two stages, the second for one"
        )


def stage_modules(
    net: nn.Module, stage: int, image_size: Sequence[int] | None = None
) -> list[nn.Module]:
    """The outermost modules of `net` all of whose parameters influence `feats[stage]`.

    These are the stem and the stages up to this one. For the CIFAR zoo they equal RepDistiller's
    lists of feature modules, without the classifier, WRN's last batch norm and the last
    convolution of MobileNetV2 and ShuffleNetV2. `net` keeps its state.
    """
    params = [param for param in net.parameters() if param.requires_grad]
    with preserve_state(net), torch.enable_grad():
        _, features = logits_and_features(net(blank_image(net, image_size)), net)
        gradients = torch.autograd.grad(features["feats"][stage].sum(), params, allow_unused=True)
    reached = {id(p) for p, gradient in zip(params, gradients, strict=True) if gradient is not None}

    def outermost(module: nn.Module) -> list[nn.Module]:
        ids = [id(param) for param in module.parameters()]
        if ids and reached.issuperset(ids):
            return [module]
        return [inner for child in module.children() for inner in outermost(child)]

    return outermost(net)
