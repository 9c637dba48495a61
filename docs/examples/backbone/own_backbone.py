"""A backbone of your own: a stem and stages of plain convolutions, in two sizes."""

from itertools import pairwise

import torch.nn.functional as F
from torch import nn

from mdistiller.models import StagedNet, register_model


class PlainStage(nn.Sequential):
    """3x3 convolutions with batch norm and ReLU; gives its output and what the last ReLU got."""

    def __init__(self, inputs, outputs, depth, stride):
        layers = []
        for i in range(depth):
            first = i == 0
            layers += [
                nn.Conv2d(inputs if first else outputs, outputs, 3, stride if first else 1, 1),
                nn.BatchNorm2d(outputs),
                nn.ReLU(),
            ]
        super().__init__(*layers[:-1])

    def forward(self, x):
        preact = super().forward(x)
        return F.relu(preact), preact


class Plain(StagedNet):
    def __init__(self, widths, depth, num_classes):
        super().__init__(stem_channels=widths[0])
        self.conv = nn.Conv2d(3, widths[0], 3, padding=1)
        self.bn = nn.BatchNorm2d(widths[0])
        for i, (inputs, outputs) in enumerate(pairwise([widths[0], *widths]), start=1):
            name = f"stage{i}"
            self.add_module(name, PlainStage(inputs, outputs, depth, 1 if i == 1 else 2))
            self.declare_stage(name, channels=outputs, norm=f"{name}.{3 * depth - 2}")
        self.fc = nn.Linear(widths[-1], num_classes)

    def stem(self, x):
        return F.relu(self.bn(self.conv(x)))


@register_model("cifar", "plain_large")
def plain_large(num_classes=10):
    return Plain((32, 64, 128), 2, num_classes)


@register_model("cifar", "plain_small")
def plain_small(num_classes=10):
    return Plain((8, 16, 32), 1, num_classes)
