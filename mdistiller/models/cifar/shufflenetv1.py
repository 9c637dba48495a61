"""ShuffleNet with 3 groups (Zhang et al., "ShuffleNet: An Extremely Efficient Convolutional Neural
Network for Mobile Devices", CVPR 2018, arXiv 1707.01083), with a 1x1 stem for small images.

Other than in the paper, a ReLU follows the depth-wise convolution too.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mdistiller.models._layers import ResidualStage, conv1x1, conv3x3
from mdistiller.models.staged import StagedNet
from mdistiller.models.zoo import register_model

GROUPS = 3
STEM = 24
WIDTHS = (240, 480, 960)
DEPTHS = (4, 8, 4)


class Bottleneck(nn.Module):
    """Grouped 1x1, depth-wise 3x3 and grouped 1x1 convolution; returns what comes before the ReLU.

    With stride 2 the pooled input is put in front of the result, which is that much narrower;
    otherwise the two are summed. The stem's 24 channels are not grouped.
    """

    def __init__(self, inputs: int, outputs: int, stride: int):
        super().__init__()
        self.stride = stride
        self.groups = 1 if inputs == STEM else GROUPS
        made = outputs - inputs if stride == 2 else outputs
        hidden = made // 4
        self.conv1 = conv1x1(inputs, hidden, groups=self.groups)
        self.bn1 = nn.BatchNorm2d(hidden)
        self.conv2 = conv3x3(hidden, hidden, stride, groups=hidden)
        self.bn2 = nn.BatchNorm2d(hidden)
        self.conv3 = conv1x1(hidden, made, groups=GROUPS)
        self.bn3 = nn.BatchNorm2d(made)

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(self.conv1(x)))
        out = F.channel_shuffle(out, self.groups)
        out = F.relu(self.bn2(self.conv2(out)))
        out = self.bn3(self.conv3(out))
        if self.stride == 2:
            return torch.cat([out, F.avg_pool2d(x, 3, stride=2, padding=1)], dim=1)
        return out + x


class ShuffleNet(StagedNet):
    """Stem of 24 channels and three stages, each beginning with stride 2."""

    head = "linear"

    def __init__(self, num_classes: int = 100):
        super().__init__(stem_channels=STEM)
        self.conv1 = conv1x1(3, STEM)
        self.bn1 = nn.BatchNorm2d(STEM)
        inputs = STEM
        for i, (width, depth) in enumerate(zip(WIDTHS, DEPTHS, strict=True), start=1):
            first = Bottleneck(inputs, width, stride=2)
            rest = [Bottleneck(width, width, stride=1) for _ in range(depth - 1)]
            self.add_module(f"layer{i}", ResidualStage(first, *rest))
            self.declare_stage(f"layer{i}", channels=width, norm=f"layer{i}.{depth - 1}.bn3")
            inputs = width
        self.linear = nn.Linear(inputs, num_classes)

    def stem(self, x: Tensor) -> Tensor:
        return F.relu(self.bn1(self.conv1(x)))


@register_model("cifar", "ShuffleV1")
def ShuffleV1(num_classes: int = 100) -> ShuffleNet:  # noqa: N802
    return ShuffleNet(num_classes)
