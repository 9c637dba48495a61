"""VGG with batch norm, for small images (Simonyan, Zisserman, "Very Deep Convolutional Networks for
Large-Scale Image Recognition", ICLR 2015, arXiv 1409.1556), with one linear layer as its head.

The first block counts as the stem. The pooling before the last block is there for Tiny-ImageNet
only; it depends on the height, not on the zoo, so one network serves both.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from mdistiller.models._layers import ActivatedStage, init_weights
from mdistiller.models.staged import Staged, StagedNet
from mdistiller.models.zoo import register_model

WIDTHS = (64, 128, 256, 512, 512)


class Block(ActivatedStage):
    """Convolutions with bias, each with batch norm and ReLU; the last ReLU is not a child.

    Args:
        pool: halve the input first: True, False, or the one height at which to do it.
    """

    def __init__(self, inputs: int, outputs: int, depth: int, pool: bool | int):
        layers: list[nn.Module] = []
        for i in range(depth):
            layers.append(nn.Conv2d(inputs if i == 0 else outputs, outputs, 3, padding=1))
            layers += [nn.BatchNorm2d(outputs), nn.ReLU()]
        super().__init__(*layers[:-1])
        self.pool = pool

    def forward(self, x: Tensor) -> Staged:
        if self.pool is True or (self.pool and self.pool == x.shape[2]):
            x = F.max_pool2d(x, 2)
        return super().forward(x)


class VGG(StagedNet):
    """Five blocks.

    Args:
        depths: convolutions of each block.
    """

    head = "classifier"

    def __init__(self, depths: Sequence[int], num_classes: int = 100):
        super().__init__(stem_channels=WIDTHS[0])
        # an image of height 64 (to 71) reaches the last block with height 8
        pools: tuple[bool | int, ...] = (False, True, True, True, 8)
        inputs = 3
        for i, (depth, width, pool) in enumerate(zip(depths, WIDTHS, pools, strict=True)):
            self.add_module(f"block{i}", Block(inputs, width, depth, pool))
            if i > 0:
                self.declare_stage(
                    f"block{i}", channels=width, norm=f"block{i}.{3 * (depth - 1) + 1}"
                )
            inputs = width
        self._modules["classifier"] = nn.Linear(inputs, num_classes)
        init_weights(self, linear_std=0.01)

    def stem(self, x: Tensor) -> Tensor:
        return self.get_submodule("block0")(x)[0]


@register_model("cifar", "vgg8")
def vgg8_bn(num_classes: int = 100) -> VGG:
    return VGG((1, 1, 1, 1, 1), num_classes)


@register_model("cifar", "vgg11")
def vgg11_bn(num_classes: int = 100) -> VGG:
    return VGG((1, 1, 2, 2, 2), num_classes)


@register_model("cifar", "vgg13", checkpoint="cifar_teachers/vgg13_vanilla/ckpt_epoch_240.pth")
def vgg13_bn(num_classes: int = 100) -> VGG:
    return VGG((2, 2, 2, 2, 2), num_classes)


@register_model("cifar", "vgg16")
def vgg16_bn(num_classes: int = 100) -> VGG:
    return VGG((2, 2, 3, 3, 3), num_classes)


@register_model("cifar", "vgg19")
def vgg19_bn(num_classes: int = 100) -> VGG:
    return VGG((2, 2, 4, 4, 4), num_classes)
