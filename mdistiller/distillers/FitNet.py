"""FITNET. Romero, Ballas, Kahou, Chassang, Gatta, Bengio: FitNets: Hints for Thin Deep Nets,
ICLR 2015, arXiv 1412.6550.

With a regressor R (convolution, batch norm, ReLU) and the feature maps F of one layer:

    loss = mean((R(F_student) - F_teacher)^2)

Trained in one stage with the cross-entropy; the paper trains the lower half of the student by hints
first. R ends in a ReLU, so it never reaches the negative values of teachers with signed maps (WRN).

HINT_LAYERS names several layers: their losses add up, and each R is a 1x1 convolution alone (for
the pyramids of detectors, whose maps are signed).
"""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor, nn

from mdistiller.distillers._base import DISTILLERS, Distiller, Output
from mdistiller.distillers.helpers.features.connectors import ConvReg
from mdistiller.distillers.helpers.features.shapes import Size, get_feat_shapes, require_maps
from mdistiller.distillers.helpers.losses.map_losses import fitnet_loss
from mdistiller.distillers.helpers.training.settings import probe_size
from mdistiller.registry import UserError

__all__ = ["FitNet", "fitnet_loss"]

DEFAULTS: dict[str, Any] = {
    "HINT_LAYER": 2,
    "HINT_LAYERS": [],  # several, in place of HINT_LAYER
    "INPUT_SIZE": (32, 32),
    "LOSS": {"CE_WEIGHT": 1.0, "FEAT_WEIGHT": 100.0},
}


def hint_layer(wanted: int, layers: int) -> int:
    """HINT_LAYER where both networks have `layers`; its default is the last one of shallower nets.

    Raises:
        UserError: another layer that is not there.
    """
    if wanted == DEFAULTS["HINT_LAYER"] >= layers:
        warnings.warn(f"FITNET: no layer {wanted}; the hint is layer {layers - 1}", stacklevel=2)
        return layers - 1
    if wanted not in range(layers):
        raise UserError(
            f"FITNET.HINT_LAYER must be one of 0 to {layers - 1} for these networks, got {wanted}"
        )
    return wanted


@DISTILLERS.register("FITNET", config=DEFAULTS)
class FitNet(Distiller):
    """Hints: the student's map at layer HINT_LAYER (0 is the stem) predicts the teacher's.

    HINT_LAYERS names several in its place.
    """

    needs_teacher_classifier = False
    needs_labels = False
    soft_labels = True

    def __init__(self, student: nn.Module, teacher: nn.Module, cfg: Any, image_size: Size = None):
        super().__init__(student, teacher)
        self.ce_loss_weight = cfg.FITNET.LOSS.CE_WEIGHT
        self.feat_loss_weight = cfg.FITNET.LOSS.FEAT_WEIGHT
        size = probe_size("FITNET", cfg, DEFAULTS["INPUT_SIZE"], image_size)
        s_shapes, t_shapes = get_feat_shapes(student, teacher, size)
        require_maps("feats", [*s_shapes, *t_shapes])
        count = min(len(s_shapes), len(t_shapes))
        self.layers = [hint_layer(layer, count) for layer in cfg.FITNET.HINT_LAYERS]
        if self.layers:
            self.adapters = nn.ModuleList(
                nn.Conv2d(s_shapes[layer][1], t_shapes[layer][1], 1) for layer in self.layers
            )
            return
        layer = hint_layer(cfg.FITNET.HINT_LAYER, count)
        self.hint_layer = layer
        self.conv_reg = ConvReg(s_shapes[layer], t_shapes[layer])

    def distill(self, student: Output, teacher: Output, target: Tensor, **batch: Any) -> Tensor:
        s_maps, t_maps = student["feats"], teacher["feats"]
        if not self.layers:
            hint = self.conv_reg(s_maps[self.hint_layer])
            return self.feat_loss_weight * fitnet_loss(hint, t_maps[self.hint_layer])
        losses = [
            fitnet_loss(adapt(s_maps[layer]), t_maps[layer])
            for adapt, layer in zip(self.adapters, self.layers, strict=True)
        ]
        return self.feat_loss_weight * torch.stack(losses).sum()
