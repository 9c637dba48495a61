"""Components of detectron2's detectors that differ from torchvision's: anchors, pooling, losses.

Weights trained with one kind give wrong boxes with the other. All other parts are torchvision's.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.rpn import RegionProposalNetwork
from torchvision.ops import MultiScaleRoIAlign, box_area, roi_align

_LOW = (torch.float16, torch.bfloat16)


class Anchors(AnchorGenerator):
    """torchvision's anchors in float32 or more: half precision would round to whole pixels."""

    def set_cell_anchors(self, dtype: torch.dtype, device: torch.device) -> None:
        super().set_cell_anchors(torch.float32 if dtype in _LOW else dtype, device)


class ExactAnchors(Anchors):
    """Anchors that are not rounded to whole pixels, at given strides.

    torchvision rounds them, and divides image size by map size, which is not the stride if the
    map's size was rounded up (P6 of 800 pixels is 13 wide: 61, not 64).

    Args:
        strides: in pixels, of each level.
    """

    def __init__(
        self,
        sizes: Sequence[Sequence[int]],
        aspect_ratios: Sequence[Sequence[float]],
        strides: Sequence[int],
    ):
        super().__init__(sizes, aspect_ratios)
        self.strides = list(strides)

    def generate_anchors(
        self,
        scales: Sequence[int],
        aspect_ratios: Sequence[float],
        dtype: torch.dtype = torch.float32,
        device: torch.device | None = None,
    ) -> Tensor:
        cells = [
            (-w / 2, -h / 2, w / 2, h / 2)
            for ratio in aspect_ratios
            for size in scales
            for w, h in [(size / ratio**0.5, size * ratio**0.5)]
        ]
        return torch.tensor(cells, dtype=dtype, device=device)

    def forward(self, image_list: ImageList, feature_maps: list[Tensor]) -> list[Tensor]:
        first = feature_maps[0]
        self.set_cell_anchors(first.dtype, first.device)
        grids = [list(level.shape[-2:]) for level in feature_maps]
        levels = self.grid_anchors(grids, [[stride, stride] for stride in self.strides])  # type: ignore[arg-type, misc]
        return [torch.cat(levels)] * len(image_list.image_sizes)


class AlignedPool(MultiScaleRoIAlign):
    """RoIAlign with half-pixel alignment and adaptive sampling, at fixed strides."""

    def __init__(self, names: Sequence[str], output_size: int, strides: Sequence[int]):
        super().__init__(list(names), output_size, sampling_ratio=0)
        self.strides = list(strides)

    def forward(
        self,
        x: dict[str, Tensor],
        boxes: list[Tensor],
        image_shapes: list[tuple[int, int]],
    ) -> Tensor:
        maps = [x[name] for name in self.featmap_names]
        rois = torch.cat([F.pad(own, (1, 0), value=i) for i, own in enumerate(boxes)])
        levels = self.levels(rois[:, 1:])
        pooled = maps[0].new_zeros(len(rois), maps[0].shape[1], *self.output_size)
        for k, (level, stride) in enumerate(zip(maps, self.strides, strict=True)):
            chosen = torch.where(levels == k)[0]
            cells = roi_align(
                level, rois[chosen], self.output_size, 1 / stride, self.sampling_ratio, True
            )
            pooled[chosen] = cells.to(pooled.dtype)
        return pooled

    def levels(self, boxes: Tensor) -> Tensor:
        """The index of the map that each box [R, 4] is pooled from: 224 pixels belong to P4."""
        ideal = torch.floor(
            self.canonical_level + torch.log2(box_area(boxes).sqrt() / self.canonical_scale + 1e-8)
        )
        shallowest = self.strides[0].bit_length() - 1
        return (ideal - shallowest).clamp(0, len(self.strides) - 1).long()


