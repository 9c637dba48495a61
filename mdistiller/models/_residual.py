"""Residual networks (He et al., "Deep Residual Learning for Image Recognition", CVPR 2016, arXiv
1512.03385): the blocks and the layout that the CIFAR and ImageNet families share.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from mdistiller.models._layers import (
    LinearStage,
    ResidualStage,
    conv1x1,
    conv3x3,
    init_weights,
    projection,
)
from mdistiller.models.staged import StagedNet


class ResidualBlock(nn.Module):
    """Convolutions and a shortcut around them; returns the sum before the ReLU.

    Attributes:
        expansion: the output's width over the block's.
        last_norm: name of the batch norm before the sum.
        shortcut_name: name of the shortcut in state dicts; that child is None where size and width
            are kept.
    """

    expansion: int
    last_norm: str
    shortcut_name = "downsample"

    def add_shortcut(self, inputs: int, outputs: int, stride: int) -> None:
        changes = stride != 1 or inputs != outputs
        self.add_module(
            self.shortcut_name, projection(inputs, outputs, stride) if changes else None
        )

    def shortcut_of(self, x: Tensor) -> Tensor:
        shortcut = self._modules[self.shortcut_name]
        return x if shortcut is None else shortcut(x)


class BasicBlock(ResidualBlock):
    """Two 3x3 convolutions."""

    expansion = 1
    last_norm = "bn2"

    def __init__(self, inputs: int, width: int, stride: int):
        super().__init__()
        self.conv1 = conv3x3(inputs, width, stride)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = conv3x3(width, width)
        self.bn2 = nn.BatchNorm2d(width)
        self.add_shortcut(inputs, width, stride)

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(self.conv1(x)))
        return self.bn2(self.conv2(out)) + self.shortcut_of(x)


class Bottleneck(ResidualBlock):
    """1x1, 3x3 (with the stride) and widening 1x1 convolution.

    Attributes:
        groups: of the 3x3 convolution.
        group_width: its channels per group, for a block of width 64.
    """

    expansion = 4
    last_norm = "bn3"
    groups = 1
    group_width = 64

    def __init__(self, inputs: int, width: int, stride: int):
        super().__init__()
        outputs, inner = width * self.expansion, width * self.group_width // 64 * self.groups
        self.conv1 = conv1x1(inputs, inner)
        self.bn1 = nn.BatchNorm2d(inner)
        self.conv2 = conv3x3(inner, inner, stride, self.groups)
        self.bn2 = nn.BatchNorm2d(inner)
        self.conv3 = conv1x1(inner, outputs)
        self.bn3 = nn.BatchNorm2d(outputs)
        self.add_shortcut(inputs, outputs, stride)

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(self.conv1(x)))
        out = F.relu(self.bn2(self.conv2(out)))
        return self.bn3(self.conv3(out)) + self.shortcut_of(x)


class ResidualNet(StagedNet):
    """Stem, and stages `layer1`, `layer2`, ... of which all but the first halve the size.

    Args:
        stem: the first convolution.
        block: BasicBlock or Bottleneck.
        widths, depths: width and number of the blocks of each stage.
        pool: max-pool between stem and first stage.
    """

    def __init__(
        self,
        stem: nn.Conv2d,
        block: type[BasicBlock] | type[Bottleneck],
        widths: Sequence[int],
        depths: Sequence[int],
        num_classes: int,
        pool: bool = False,
    ):
        super().__init__(stem_channels=stem.out_channels)
        self.conv1 = stem
        self.bn1 = nn.BatchNorm2d(stem.out_channels)
        if pool:
            self.maxpool = LinearStage(nn.MaxPool2d(3, stride=2, padding=1))
        outputs = stem.out_channels
        for i, (width, depth) in enumerate(zip(widths, depths, strict=True), start=1):
            inputs, outputs = outputs, width * block.expansion
            first = block(inputs, width, stride=1 if i == 1 else 2)
            rest = [block(outputs, width, stride=1) for _ in range(depth - 1)]
            self.add_module(f"layer{i}", ResidualStage(first, *rest))
            paths = ("maxpool", "layer1") if pool and i == 1 else (f"layer{i}",)
            norm = f"layer{i}.{depth - 1}.{block.last_norm}"
            self.declare_stage(*paths, channels=outputs, norm=norm)
        self.add_module(self.head, nn.Linear(outputs, num_classes))
        init_weights(self)

    def stem(self, x: Tensor) -> Tensor:
        return F.relu(self.bn1(self.conv1(x)))
