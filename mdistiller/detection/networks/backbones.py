"""Backbones with a feature pyramid: maps "0" to "3" (P2 to P5, strides 4 to 32) and "pool" (P6)."""

from __future__ import annotations

from typing import NamedTuple

import torchvision.models as zoo
from torch import nn
from torchvision.models.detection.backbone_utils import BackboneWithFPN
from torchvision.ops import FrozenBatchNorm2d


class Levels(NamedTuple):
    """The last layers of a classification network's stages, and their channels."""

    layers: dict[str, str]
    channels: tuple[int, ...]


_RESNET = {f"layer{k}": str(k - 1) for k in range(1, 5)}
_BASIC, _BOTTLENECK = (64, 128, 256, 512), (256, 512, 1024, 2048)
# The last block of each resolution, as the original has it; torchvision's own choice is the first.
_MOBILENET = {"3": "0", "6": "1", "13": "2", "17": "3"}

BACKBONES = {
    "resnet18": Levels(_RESNET, _BASIC),
    "resnet34": Levels(_RESNET, _BASIC),
    "resnet50": Levels(_RESNET, _BOTTLENECK),
    "resnet101": Levels(_RESNET, _BOTTLENECK),
    "mobilenet_v2": Levels(_MOBILENET, (24, 32, 96, 320)),
}


def build_backbone(name: str, channels: int = 256, stride_in_1x1: bool = False) -> BackboneWithFPN:
    """A network of BACKBONES, with random weights, under a pyramid of `channels`.

    Args:
        stride_in_1x1: bottlenecks have their stride in the first 1x1 layer, as in MSRA's and
            detectron2's ResNets, not in the 3x3 one, as in torchvision's.
    """
    net = zoo.get_model(name, weights=None)
    if stride_in_1x1:
        for block in net.modules():
            if isinstance(block, zoo.resnet.Bottleneck):
                block.conv1.stride, block.conv2.stride = block.conv2.stride, block.conv1.stride
    levels = BACKBONES[name]
    body = net if isinstance(net, zoo.ResNet) else net.features
    return BackboneWithFPN(body, levels.layers, list(levels.channels), channels)


def freeze_stages(body: nn.Module, count: int) -> None:
    """Freeze the first stages of a body with their batch norms: 1 is the stem, 2 adds P2's stage.

    Args:
        body: of a BackboneWithFPN.
        count: 0 freezes nothing.
    """
    ends = list(body.return_layers)  # type: ignore[arg-type]  # a dict
    names = [name for name, _ in body.named_children()]
    if count == 1:
        first = "layer1" if "layer1" in names else "1"
        frozen = names[: names.index(first)]
    else:
        frozen = names[: names.index(ends[count - 2]) + 1] if count else []
    for name in frozen:
        body.get_submodule(name).requires_grad_(False)
        body.set_submodule(name, with_frozen_norms(body.get_submodule(name)))


def with_frozen_norms(module: nn.Module, eps: float | None = None) -> nn.Module:
    """Replace the batch norms in `module` by constant ones; returns the module or its replacement.

    Args:
        eps: of the constant norms; by default that of the batch norms.
    """
    if isinstance(module, nn.BatchNorm2d):
        frozen = FrozenBatchNorm2d(module.num_features, module.eps if eps is None else eps)
        frozen.load_state_dict(module.state_dict())
        return frozen
    for name, child in module.named_children():
        module.add_module(name, with_frozen_norms(child, eps))
    return module