class L1ProposalNetwork(RegionProposalNetwork):
    """A proposal network with L1 box loss; both losses are sums over the number of samples."""

    def compute_loss(
        self,
        objectness: Tensor,
        pred_bbox_deltas: Tensor,
        labels: list[Tensor],
        regression_targets: list[Tensor],
    ) -> tuple[Tensor, Tensor]:
        positive, negative = (torch.cat(part) > 0 for part in self.fg_bg_sampler(labels))
        count = self.fg_bg_sampler.batch_size_per_image * len(labels)
        score = F.binary_cross_entropy_with_logits(
            objectness.flatten(), positive.float(), reduction="none"
        )
        wanted = torch.cat(regression_targets).where(positive[:, None], 0)
        deltas = pred_bbox_deltas.where(positive[:, None], 0)
        boxes = F.l1_loss(deltas, wanted, reduction="sum")
        return score.where(positive | negative, 0).sum() / count, boxes / count


def mask_loss(
    logits: Tensor,
    boxes: Sequence[Tensor],
    masks: Sequence[Tensor],
    labels: Sequence[Tensor],
    matched: Sequence[Tensor],
) -> Tensor:
    """Cross-entropy with the true masks cropped to the boxes, aligned and binary.

    Args:
        logits: [R, classes, S, S] of all boxes.
        boxes: [r, 4] of each image.
        masks: [objects, H, W] of each image.
        labels: [objects] of each image.
        matched: [r] object of each box.
    """
    if not len(logits):
        return logits.sum() * 0
    side = logits.shape[-1]
    cut = [
        roi_align(
            own[:, None].float(),
            torch.cat([which[:, None].float(), where.float()], 1),
            side,
            aligned=True,
        )[:, 0]
        for own, where, which in zip(masks, boxes, matched, strict=True)
    ]
    classes = torch.cat([own[which] for own, which in zip(labels, matched, strict=True)])
    chosen = logits[torch.arange(len(classes), device=classes.device), classes]
    return F.binary_cross_entropy_with_logits(chosen.float(), (torch.cat(cut) >= 0.5).float())


def paste_masks(masks: Tensor, boxes: Tensor, size: tuple[int, int]) -> Tensor:
    """Paste box masks, [N, 1, S, S] probabilities, into the image: uint8 [N, H, W], 0 or 1.

    The mask is stretched over its box and sampled at the pixels' centres.

    Args:
        boxes: [N, 4] in pixels of the image.
        size: (height, width) of the image.
    """
    height, width = size
    pasted = torch.zeros(len(masks), height, width, dtype=torch.uint8, device=masks.device)
    low = boxes[:, :2].floor().long().tolist()
    high = boxes[:, 2:].ceil().long().tolist()
    for i, ((x1, y1), (x2, y2)) in enumerate(zip(low, high, strict=True)):
        # Nothing outside the box reaches one half.
        x1, y1, x2, y2 = max(x1, 0), max(y1, 0), min(x2, width), min(y2, height)
        if x2 <= x1 or y2 <= y1:
            continue
        box = boxes[i]
        x = (torch.arange(x1, x2, device=boxes.device) + 0.5 - box[0]) / (box[2] - box[0]) * 2 - 1
        y = (torch.arange(y1, y2, device=boxes.device) + 0.5 - box[1]) / (box[3] - box[1]) * 2 - 1
        grid = torch.stack(torch.meshgrid(x, y, indexing="xy"), -1)[None].to(masks.dtype)
        seen = F.grid_sample(masks[i : i + 1], grid, align_corners=False)[0, 0]
        pasted[i, y1:y2, x1:x2] = seen >= 0.5
    return pasted


def initialize(rcnn_heads: nn.Module) -> None:
    """Initialise RoI heads as detectron2 does."""
    for name, layer in rcnn_heads.named_modules():
        if not isinstance(layer, (nn.Linear, nn.Conv2d, nn.ConvTranspose2d)):
            continue
        last = name.rpartition(".")[2]
        if last in _STD:
            nn.init.normal_(layer.weight, std=_STD[last])
        elif isinstance(layer, nn.Linear):
            nn.init.kaiming_uniform_(layer.weight, a=1)
        if layer.bias is not None:
            nn.init.zeros_(layer.bias)


_STD = {"cls_score": 0.01, "bbox_pred": 0.001, "mask_fcn_logits": 0.001}
