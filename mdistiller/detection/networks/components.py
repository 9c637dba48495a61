"""Backbone, proposal network and RoI heads of a detector, from its config node."""

from __future__ import annotations

from typing import Any

import torchvision.models.detection as stock
from torch import Tensor, nn
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead
from torchvision.models.detection.generalized_rcnn import GeneralizedRCNN
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor
from torchvision.models.detection.roi_heads import maskrcnn_loss, paste_masks_in_image
from torchvision.models.detection.rpn import RegionProposalNetwork, RPNHead
from torchvision.ops import MultiScaleRoIAlign
from torchvision.ops.poolers import LevelMapper

from mdistiller.detection.networks import detectron2
from mdistiller.detection.networks.backbones import build_backbone
from mdistiller.detection.networks.roi import RecordingRoIHeads

STRIDES = (4, 8, 16, 32, 64)
"""Of P2 to P6, in pixels."""
POOLED = ("0", "1", "2", "3")
"""The maps that regions are pooled from."""

_RATIOS = (0.5, 1.0, 2.0)
_HIDDEN = 1024

Components = tuple[nn.Module, RegionProposalNetwork, RecordingRoIHeads]


def build_components(network: Any, num_classes: int) -> Components:
    """Backbone, proposal network and RoI heads of a network of BACKBONES, in either flavour."""
    exact, channels = network.FLAVOUR == "d2", network.CHANNELS
    backbone = build_backbone(network.ARCH, channels, network.STRIDE_IN_1X1)
    sizes, ratios = [[size] for size in network.ANCHOR_SIZES], [_RATIOS] * len(STRIDES)
    rpn = (detectron2.L1ProposalNetwork if exact else RegionProposalNetwork)(
        detectron2.ExactAnchors(sizes, ratios, STRIDES)
        if exact
        else detectron2.Anchors(sizes, ratios),
        RPNHead(channels, len(_RATIOS)),
        fg_iou_thresh=0.7,
        bg_iou_thresh=0.3,
        batch_size_per_image=256,
        positive_fraction=0.5,
        pre_nms_top_n={"training": 2000, "testing": 1000},
        post_nms_top_n={"training": 1000 if exact else 2000, "testing": 1000},
        nms_thresh=0.7,
    )
    heads = RecordingRoIHeads(
        _pool(7, exact),
        TwoMLPHead(channels * 7**2, _HIDDEN),
        FastRCNNPredictor(_HIDDEN, num_classes),
        fg_iou_thresh=0.5,
        bg_iou_thresh=0.5,
        batch_size_per_image=network.ROI_SAMPLES,
        positive_fraction=0.25,
        bbox_reg_weights=None,
        score_thresh=0.05,
        nms_thresh=0.5,
        detections_per_img=100,
        beta=0.0 if exact else 1 / 9,
        mask_loss=detectron2.mask_loss if exact else maskrcnn_loss,
    )
    if network.MASK:
        heads.mask_roi_pool = _pool(14, exact)
        heads.mask_head = MaskRCNNHeads(channels, (256,) * 4, 1)
        heads.mask_predictor = MaskRCNNPredictor(256, 256, num_classes)
    if exact:
        detectron2.initialize(heads)
    return backbone, rpn, heads


def torchvision_components(network: Any, num_classes: int) -> Components:
    """The same components of one of torchvision's detectors."""
    make = getattr(stock, network.ARCH)
    net: GeneralizedRCNN = make(weights=None, weights_backbone=None, num_classes=num_classes)
    old = net.rpn.anchor_generator
    net.rpn.anchor_generator = detectron2.Anchors(old.sizes, old.aspect_ratios)
    heads = RecordingRoIHeads.of(net.roi_heads)
    heads.fg_bg_sampler.batch_size_per_image = network.ROI_SAMPLES
    levels = range(4, 6) if "mobilenet_v3" in network.ARCH else range(2, 6)
    for pool in (heads.box_roi_pool, heads.mask_roi_pool):
        if pool is not None:
            fix_scales(pool, levels)
    return net.backbone, net.rpn, heads


def _pool(side: int, exact: bool) -> MultiScaleRoIAlign:
    if exact:
        return detectron2.AlignedPool(POOLED, side, STRIDES[: len(POOLED)])
    return fix_scales(MultiScaleRoIAlign(list(POOLED), side, sampling_ratio=2), range(2, 6))


def fix_scales(pool: MultiScaleRoIAlign, levels: range) -> MultiScaleRoIAlign:
    """Set a pool's map scales, 1 / 2**level, which it would infer from the first image.

    Scales inferred from an image of 40 x 40 pixels, which is padded to 64 x 64, are wrong.
    """
    pool.scales = [2.0**-level for level in levels]
    pool.map_levels = LevelMapper(levels[0], levels[-1])
    return pool


def paste_stock(masks: Tensor, boxes: Tensor, size: tuple[int, int]) -> Tensor:
    """torchvision's masks in the image, uint8 [N, H, W]; arguments as `detectron2.paste_masks`."""
    return (paste_masks_in_image(masks, boxes, size)[:, 0] > 0.5).byte()


PASTE = {"tv": paste_stock, "d2": detectron2.paste_masks}
"""Pastes masks into images, by flavour."""
