"""ShuffleNetV2 1x (Ma et al., "ShuffleNet V2: Practical Guidelines for Efficient CNN Architecture
Design", ECCV 2018, arXiv 1807.11164), with a 1x1 stem for small images.

`preact_feats` are what the last shuffle of a stage starts from, `feats` come after it: the same
channels in another order. The batch norm before that ReLU sees half of the channels only, so
`get_bn_before_relu` has nothing to give.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mdistiller.models._layers import conv1x1, conv3x3
from mdistiller.models.staged import Staged, StagedNet
from mdistiller.models.zoo import register_model

STEM = 24
WIDTHS = (116, 232, 464)
DEPTHS = (4, 8, 4)
LAST = 1024


class BasicBlock(nn.Module):
    """Works on the second half of the channels; returns the first half, and the new one before
    its ReLU."""

    def __init__(self, channels: int):
        super().__init__()
        half = channels // 2
        self.conv1 = conv1x1(half, half)
        self.bn1 = nn.BatchNorm2d(half)
        self.conv2 = conv3x3(half, half, groups=half)
        self.bn2 = nn.BatchNorm2d(half)
        self.conv3 = conv1x1(half, half)
        self.bn3 = nn.BatchNorm2d(half)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        kept, x = x.chunk(2, dim=1)
        out = F.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        return kept, self.bn3(self.conv3(out))


class DownBlock(nn.Module):
    """Halves the size in two branches; returns the left one, and the right one before its ReLU."""

    def __init__(self, inputs: int, outputs: int):
        super().__init__()
        half = outputs // 2
        self.conv1 = conv3x3(inputs, inputs, stride=2, groups=inputs)
        self.bn1 = nn.BatchNorm2d(inputs)
        self.conv2 = conv1x1(inputs, half)
        self.bn2 = nn.BatchNorm2d(half)
        self.conv3 = conv1x1(inputs, half)
        self.bn3 = nn.BatchNorm2d(half)
        self.conv4 = conv3x3(half, half, stride=2, groups=half)
        self.bn4 = nn.BatchNorm2d(half)
        self.conv5 = conv1x1(half, half)
        self.bn5 = nn.BatchNorm2d(half)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        left = self.bn1(self.conv1(x))
        left = F.relu(self.bn2(self.conv2(left)))
        right = F.relu(self.bn3(self.conv3(x)))
        right = self.bn4(self.conv4(right))
        return left, self.bn5(self.conv5(right))


class ShuffleStage(nn.Sequential):
    """A DownBlock and basic blocks; joins and shuffles the halves that each of them returns."""

    def __init__(self, inputs: int, outputs: int, depth: int):
        super().__init__(
            DownBlock(inputs, outputs), *(BasicBlock(outputs) for _ in range(depth - 1))
        )

    def forward(self, x: Tensor) -> Staged:
        for block in self:
            kept, new = block(x)
            x = F.channel_shuffle(torch.cat([kept, F.relu(new)], dim=1), 2)
        return x, torch.cat([kept, new], dim=1)


class ShuffleNetV2(StagedNet):
    """Stem of 24 channels, three stages and a 1x1 convolution to 1024 channels."""

    head = "linear"

    def __init__(self, num_classes: int = 100):
        super().__init__(stem_channels=STEM)
        self.conv1 = conv1x1(3, STEM)
        self.bn1 = nn.BatchNorm2d(STEM)
        inputs = STEM
        for i, (width, depth) in enumerate(zip(WIDTHS, DEPTHS, strict=True), start=1):
            self.add_module(f"layer{i}", ShuffleStage(inputs, width, depth))
            self.declare_stage(f"layer{i}", channels=width)
            inputs = width
        self.conv2 = conv1x1(inputs, LAST)
        self.bn2 = nn.BatchNorm2d(LAST)
        self.linear = nn.Linear(LAST, num_classes)

    def stem(self, x: Tensor) -> Tensor:
        return F.relu(self.bn1(self.conv1(x)))

    def last_map(self, out: Tensor, preact: Tensor | None) -> Tensor:
        return F.relu(self.bn2(self.conv2(out)))


@register_model("cifar", "ShuffleV2")
@register_model("tiny_imagenet", "ShuffleV2")
def ShuffleV2(num_classes: int = 100) -> ShuffleNetV2:  # noqa: N802
    return ShuffleNetV2(num_classes)
