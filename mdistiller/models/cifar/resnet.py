"""ResNets for CIFAR, of depth 6n + 2 (He et al., "Deep Residual Learning for Image Recognition",
CVPR 2016, arXiv 1512.03385, section 4.2), in the usual and in a wide ("x4") form.

Other than in the paper, shortcuts that change size or width are projections.
"""

from __future__ import annotations

from collections.abc import Sequence

from mdistiller.models._layers import conv3x3
from mdistiller.models._residual import BasicBlock, ResidualNet
from mdistiller.models.zoo import register_model

NARROW = (16, 16, 32, 64)
WIDE = (32, 64, 128, 256)


class ResNet(ResidualNet):
    """Stem and three stages of basic blocks.

    Args:
        depth: number of layers, 6n + 2 for n blocks a stage.
        widths: channels of the stem and of the stages.
    """

    def __init__(self, depth: int, widths: Sequence[int] = NARROW, num_classes: int = 100):
        if depth < 8 or (depth - 2) % 6:
            raise ValueError(f"depth {depth} is not 6n + 2 (8, 14, 20, ...)")
        depths = [(depth - 2) // 6] * 3
        super().__init__(conv3x3(3, widths[0]), BasicBlock, widths[1:], depths, num_classes)


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
