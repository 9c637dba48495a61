"""RoI heads that record the sampled regions, with the losses of the detector's flavour."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.models.detection.roi_heads import RoIHeads, maskrcnn_loss

MaskLoss = Callable[..., Tensor]


class RoISamples(NamedTuple):
    """The regions of a training step, with R in all.

    Attributes:
        proposals: boxes [r, 4] of each image, (x1, y1, x2, y2) in pixels of the network's input.
        labels: [R] classes, 0 the background.
        logits: [R, classes], with gradient.
    """

    proposals: list[Tensor]
    labels: Tensor
    logits: Tensor


class RecordingRoIHeads(RoIHeads):
    """torchvision's RoI heads; `samples` are the regions of the last training step.

    Args:
        beta: threshold of the smooth L1 box loss; 0: L1.
        mask_loss: with the arguments of torchvision's `maskrcnn_loss`.
    """

    def __init__(
        self, *args: Any, beta: float = 1 / 9, mask_loss: MaskLoss = maskrcnn_loss, **settings: Any
    ):
        super().__init__(*args, **settings)
        self.beta = beta
        self.mask_loss = mask_loss
        self.samples: RoISamples | None = None

    @classmethod
    def of(cls, heads: RoIHeads) -> RecordingRoIHeads:
        """Recording heads from the parts of torchvision's."""
        matcher, sampler = heads.proposal_matcher, heads.fg_bg_sampler
        return cls(
            heads.box_roi_pool,
            heads.box_head,
            heads.box_predictor,
            matcher.high_threshold,
            matcher.low_threshold,
            sampler.batch_size_per_image,
            sampler.positive_fraction,
            heads.box_coder.weights,
            heads.score_thresh,
            heads.nms_thresh,
            heads.detections_per_img,
            heads.mask_roi_pool,
            heads.mask_head,
            heads.mask_predictor,
        )

    def predict(
        self, features: dict[str, Tensor], proposals: list[Tensor], sizes: list[tuple[int, int]]
    ) -> tuple[Tensor, Tensor]:
        """Class logits [R, classes] and box deltas [R, 4 * classes] of the regions."""
        pooled = self.box_roi_pool(features, proposals, sizes)
        logits, deltas = self.box_predictor(self.box_head(pooled))
        return logits, deltas

    def forward(
        self,
        features: dict[str, Tensor],
        proposals: list[Tensor],
        image_shapes: list[tuple[int, int]],
        targets: list[dict[str, Tensor]] | None = None,
    ) -> tuple[list[dict[str, Tensor]], dict[str, Tensor]]:
        """Detections as torchvision's in eval mode, losses in train mode."""
        self.samples = None
        if not self.training:
            detections: tuple[Any, Any] = super().forward(features, proposals, image_shapes)
            return detections
        assert targets is not None
        regions, matched, labels, wanted = self.select_training_samples(proposals, targets)
        logits, deltas = self.predict(features, regions, image_shapes)
        classes = torch.cat(labels)
        self.samples = RoISamples(regions, classes, logits)
        losses = {
            "loss_classifier": F.cross_entropy(logits, classes),
            "loss_box_reg": box_loss(deltas, torch.cat(wanted), classes, self.beta),
        }
        if self.has_mask():
            losses["loss_mask"] = self._mask_loss(
                features, image_shapes, regions, labels, matched, targets
            )
        return [], losses

    def _mask_loss(
        self,
        features: dict[str, Tensor],
        sizes: list[tuple[int, int]],
        regions: Sequence[Tensor],
        labels: Sequence[Tensor],
        matched: Sequence[Tensor],
        targets: Sequence[dict[str, Tensor]],
    ) -> Tensor:
        objects = [torch.where(image > 0)[0] for image in labels]
        boxes = [image[keep] for image, keep in zip(regions, objects, strict=True)]
        pooled = self.mask_roi_pool(features, boxes, sizes)
        return self.mask_loss(
            self.mask_predictor(self.mask_head(pooled)),
            boxes,
            [target["masks"] for target in targets],
            [target["labels"] for target in targets],
            [image[keep] for image, keep in zip(matched, objects, strict=True)],
        )


def box_loss(deltas: Tensor, wanted: Tensor, labels: Tensor, beta: float) -> Tensor:
    """Smooth L1 loss between the labelled classes' deltas and their targets, over all regions.

    Args:
        deltas: [R, 4 * classes].
        wanted: [R, 4]; those of the background do not count and may be infinite.
        labels: [R], 0 the background.
        beta: threshold between quadratic and linear; 0: L1.
    """
    objects = (labels > 0)[:, None]
    place = labels[:, None, None].expand(-1, 1, 4)
    predicted = deltas.view(len(labels), -1, 4).gather(1, place)[:, 0]
    predicted, wanted = predicted.where(objects, 0), wanted.where(objects, 0)
    return F.smooth_l1_loss(predicted, wanted, beta=beta, reduction="sum") / max(len(labels), 1)
