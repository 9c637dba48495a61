"""ResNet-18 and -50 with a 3x3 stem, for small images (He et al., CVPR 2016, arXiv 1512.03385).

The ImageNet layout of four stages, without the large stem and its max-pooling. The file's name is
historical: blocks are those of the first paper, with the ReLU after the sum.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from mdistiller.models import _residual
from mdistiller.models._base import register_model
from mdistiller.models._layers import conv3x3


class BasicBlock(_residual.BasicBlock):
    shortcut_name = "shortcut"


class Bottleneck(_residual.Bottleneck):
    shortcut_name = "shortcut"


class ResNet(_residual.ResidualNet):
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
        super().__init__(conv3x3(3, 64), block, (64, 128, 256, 512), depths, num_classes)
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
