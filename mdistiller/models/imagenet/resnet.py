"""ResNets for ImageNet (He et al., "Deep Residual Learning for Image Recognition", CVPR 2016, arXiv
1512.03385), with torchvision's state-dict keys: its weights load strictly.

The released weights are torchvision's first ones (IMAGENET1K_V1): published tables distil from
these. Its second ones for ResNet-50 and -101, of a longer recipe, make other teachers.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from mdistiller.models._residual import BasicBlock, Bottleneck, ResidualNet
from mdistiller.models.zoo import register_model


class ResNet(ResidualNet):
    """7x7 stem and max-pooling, both with stride 2, and four stages.

    Args:
        block: BasicBlock or Bottleneck.
        depths: blocks of each stage.
    """

    def __init__(
        self,
        block: type[BasicBlock] | type[Bottleneck],
        depths: Sequence[int],
        num_classes: int = 1000,
    ):
        stem = nn.Conv2d(3, 64, 7, stride=2, padding=3, bias=False)
        super().__init__(stem, block, (64, 128, 256, 512), depths, num_classes, pool=True)

    def get_bn_before_relu(self) -> list[nn.Module]:
        """The last batch norms of stages 2, 3 and 4: those that OFD was published with."""
        return super().get_bn_before_relu()[1:]


@register_model("imagenet", "ResNet18", checkpoint="torchvision:ResNet18_Weights.IMAGENET1K_V1")
def ResNet18(num_classes: int = 1000) -> ResNet:  # noqa: N802
    return ResNet(BasicBlock, (2, 2, 2, 2), num_classes)


@register_model("imagenet", "ResNet34", checkpoint="torchvision:ResNet34_Weights.IMAGENET1K_V1")
def ResNet34(num_classes: int = 1000) -> ResNet:  # noqa: N802
    return ResNet(BasicBlock, (3, 4, 6, 3), num_classes)


@register_model("imagenet", "ResNet50", checkpoint="torchvision:ResNet50_Weights.IMAGENET1K_V1")
def ResNet50(num_classes: int = 1000) -> ResNet:  # noqa: N802
    return ResNet(Bottleneck, (3, 4, 6, 3), num_classes)


@register_model("imagenet", "ResNet101", checkpoint="torchvision:ResNet101_Weights.IMAGENET1K_V1")
def ResNet101(num_classes: int = 1000) -> ResNet:  # noqa: N802
    return ResNet(Bottleneck, (3, 4, 23, 3), num_classes)
