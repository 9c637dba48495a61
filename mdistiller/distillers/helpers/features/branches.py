"""Branches from a stage of a network to logits, for OFA; laid out as by its authors.

A network has S stages; d is a stage's width, D that of the classifiers' inputs.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

_GRID = 7  # tokens a side after merging
_HEADS = 4


def init_branch(branch: nn.Module) -> None:
    """Kaiming-normal convolutions by fan-out, linear layers normal with sigma .02, biases 0."""
    for layer in branch.modules():
        if isinstance(layer, nn.Conv2d):
            nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")
        elif isinstance(layer, nn.Linear):
            nn.init.trunc_normal_(layer.weight, std=0.02)
        elif isinstance(layer, nn.MultiheadAttention):
            nn.init.trunc_normal_(layer.in_proj_weight, std=0.02)
            continue
        else:
            continue
        if layer.bias is not None:
            nn.init.zeros_(layer.bias)


def separable(inputs: int, outputs: int) -> list[nn.Module]:
    """Half the size: two depthwise 3x3 convolutions, the first with stride 2, each with a 1x1."""
    layers: list[nn.Module] = []
    for stride, width in ((2, inputs), (1, outputs)):
        layers += [
            nn.Conv2d(inputs, inputs, 3, stride, padding=1, groups=inputs, bias=False),
            nn.Conv2d(inputs, width, 1, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(),
        ]
    return layers


class ConvBranch(nn.Sequential):
    """For convolutional stages: S - k separable blocks, each of twice the width, the last of D.

    Behind the last stage a 1x1 convolution to D. Then the mean over positions, and a linear layer.

    Args:
        shape: of the stage's map, [N, d, h, w].
        later: S - k, the number of stages behind it.
        width: D.
        classes: number of logits.
    """

    def __init__(self, shape: Sequence[int], later: int, width: int, classes: int):
        inputs = shape[1]
        widths = [inputs * 2**k for k in range(later)] + [width]
        layers: list[nn.Module] = [] if later else [nn.Conv2d(inputs, width, 1)]
        for k in range(later):
            layers += separable(widths[k], widths[k + 1])
        super().__init__(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, classes))
        init_branch(self)


class PatchMerging(nn.Module):
    """Maps [N, d, h, w] to half the size: each 2x2 patch to one token, of width D."""

    def __init__(self, inputs: int, width: int):
        super().__init__()
        self.layers = nn.Sequential(
            nn.LayerNorm(4 * inputs), nn.Linear(4 * inputs, width), nn.GELU()
        )

    def forward(self, x: Tensor) -> Tensor:
        height, width = x.shape[2:]
        x = F.pad(x, (0, width % 2, 0, height % 2))
        patches = F.pixel_unshuffle(x, 2)  # [N, 4 d, h / 2, w / 2]
        return self.layers(patches.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class TokenBranch(nn.Module):
    """For stages of tokens: merge patches down to 7x7, max(S - k, 1) transformer blocks of width D.

    The first class token, or without one the mean of all, goes through a layer norm to a linear
    layer.

    Args: as for :class:`ConvBranch`.
    """

    def __init__(self, shape: Sequence[int], later: int, width: int, classes: int):
        super().__init__()
        inputs, side = shape[1], min(shape[2:])
        merges: list[nn.Module] = []
        while side > _GRID:
            merges.append(PatchMerging(width if merges else inputs, width))
            side = -(-side // 2)
        if not merges and inputs != width:
            merges.append(nn.Conv2d(inputs, width, 1))
        self.takes_class_tokens = inputs == width
        self.merges = nn.Sequential(*merges)
        heads = _HEADS if width % _HEADS == 0 else 1
        blocks = [
            nn.TransformerEncoderLayer(
                width, heads, 4 * width, 0.0, "gelu", batch_first=True, norm_first=True
            )
            for _ in range(max(later, 1))
        ]
        self.blocks = nn.Sequential(*blocks)
        self.head = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, classes))
        init_branch(self)

    def forward(self, x: Tensor, class_tokens: Tensor | None = None) -> Tensor:
        """Logits from a map [N, d, h, w] and class tokens [N, P, d], which count if d is D."""
        tokens = self.merges(x).flatten(2).mT
        if class_tokens is None or not self.takes_class_tokens:
            return self.head(self.blocks(tokens).mean(dim=1))
        return self.head(self.blocks(torch.cat([class_tokens, tokens], dim=1))[:, 0])
