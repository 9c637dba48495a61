"""Layers, stages and initial weights that families share."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from mdistiller.models.staged import Staged


def conv1x1(inputs: int, outputs: int, stride: int = 1, groups: int = 1) -> nn.Conv2d:
    """1x1 convolution without bias."""
    return nn.Conv2d(inputs, outputs, 1, stride=stride, groups=groups, bias=False)


def conv3x3(inputs: int, outputs: int, stride: int = 1, groups: int = 1) -> nn.Conv2d:
    """3x3 convolution without bias that keeps the size (up to the stride)."""
    return nn.Conv2d(inputs, outputs, 3, stride=stride, padding=1, groups=groups, bias=False)


def projection(inputs: int, outputs: int, stride: int = 1) -> nn.Sequential:
    """Shortcut of a residual block that changes size or width: 1x1 convolution and batch norm."""
    return nn.Sequential(conv1x1(inputs, outputs, stride), nn.BatchNorm2d(outputs))


class ResidualStage(nn.Sequential):
    """Blocks that return their pre-activation; a ReLU follows each."""

    def forward(self, x: Tensor) -> Staged:
        preact = x
        for block in self:
            preact = block(x)
            x = F.relu(preact)
        return x, preact


class ActivatedStage(nn.Sequential):
    """Layers in sequence, then a ReLU that is not a child."""

    def forward(self, x: Tensor) -> Staged:
        preact = super().forward(x)
        return F.relu(preact), preact


class LinearStage(nn.Sequential):
    """Layers in sequence without a last ReLU, hence without pre-activation."""

    def forward(self, x: Tensor) -> Staged:
        return super().forward(x), None


def init_weights(net: nn.Module, linear_std: float | None = None) -> None:
    """Kaiming-normal convolutions by fan-out, sigma = sqrt(2 / (k*k*out)), and zero biases.

    Args:
        net: network whose layers are initialised, in the order of its modules.
        linear_std: sigma of linear weights, whose biases become zero; None leaves linear layers.
    """
    for layer in net.modules():
        if isinstance(layer, nn.Conv2d):
            nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")
        elif isinstance(layer, nn.Linear) and linear_std is not None:
            nn.init.normal_(layer.weight, std=linear_std)
        else:
            continue
        if layer.bias is not None:
            nn.init.zeros_(layer.bias)
