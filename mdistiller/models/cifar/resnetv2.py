"""ResNets with a 3x3 stem, for small images (He et al., CVPR 2016, arXiv 1512.03385).

The ImageNet layout of four stages, without the large stem and its max-pooling. The file's name is
historical: blocks are those of the first paper, with the ReLU after the sum.

ResNet18 and ResNet50 have the original's state-dict names (`shortcut`), the others RepDistiller's
(`downsample`); files with either, and with `fc` for `linear`, load into all of them. Beside ResNets
these are wrn_50_2, a ResNet-50 with inner convolutions twice as wide (Zagoruyko, Komodakis, BMVC
2016, arXiv 1605.07146), and resnext50_32x4d, with 32 groups (Xie et al., "Aggregated Residual
Transformations for Deep Neural Networks", CVPR 2017, arXiv 1611.05431).
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from mdistiller.models import _residual
from mdistiller.models._layers import conv3x3
from mdistiller.models.zoo import register_model


class BasicBlock(_residual.BasicBlock):
    shortcut_name = "shortcut"


class Bottleneck(_residual.Bottleneck):
    shortcut_name = "shortcut"


class WideBottleneck(_residual.Bottleneck):
    group_width = 128


class GroupedBottleneck(_residual.Bottleneck):
    groups, group_width = 32, 4


class ResNet(_residual.ResidualNet):
    """Stem of 64 channels and four stages.

    Args:
        block: a kind of BasicBlock or Bottleneck.
        depths: blocks of each stage.
        zero_init_residual: start with the residual branches silent (gamma 0 in their last norm).
        stem: channels of the stem.
    """

    head = "linear"

    def __init__(
        self,
        block: type[_residual.BasicBlock] | type[_residual.Bottleneck],
        depths: Sequence[int],
        num_classes: int = 100,
        zero_init_residual: bool = False,
        stem: int = 64,
    ):
        super().__init__(conv3x3(3, stem), block, (64, 128, 256, 512), depths, num_classes)
        other = {"downsample", "shortcut"} - {block.shortcut_name}
        self.key_aliases = {other.pop(): block.shortcut_name, "fc": self.head}
        if zero_init_residual:
            for layer in self.modules():
                if isinstance(layer, _residual.ResidualBlock):
                    nn.init.zeros_(layer.get_parameter(f"{layer.last_norm}.weight"))


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


@register_model("cifar", "ResNet34")
def ResNet34(num_classes: int = 100) -> ResNet:  # noqa: N802
    return ResNet(_residual.BasicBlock, (3, 4, 6, 3), num_classes)


@register_model("cifar", "resnet34x4")
def resnet34x4(num_classes: int = 100) -> ResNet:
    """ResNet-34 with four times the widths of the CIFAR family, and its stem (resnet32x4's)."""
    return ResNet(_residual.BasicBlock, (3, 4, 6, 3), num_classes, stem=32)


@register_model("cifar", "wrn_50_2")
def wrn_50_2(num_classes: int = 100) -> ResNet:
    return ResNet(WideBottleneck, (3, 4, 6, 3), num_classes)


@register_model("cifar", "resnext50_32x4d")
def resnext50_32x4d(num_classes: int = 100) -> ResNet:
    return ResNet(GroupedBottleneck, (3, 4, 6, 3), num_classes)
