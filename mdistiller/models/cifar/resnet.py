"""ResNets for CIFAR, of depth 6n + 2 (He et al., "Deep Residual Learning for Image Recognition",
CVPR 2016, arXiv 1512.03385, section 4.2), in the usual and in a wide ("x4") form.

Other than in the paper, shortcuts that change size or width are projections.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from mdistiller.models._base import StagedNet, register_model
from mdistiller.models._layers import ResidualStage, conv3x3, init_weights, projection

NARROW = (16, 16, 32, 64)
WIDE = (32, 64, 128, 256)


class BasicBlock(nn.Module):
    """Two 3x3 convolutions; returns the sum before the ReLU."""

    def __init__(self, inputs: int, outputs: int, stride: int):
        super().__init__()
        self.conv1 = conv3x3(inputs, outputs, stride)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = conv3x3(outputs, outputs)
        self.bn2 = nn.BatchNorm2d(outputs)
        changes = stride != 1 or inputs != outputs
        self.downsample = projection(inputs, outputs, stride) if changes else None

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        return out + (x if self.downsample is None else self.downsample(x))


class ResNet(StagedNet):
    """Stem and three stages of basic blocks.

    Args:
        depth: number of layers, 6n + 2 for n blocks a stage.
        widths: channels of the stem and of the stages.
    """

    def __init__(self, depth: int, widths: Sequence[int] = NARROW, num_classes: int = 100):
        if depth < 8 or (depth - 2) % 6:
            raise ValueError(f"depth {depth} is not 6n + 2 (8, 14, 20, ...)")
        super().__init__(stem_channels=widths[0])
        blocks = (depth - 2) // 6
        self.conv1 = conv3x3(3, widths[0])
        self.bn1 = nn.BatchNorm2d(widths[0])
        for i in (1, 2, 3):
            first = BasicBlock(widths[i - 1], widths[i], stride=1 if i == 1 else 2)
            rest = [BasicBlock(widths[i], widths[i], stride=1) for _ in range(blocks - 1)]
            self.add_module(f"layer{i}", ResidualStage(first, *rest))
            norm = f"layer{i}.{blocks - 1}.bn2"
            self.declare_stage(f"layer{i}", channels=widths[i], norm=norm)
        self.fc = nn.Linear(widths[-1], num_classes)
        init_weights(self)

    def stem(self, x: Tensor) -> Tensor:
        return F.relu(self.bn1(self.conv1(x)))


@register_model("cifar", "resnet8")
def resnet8(num_classes: int = 100) -> ResNet:
    return ResNet(8, NARROW, num_classes)


@register_model("cifar", "resnet14")
def resnet14(num_classes: int = 100) -> ResNet:
    return ResNet(14, NARROW, num_classes)


@register_model("cifar", "resnet20")
def resnet20(num_classes: int = 100) -> ResNet:
    return ResNet(20, NARROW, num_classes)


@register_model("cifar", "resnet32")
def resnet32(num_classes: int = 100) -> ResNet:
    return ResNet(32, NARROW, num_classes)


@register_model("cifar", "resnet44")
def resnet44(num_classes: int = 100) -> ResNet:
    return ResNet(44, NARROW, num_classes)


@register_model(
    "cifar", "resnet56", checkpoint="cifar_teachers/resnet56_vanilla/ckpt_epoch_240.pth"
)
def resnet56(num_classes: int = 100) -> ResNet:
    return ResNet(56, NARROW, num_classes)


@register_model(
    "cifar", "resnet110", checkpoint="cifar_teachers/resnet110_vanilla/ckpt_epoch_240.pth"
)
def resnet110(num_classes: int = 100) -> ResNet:
    return ResNet(110, NARROW, num_classes)


@register_model("cifar", "resnet8x4")
def resnet8x4(num_classes: int = 100) -> ResNet:
    return ResNet(8, WIDE, num_classes)


@register_model(
    "cifar", "resnet32x4", checkpoint="cifar_teachers/resnet32x4_vanilla/ckpt_epoch_240.pth"
)
def resnet32x4(num_classes: int = 100) -> ResNet:
    return ResNet(32, WIDE, num_classes)
