"""MobileNetV2 of half width for CIFAR (Sandler et al., "MobileNetV2: Inverted Residuals and Linear
Bottlenecks", CVPR 2018, arXiv 1801.04381).

Stages end in linear bottlenecks: their `feats` are signed, and there are no `preact_feats`. The
stem has stride 2; the first block widens by a 1x1 convolution although its factor is 1.
"""

from __future__ import annotations

from torch import Tensor, nn

from mdistiller.models._layers import LinearStage, conv1x1, conv3x3, init_weights
from mdistiller.models.staged import StagedNet
from mdistiller.models.zoo import register_model

#: (expansion, width at factor 1, blocks, stride) of each group of blocks.
GROUPS = (
    (1, 16, 1, 1),
    (6, 24, 2, 1),
    (6, 32, 3, 2),
    (6, 64, 4, 2),
    (6, 96, 3, 1),
    (6, 160, 3, 2),
    (6, 320, 1, 1),
)
#: Groups of blocks that make one stage.
STAGES = ((0, 1), (2,), (3, 4), (5, 6))


class InvertedResidual(nn.Module):
    """1x1 widening, 3x3 depth-wise and linear 1x1 convolution; a sum where the shape is kept."""

    def __init__(self, inputs: int, outputs: int, stride: int, expansion: int):
        super().__init__()
        hidden = inputs * expansion
        self.adds = stride == 1 and inputs == outputs
        self.conv = nn.Sequential(
            conv1x1(inputs, hidden),
            nn.BatchNorm2d(hidden),
            nn.ReLU(),
            conv3x3(hidden, hidden, stride, groups=hidden),
            nn.BatchNorm2d(hidden),
            nn.ReLU(),
            conv1x1(hidden, outputs),
            nn.BatchNorm2d(outputs),
        )

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv(x) if self.adds else self.conv(x)


class MobileNetV2(StagedNet):
    """Stem, seven groups of blocks in four stages, and a 1x1 convolution to 1280 channels.

    Args:
        width: factor of all widths but the last (the original's zoo has 0.5).
    """

    head = "classifier"

    def __init__(self, num_classes: int = 100, width: float = 0.5):
        stem_channels = int(32 * width)
        super().__init__(stem_channels)
        self.conv1 = nn.Sequential(
            conv3x3(3, stem_channels, stride=2), nn.BatchNorm2d(stem_channels), nn.ReLU()
        )
        self.blocks = nn.ModuleList()
        inputs, widths = stem_channels, [int(group[1] * width) for group in GROUPS]
        for (expansion, _, depth, stride), outputs in zip(GROUPS, widths, strict=True):
            first = InvertedResidual(inputs, outputs, stride, expansion)
            rest = [InvertedResidual(outputs, outputs, 1, expansion) for _ in range(depth - 1)]
            self.blocks.append(LinearStage(first, *rest))
            inputs = outputs
        for groups in STAGES:
            last = groups[-1]
            norm = f"blocks.{last}.{GROUPS[last][2] - 1}.conv.7"
            self.declare_stage(*(f"blocks.{i}" for i in groups), channels=widths[last], norm=norm)
        self.conv2 = nn.Sequential(conv1x1(inputs, 1280), nn.BatchNorm2d(1280), nn.ReLU())
        self._modules["classifier"] = nn.Sequential(nn.Linear(1280, num_classes))
        init_weights(self, linear_std=0.01)

    def stem(self, x: Tensor) -> Tensor:
        return self.conv1(x)

    def last_map(self, out: Tensor, preact: Tensor | None) -> Tensor:
        return self.conv2(out)


@register_model("cifar", "MobileNetV2")
def mobile_half(num_classes: int = 100) -> MobileNetV2:
    return MobileNetV2(num_classes)
