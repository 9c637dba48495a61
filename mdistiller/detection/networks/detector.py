"""A Faster or Mask R-CNN whose components a distiller can run one by one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.models.detection.generalized_rcnn import GeneralizedRCNN
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.rpn import RegionProposalNetwork
from torchvision.models.detection.transform import resize_boxes

from mdistiller.detection.networks.preprocess import Preprocess
from mdistiller.detection.networks.roi import RecordingRoIHeads

Paste = Callable[[Tensor, Tensor, tuple[int, int]], Tensor]


class Detector(GeneralizedRCNN):
    """A two-stage detector whose components a distiller can run one by one.

    Attributes:
        backbone: images [N, 3, H, W] to maps "0" to "3" and "pool".
        facts: its description in a file of its weights, plain values; see `weights.load_detector`.
    """

    transform: Preprocess
    rpn: RegionProposalNetwork
    roi_heads: RecordingRoIHeads

    def __init__(
        self,
        backbone: nn.Module,
        rpn: RegionProposalNetwork,
        roi_heads: RecordingRoIHeads,
        preprocess: Preprocess,
        paste: Paste,
        facts: dict[str, Any],
    ):
        super().__init__(backbone, rpn, roi_heads, preprocess)
        self.paste = paste
        self.facts = facts
        # Under autocast boxes would be computed in half precision, which cannot hold single pixels.
        for head in (rpn.head, roi_heads.box_predictor, roi_heads.mask_predictor):
            if head is not None:
                head.register_forward_hook(_in_full_precision)

    def prepare(
        self, images: Sequence[Tensor], targets: Sequence[dict[str, Tensor]] | None = None
    ) -> tuple[ImageList, list[dict[str, Tensor]] | None]:
        """`images` in the network's format, padded to one size; `targets` as they are.

        Args:
            images: each [3, H, W] in [0, 1], RGB, resized already.
        """
        return self.transform(images), None if targets is None else list(targets)

    def forward(
        self, images: Sequence[Tensor], targets: Sequence[dict[str, Tensor]] | None = None
    ) -> Any:
        """Losses by name in train mode; in eval mode detections in pixels of `images`.

        Args:
            images: as of :meth:`prepare`.
            targets: of each image `boxes` [n, 4] with positive width and height, `labels` [n],
                int64 from 1, and for Mask R-CNN `masks` [n, H, W]; n may be 0.
        """
        if not self.training:
            return self.detect(images, [(image.shape[-2], image.shape[-1]) for image in images])
        assert targets is not None
        batch, _ = self.prepare(images)
        return self.losses(batch, self.backbone(batch.tensors), targets)

    def losses(
        self, batch: ImageList, features: dict[str, Tensor], targets: Sequence[dict[str, Tensor]]
    ) -> dict[str, Tensor]:
        """The losses on a batch, from its features; sets `roi_heads.samples`."""
        proposals, losses = self.rpn(batch, features, list(targets))
        _, more = self.roi_heads(features, proposals, batch.image_sizes, list(targets))
        return {**losses, **more}

    def roi_logits(
        self, features: dict[str, Tensor], proposals: list[Tensor], sizes: list[tuple[int, int]]
    ) -> Tensor:
        """Class logits [R, classes] of given regions.

        Args:
            features: of this detector's backbone.
            proposals: boxes [r, 4] of each image, in pixels of the prepared images.
            sizes: (height, width) of the images without padding.
        """
        return self.roi_heads.predict(features, proposals, sizes)[0]

    @torch.no_grad()
    def detect(
        self, images: Sequence[Tensor], original_sizes: Sequence[tuple[int, int]]
    ) -> list[dict[str, Tensor]]:
        """Detections in each image, in pixels of the original images.

        Args:
            images: as of :meth:`prepare`.
            original_sizes: (height, width) before resizing.

        Returns:
            `boxes` [n, 4], `labels` [n], `scores` [n] and, of a Mask R-CNN, `masks` [n, H, W] of
            uint8, 0 and 1; by falling score.
        """
        assert not self.training
        batch, _ = self.prepare(images)
        features = self.backbone(batch.tensors)
        proposals, _ = self.rpn(batch, features)
        detections, _ = self.roi_heads(features, proposals, batch.image_sizes)
        for one, size, original in zip(detections, batch.image_sizes, original_sizes, strict=True):
            one["boxes"] = resize_boxes(one["boxes"], list(size), list(original))
            if "masks" in one:
                one["masks"] = self.paste(one["masks"].float(), one["boxes"], original)
        return detections


def _in_full_precision(layer: nn.Module, inputs: Any, output: Any) -> Any:
    if isinstance(output, Tensor):
        return output.float()
    return type(output)(_in_full_precision(layer, inputs, part) for part in output)
