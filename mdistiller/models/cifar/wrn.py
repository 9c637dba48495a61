"""Wide residual networks (Zagoruyko, Komodakis, "Wide Residual Networks", BMVC 2016,
arXiv 1605.07146), without dropout.

Blocks begin with batch norm and ReLU, so `feats` are the raw, signed sums, and `preact_feats` what
the next stage's first batch norm (for the last stage, the final one) makes of them. That norm runs
once, and its output goes to both readers. (The original ran it twice per forward, which in
training mode moved its running statistics twice.)
"""

from __future__ import annotations

from typing import cast

import torch.nn.functional as F
from torch import Tensor, nn

from mdistiller.models._layers import conv1x1, conv3x3, init_weights
from mdistiller.models.staged import Staged, StagedNet
from mdistiller.models.zoo import register_model


class BasicBlock(nn.Module):
    """Pre-activation block of two 3x3 convolutions; its `bn1` is run by the caller.

    A shortcut that changes the width is a bare 1x1 convolution of the activated input.
    """

    def __init__(self, inputs: int, outputs: int, stride: int):
        super().__init__()
        self.bn1 = nn.BatchNorm2d(inputs)
        self.conv1 = conv3x3(inputs, outputs, stride)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.conv2 = conv3x3(outputs, outputs)
        self.convShortcut = conv1x1(inputs, outputs, stride) if inputs != outputs else None

    def forward(self, x: Tensor, normed: Tensor) -> Tensor:
        """The raw sum, from the raw input and what `bn1` made of it."""
        active = F.relu(normed)
        out = self.conv2(F.relu(self.bn2(self.conv1(active))))
        return out + (x if self.convShortcut is None else self.convShortcut(active))


class WideStage(nn.Module):
    """Blocks in turn; `normed` is the input after the first block's `bn1`."""

    def __init__(self, depth: int, inputs: int, outputs: int, stride: int):
        super().__init__()
        first = BasicBlock(inputs, outputs, stride)
        self.layer = nn.Sequential(
            first, *(BasicBlock(outputs, outputs, 1) for _ in range(depth - 1))
        )

    def forward(self, x: Tensor, normed: Tensor) -> Tensor:
        first, *rest = self.layer
        x = first(x, normed)
        for block in rest:
            x = block(x, cast(BasicBlock, block).bn1(x))
        return x


class WideResNet(StagedNet):
    """Stem of 16 channels and three stages.

    Args:
        depth: number of layers, 6n + 4 for n blocks a stage.
        widen_factor: the stages have 16, 32 and 64 channels times this.
    """

    def __init__(self, depth: int, widen_factor: int, num_classes: int = 100):
        if depth < 10 or (depth - 4) % 6:
            raise ValueError(f"depth {depth} is not 6n + 4 (10, 16, 22, ...)")
        super().__init__(stem_channels=16)
        widths = (16, 16 * widen_factor, 32 * widen_factor, 64 * widen_factor)
        norms = ("block2.layer.0.bn1", "block3.layer.0.bn1", "bn1")
        self.conv1 = conv3x3(3, 16)
        for i, norm in enumerate(norms, start=1):
            stage = WideStage((depth - 4) // 6, widths[i - 1], widths[i], stride=1 if i == 1 else 2)
            self.add_module(f"block{i}", stage)
            self.declare_stage(f"block{i}", channels=widths[i], norm=norm)
        self.bn1 = nn.BatchNorm2d(widths[-1])
        self.fc = nn.Linear(widths[-1], num_classes)
        init_weights(self)
        nn.init.zeros_(self.fc.bias)

    def run_stages(self, x: Tensor) -> list[Staged]:
        x = self.conv1(x)
        outputs: list[Staged] = [(x, x)]
        normed = self.get_submodule("block1.layer.0.bn1")(x)
        for stage, next_norm in zip(self.stages, self.get_bn_before_relu(), strict=True):
            x = self.get_submodule(stage.paths[0])(x, normed)
            normed = next_norm(x)
            outputs.append((x, normed))
        return outputs

    def last_map(self, out: Tensor, preact: Tensor | None) -> Tensor:
        assert preact is not None
        return F.relu(preact)


@register_model("cifar", "wrn_16_1")
def wrn_16_1(num_classes: int = 100) -> WideResNet:
    return WideResNet(16, 1, num_classes)


@register_model("cifar", "wrn_16_2")
def wrn_16_2(num_classes: int = 100) -> WideResNet:
    return WideResNet(16, 2, num_classes)


@register_model("cifar", "wrn_16_4")
def wrn_16_4(num_classes: int = 100) -> WideResNet:
    return WideResNet(16, 4, num_classes)


@register_model("cifar", "wrn_28_2")
def wrn_28_2(num_classes: int = 100) -> WideResNet:
    return WideResNet(28, 2, num_classes)


@register_model("cifar", "wrn_28_4")
def wrn_28_4(num_classes: int = 100) -> WideResNet:
    return WideResNet(28, 4, num_classes)


@register_model("cifar", "wrn_40_1")
def wrn_40_1(num_classes: int = 100) -> WideResNet:
    return WideResNet(40, 1, num_classes)


@register_model(
    "cifar", "wrn_40_2", checkpoint="cifar_teachers/wrn_40_2_vanilla/ckpt_epoch_240.pth"
)
def wrn_40_2(num_classes: int = 100) -> WideResNet:
    return WideResNet(40, 2, num_classes)
