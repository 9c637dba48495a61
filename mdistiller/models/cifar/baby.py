"""Two "baby" networks for quick studies on 32x32 images: two convolutions and a small perceptron.

As described where they come from, no ReLU follows the convolutions (`conv_relu=False`); the
"...ReLU" entries have it. Widths are our choice. At 10 classes the teacher has 2,184,202
parameters, the student 136,874.

`feats` are the two pooled maps (with the teacher's batch norm), `preact_feats` the same without the
ReLU and what follows it; without ReLU the two are one. `final_map` is the second of `feats`, and
`pooled_feat` the last hidden vector of the perceptron: not a global average (`globally_pooled`).
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch.nn.functional as F
from torch import Tensor, nn

from mdistiller.models.staged import Staged, StagedNet
from mdistiller.models.zoo import register_model
from mdistiller.registry import UserError

SIDE = 32


class BabyStage(nn.Module):
    """3x3 convolution, max-pooling, ReLU and batch norm, the last two if asked for."""

    def __init__(self, inputs: int, outputs: int, relu: bool, norm: bool):
        super().__init__()
        self.relu = relu
        self.conv = nn.Conv2d(inputs, outputs, 3, padding=1)
        self.bn = nn.BatchNorm2d(outputs) if norm else nn.Identity()

    def forward(self, x: Tensor) -> Staged:
        pooled = F.max_pool2d(self.conv(x), 2)
        if self.relu:  # it commutes with max-pooling, and is cheaper here
            return self.bn(F.relu(pooled)), pooled
        out = self.bn(pooled)
        return out, out


class BabyNet(StagedNet):
    """Two convolutional stages, hidden linear layers with ReLU, and the classifier.

    Args:
        widths: channels of the two convolutions.
        hidden: widths of the hidden linear layers.
        norm: batch norm after each pooling.
        dropout: share of the flattened map that is dropped in training.
        conv_relu: ReLU after each convolution.
    """

    globally_pooled = False

    def __init__(
        self,
        widths: tuple[int, int],
        hidden: Sequence[int],
        num_classes: int = 10,
        *,
        norm: bool = False,
        dropout: float = 0.0,
        conv_relu: bool = False,
    ):
        super().__init__(stem_channels=widths[0])
        self.stage1 = BabyStage(3, widths[0], conv_relu, norm)
        self.stage2 = BabyStage(widths[0], widths[1], conv_relu, norm)
        # with ReLU the norm comes after it, not before
        last_norm = "stage2.bn" if norm and not conv_relu else None
        self.declare_stage("stage2", channels=widths[1], norm=last_norm)
        sizes = [widths[1] * (SIDE // 4) ** 2, *hidden]
        layers: list[nn.Module] = [nn.Flatten(), nn.Dropout(dropout)]
        for inputs, outputs in pairwise(sizes):
            layers += [nn.Linear(inputs, outputs), nn.ReLU()]
        self.hidden = nn.Sequential(*layers)
        self.fc = nn.Linear(sizes[-1], num_classes)

    def stem(self, x: Tensor) -> Tensor:
        if x.shape[-2:] != (SIDE, SIDE):
            raise UserError(
                f"the baby networks take {SIDE}x{SIDE} images, not "
                f"{x.shape[-2]}x{x.shape[-1]}; choose another model or resize"
            )
        return self.stage1(x)[0]

    def embed(self, final_map: Tensor) -> Tensor:
        return self.hidden(final_map)


@register_model("cifar", "BabyTeacher")
def baby_teacher(num_classes: int = 100, conv_relu: bool = False) -> BabyNet:
    widths, hidden = (32, 64), (512, 128)
    return BabyNet(widths, hidden, num_classes, norm=True, dropout=0.15, conv_relu=conv_relu)


@register_model("cifar", "BabyStudent")
def baby_student(num_classes: int = 100, conv_relu: bool = False) -> BabyNet:
    return BabyNet((16, 32), (64,), num_classes, conv_relu=conv_relu)


@register_model("cifar", "BabyTeacherReLU")
def baby_teacher_relu(num_classes: int = 100) -> BabyNet:
    return baby_teacher(num_classes, conv_relu=True)


@register_model("cifar", "BabyStudentReLU")
def baby_student_relu(num_classes: int = 100) -> BabyNet:
    return baby_student(num_classes, conv_relu=True)
