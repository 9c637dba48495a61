"""Label smoothing and class weights of the cross-entropy with the labels."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mdistiller.distillers import Distiller
from mdistiller.registry import UserError


def set_hard_label_loss(distiller: Distiller, cfg: Any, data: Any) -> None:
    """Apply SOLVER.LABEL_SMOOTHING and DISTILLER.CLASS_WEIGHTS to a method.

    Args:
        data: of the run; its training images are counted.

    Raises:
        UserError: the method does not use them, or there is not one weight for each class.
    """
    smoothing = cfg.SOLVER.get("LABEL_SMOOTHING", 0.0)
    weights = class_weights(cfg, data)
    for key, wanted in (
        ("SOLVER.LABEL_SMOOTHING", smoothing > 0),
        ("DISTILLER.CLASS_WEIGHTS", weights is not None),
    ):
        if wanted and not distiller.uses_hard_label_loss:
            name = type(distiller).__name__
            raise UserError(
                f"{key} has no effect on DISTILLER.TYPE {cfg.DISTILLER.TYPE}, which computes its "
                f"cross-entropy itself: call self.hard_label_loss(logits, target) in {name} and "
                "set uses_hard_label_loss = True, or leave the key out"
            )
        if wanted and distiller.ce_loss_weight == 0:
            raise UserError(
                f"{key} has no effect: the cross-entropy of DISTILLER.TYPE {cfg.DISTILLER.TYPE} "
                "has the weight 0; leave the key out, or raise CE_WEIGHT"
            )
    distiller.label_smoothing = smoothing or distiller.label_smoothing
    distiller.ce_class_weights = weights


def class_weights(cfg: Any, data: Any) -> Tensor | None:
    """The weights that DISTILLER.CLASS_WEIGHTS describes, float32 [C]; None: all are 1.

    Their mean over the images that an epoch shows is 1: the cross-entropy keeps its size.
    """
    given = cfg.DISTILLER.get("CLASS_WEIGHTS", "none")
    if given == "none":
        return None
    if not data.num_classes:
        raise UserError("DISTILLER.CLASS_WEIGHTS needs images with classes: set it to none")
    counts = data.train.dataset.targets.bincount(minlength=data.num_classes).cpu().double()
    balanced = cfg.DATASET.get("SAMPLER", "default") == "balanced"
    if given == "inverse" and balanced:
        raise UserError(
            "DISTILLER.CLASS_WEIGHTS inverse and DATASET.SAMPLER balanced both make rare classes "
            "count more, twice together: choose one of them"
        )
    present = (counts > 0).double()
    weights = present / counts.clamp(min=1) if given == "inverse" else torch.tensor(given).double()
    if len(weights) != data.num_classes:
        raise UserError(
            f"DISTILLER.CLASS_WEIGHTS has {len(weights)} weights, but the data have "
            f"{data.num_classes} classes ({data.classes[0]} to {data.classes[-1]}): give one for "
            "each"
        )
    shown = present if balanced else counts
    mean = weights @ shown / shown.sum()
    if not mean > 0:
        raise UserError(
            "DISTILLER.CLASS_WEIGHTS are 0 for all classes that have training images: raise one"
        )
    return (weights / mean).float()
