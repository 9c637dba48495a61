"""REVIEWKD. Chen, Liu, Zhao, Jia: Distilling Knowledge via Knowledge Review, CVPR 2021,
arXiv 2104.09044.

Student features are walked from deep (the pooled vector as a 1x1 map) to shallow. Each is mapped
to MID channels, mixed with the residual r of the deeper ones by two learned gates (ABF), resized to
the teacher's size and mapped to its width:

    x = conv1(F_student);  x <- g0 * x + g1 * resize(r);  r <- resize(x);  out = conv2(r)

Each output is compared with the teacher's pre-activation of that level by HCL, a mean of squared
distances over a pyramid: the maps themselves (weight 1) and averages to 4, 2 and 1 positions a side
(1/2, 1/4, 1/8), as far as these are smaller than the maps.

    loss = REVIEWKD_WEIGHT * min(epoch / WARMUP_EPOCHS, 1) * sum over levels of HCL

MID is min(512, width of the student's pooled features) as in the original library, whose
MAX_MID_CHANNEL has no effect either; MID_CHANNELS sets it. Networks that return no pooled features
(a detector's pyramid) are compared by their maps alone. Where the networks have unequal numbers of
stages, those are compared that agree best in height (`helpers/features/stages.py`); the original
has no configs for such pairs. A teacher that returns no pre-activations (MobileNetV2, whose stages
end without ReLU; networks of timm and torchvision) gives the outputs of its stages instead, after a
ReLU if that is how they end.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from mdistiller.distillers._base import DISTILLERS, Distiller, Output
from mdistiller.distillers.helpers.features.shapes import FeatureShapes, Size, probe
from mdistiller.distillers.helpers.features.stages import pair_stages
from mdistiller.distillers.helpers.losses.map_losses import ABF, hcl_loss, review
from mdistiller.distillers.helpers.training.settings import (
    require_positive,
    resolve_setting,
    warmup_factor,
)
from mdistiller.registry import UserError

__all__ = ["ABF", "ReviewKD", "hcl_loss", "review"]

DEFAULTS: dict[str, Any] = {
    "CE_WEIGHT": 1.0,
    "REVIEWKD_WEIGHT": 1.0,
    "WARMUP_EPOCHS": 20,
    "SHAPES": [1, 8, 16, 32],
    "OUT_SHAPES": [1, 8, 16, 32],
    "IN_CHANNELS": [64, 128, 256, 256],
    "OUT_CHANNELS": [64, 128, 256, 256],
    "MAX_MID_CHANNEL": 512,
    "MID_CHANNELS": 0,  # 0: as the text above says
    "STU_PREACT": False,
}


def levels(features: Output, key: str, chosen: Sequence[int]) -> list[Tensor]:
    """The chosen maps of `features[key]`, then the pooled vector, if any, as a 1x1 map."""
    maps = [features[key][i] for i in chosen]
    if "pooled_feat" not in features.features:
        return maps
    return [*maps, features["pooled_feat"].flatten(1)[:, :, None, None]]


def choose_levels(
    student: Sequence[torch.Size], teacher: Sequence[torch.Size]
) -> tuple[list[int], list[int]]:
    """Which maps of either network are compared: equally many indices.

    All stages where the networks have equally many, else those of :func:`pair_stages`. The first
    map is the stem's and no stage; a student that returns none (MobileNetV1) shows it by sizes
    that equal those of the teacher's stages.
    """
    s_sizes, t_sizes = ([shape[2:] for shape in shapes] for shapes in (student, teacher))
    if s_sizes == t_sizes[1:]:
        return list(range(len(student))), list(range(1, len(teacher)))
    pairs = pair_stages([size[0] for size in s_sizes[1:]], [size[0] for size in t_sizes[1:]])
    return [i + 1 for i, _ in pairs], [j + 1 for _, j in pairs]


@DISTILLERS.register("REVIEWKD", config=DEFAULTS)
class ReviewKD(Distiller):
    """Knowledge review: deep student features help shallow ones to match the teacher's.

    The lists SHAPES, OUT_SHAPES (sides, deep to shallow), IN_CHANNELS, OUT_CHANNELS (shallow to
    deep) follow from the networks. Given ones are checked; sides only if `image_size` is known.
    """

    needs_teacher_classifier = False
    needs_labels = False
    soft_labels = True

    def __init__(self, student: nn.Module, teacher: nn.Module, cfg: Any, image_size: Size = None):
        super().__init__(student, teacher)
        node = cfg.REVIEWKD
        self.ce_loss_weight = node.CE_WEIGHT
        self.reviewkd_loss_weight = node.REVIEWKD_WEIGHT
        self.warmup_epochs = node.WARMUP_EPOCHS
        self.student_key = "preact_feats" if node.STU_PREACT else "feats"
        s_shapes, t_shapes = (probe(net, image_size) for net in (student, teacher))
        if self.student_key not in s_shapes:
            raise UserError(
                "REVIEWKD.STU_PREACT is set, but the student returns no preact_feats "
                "(its stages have no last ReLU); leave it at False"
            )
        self.teacher_key = "preact_feats" if "preact_feats" in t_shapes else "feats"
        self.chosen = choose_levels(s_shapes[self.student_key], t_shapes[self.teacher_key])
        lists = self._lists(s_shapes, t_shapes)
        for key, value in lists.items():
            if image_size is not None or "CHANNELS" in key:
                resolve_setting(f"REVIEWKD.{key}", node[key], DEFAULTS[key], value)
        mid_channels = node.MID_CHANNELS or min(512, lists["IN_CHANNELS"][-1])
        require_positive("REVIEWKD.MID_CHANNELS", mid_channels)
        blocks = [
            ABF(s, mid_channels, t, fuse=level < len(lists["IN_CHANNELS"]) - 1)
            for level, (s, t) in enumerate(
                zip(lists["IN_CHANNELS"], lists["OUT_CHANNELS"], strict=True)
            )
        ]
        self.abfs = nn.ModuleList(blocks[::-1])

    def _lists(self, student: FeatureShapes, teacher: FeatureShapes) -> dict[str, list[int]]:
        s_maps = [student[self.student_key][i] for i in self.chosen[0]]
        t_maps = [teacher[self.teacher_key][j] for j in self.chosen[1]]
        if "pooled_feat" in student:
            for maps, shapes in ((s_maps, student), (t_maps, teacher)):
                maps.append(torch.Size([1, shapes["pooled_feat"][1:].numel(), 1, 1]))
        return {
            "SHAPES": [shape[2] for shape in s_maps[::-1]],
            "OUT_SHAPES": [shape[2] for shape in t_maps[::-1]],
            "IN_CHANNELS": [shape[1] for shape in s_maps],
            "OUT_CHANNELS": [shape[1] for shape in t_maps],
        }

    def distill(self, student: Output, teacher: Output, target: Tensor, **batch: Any) -> Tensor:
        s_levels = levels(student, self.student_key, self.chosen[0])
        t_levels = levels(teacher, self.teacher_key, self.chosen[1])
        sizes = [level.shape[2:] for level in t_levels]
        outputs = review(self.abfs, s_levels[::-1], sizes[::-1])
        weight = self.reviewkd_loss_weight * warmup_factor(batch["epoch"], self.warmup_epochs)
        return weight * hcl_loss(outputs, t_levels)
