"""MobileNetV2 of full width for Tiny-ImageNet (Sandler et al., CVPR 2018, arXiv 1801.04381).

Not the CIFAR network scaled up. Its 1x1 stem pads by 1 (64x64 images become 66x66 maps), its
convolutions have biases, it uses ReLU6, and the classifier is a 1x1 convolution, so `pooled_feat`
has shape [N, 1280, 1, 1]. `feats` are signed but for the first and the last; no `preact_feats`.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from mdistiller.models._layers import LinearStage
from mdistiller.models.staged import Staged, StagedNet
from mdistiller.models.zoo import register_model


class LinearBottleneck(nn.Module):
    """1x1 widening, 3x3 depth-wise and linear 1x1 convolution; a sum where the shape is kept."""

    def __init__(self, inputs: int, outputs: int, stride: int = 1, expansion: int = 6):
        super().__init__()
        hidden = inputs * expansion
        self.adds = stride == 1 and inputs == outputs
        self.residual = nn.Sequential(
            nn.Conv2d(inputs, hidden, 1),
            nn.BatchNorm2d(hidden),
            nn.ReLU6(),
            nn.Conv2d(hidden, hidden, 3, stride=stride, padding=1, groups=hidden),
            nn.BatchNorm2d(hidden),
            nn.ReLU6(),
            nn.Conv2d(hidden, outputs, 1),
            nn.BatchNorm2d(outputs),
        )

    def forward(self, x: Tensor) -> Staged:
        out = self.residual(x)
        return (x + out if self.adds else out), None


class BottleneckStage(nn.Sequential):
    """Bottlenecks in turn, the first with the stride."""

    def __init__(self, inputs: int, outputs: int, depth: int, stride: int):
        first = LinearBottleneck(inputs, outputs, stride)
        super().__init__(first, *(LinearBottleneck(outputs, outputs) for _ in range(depth - 1)))

    def forward(self, x: Tensor) -> Staged:
        for block in self:
            x, _ = block(x)
        return x, None


class MobileNetV2(StagedNet):
    """Stem, seven groups of blocks and a 1x1 convolution to 1280 channels, which ends stage 4."""

    head = "conv2"

    def __init__(self, num_classes: int = 100):
        super().__init__(stem_channels=32)
        self.pre = nn.Sequential(nn.Conv2d(3, 32, 1, padding=1), nn.BatchNorm2d(32), nn.ReLU6())
        self.stage1 = LinearBottleneck(32, 16, expansion=1)
        self.stage2 = BottleneckStage(16, 24, depth=2, stride=2)
        self.stage3 = BottleneckStage(24, 32, depth=3, stride=2)
        self.stage4 = BottleneckStage(32, 64, depth=4, stride=2)
        self.stage5 = BottleneckStage(64, 96, depth=3, stride=1)
        self.stage6 = BottleneckStage(96, 160, depth=3, stride=1)
        self.stage7 = LinearBottleneck(160, 320)
        self.conv1 = LinearStage(nn.Conv2d(320, 1280, 1), nn.BatchNorm2d(1280), nn.ReLU6())
        self.conv2 = nn.Conv2d(1280, num_classes, 1)
        self.declare_stage("stage1", "stage2", channels=24, norm="stage2.1.residual.7")
        self.declare_stage("stage3", channels=32, norm="stage3.2.residual.7")
        self.declare_stage("stage4", channels=64, norm="stage4.3.residual.7")
        self.declare_stage("stage5", "stage6", "stage7", "conv1", channels=1280, norm="conv1.1")

    def stem(self, x: Tensor) -> Tensor:
        return self.pre(x)

    def embed(self, final_map: Tensor) -> Tensor:
        return F.adaptive_avg_pool2d(final_map, 1)


@register_model("tiny_imagenet", "MobileNetV2")
def mobilenetv2_tiny(num_classes: int = 100) -> MobileNetV2:
    return MobileNetV2(num_classes)
