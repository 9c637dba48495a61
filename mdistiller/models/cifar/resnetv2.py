"""ResNet-18 and -50 with a 3x3 stem, for small images (He et al., CVPR 2016, arXiv 1512.03385).

The ImageNet layout of four stages, without the large stem and its max-pooling. The file's name is
historical: blocks are those of the first paper, with the ReLU after the sum.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from mdistiller.models._base import StagedNet, register_model
from mdistiller.models._layers import ResidualStage, conv1x1, conv3x3, init_weights, projection


class _Block(nn.Module):
    """What both blocks share; `shortcut` stays empty where size and width are kept."""

    expansion: int
    last_norm: str
    shortcut: nn.Sequential

    @classmethod
    def make_shortcut(cls, inputs: int, width: int, stride: int) -> nn.Sequential:
        outputs = width * cls.expansion
        if stride == 1 and inputs == outputs:
            return nn.Sequential()
        return projection(inputs, outputs, stride)


class BasicBlock(_Block):
    """Two 3x3 convolutions; returns the sum before the ReLU."""

    expansion = 1
    last_norm = "bn2"

    def __init__(self, inputs: int, width: int, stride: int):
        super().__init__()
        self.conv1 = conv3x3(inputs, width, stride)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = conv3x3(width, width)
        self.bn2 = nn.BatchNorm2d(width)
        self.shortcut = self.make_shortcut(inputs, width, stride)

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(self.conv1(x)))
        return self.bn2(self.conv2(out)) + self.shortcut(x)


class Bottleneck(_Block):
    """1x1, 3x3 (with the stride) and widening 1x1 convolution; returns the sum before the ReLU."""

    expansion = 4
    last_norm = "bn3"

    def __init__(self, inputs: int, width: int, stride: int):
        super().__init__()
        self.conv1 = conv1x1(inputs, width)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = conv3x3(width, width, stride)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3 = conv1x1(width, width * self.expansion)
        self.bn3 = nn.BatchNorm2d(width * self.expansion)
        self.shortcut = self.make_shortcut(inputs, width, stride)

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(self.conv1(x)))
        out = F.relu(self.bn2(self.conv2(out)))
        return self.bn3(self.conv3(out)) + self.shortcut(x)


class ResNet(StagedNet):
    """Stem of 64 channels and four stages.

    Args:
        block: BasicBlock or Bottleneck.
        depths: blocks of each stage.
        zero_init_residual: start with the residual branches silent (gamma 0 in their last norm).
    """

    head = "linear"

    def __init__(
        self,
        block: type[BasicBlock] | type[Bottleneck],
        depths: Sequence[int],
        num_classes: int = 100,
        zero_init_residual: bool = False,
    ):
        super().__init__(stem_channels=64)
        self.conv1 = conv3x3(3, 64)
        self.bn1 = nn.BatchNorm2d(64)
        inputs = 64
        for i, depth in enumerate(depths, start=1):
            width, outputs = 32 * 2**i, 32 * 2**i * block.expansion
            first = block(inputs, width, stride=1 if i == 1 else 2)
            rest = [block(outputs, width, stride=1) for _ in range(depth - 1)]
            self.add_module(f"layer{i}", ResidualStage(first, *rest))
            norm = f"layer{i}.{depth - 1}.{block.last_norm}"
            self.declare_stage(f"layer{i}", channels=outputs, norm=norm)
            inputs = outputs
        self.linear = nn.Linear(inputs, num_classes)
        init_weights(self)
        if zero_init_residual:
            for layer in self.modules():
                if isinstance(layer, _Block):
                    nn.init.zeros_(layer.get_parameter(f"{layer.last_norm}.weight"))

    def stem(self, x: Tensor) -> Tensor:
        return F.relu(self.bn1(self.conv1(x)))


@register_model("cifar", "ResNet18")
@register_model(
    "tiny_imagenet", "ResNet18", checkpoint="tiny_imagenet_teachers/ResNet18_vanilla/ti_res18"
)
def ResNet18(num_classes: int = 100, zero_init_residual: bool = False) -> ResNet:  # noqa: N802
    return ResNet(BasicBlock, (2, 2, 2, 2), num_classes, zero_init_residual)


@register_model(
    "cifar", "ResNet50", checkpoint="cifar_teachers/ResNet50_vanilla/ckpt_epoch_240.pth"
)
def ResNet50(num_classes: int = 100, zero_init_residual: bool = False) -> ResNet:  # noqa: N802
    return ResNet(Bottleneck, (3, 4, 6, 3), num_classes, zero_init_residual)
