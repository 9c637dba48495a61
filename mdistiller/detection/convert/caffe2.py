"""Convert ImageNet ResNets of Caffe2 (MSRA's R-50.pkl, R-101.pkl) for BACKBONE_WEIGHTS.

detectron2 starts training from them. Their batch norms are folded to a factor and an offset. No
file of MSRA was available when this was written; the names are those of detectron2's loader.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mdistiller.registry import UserError

BACKBONE = "backbone"
"""The facts' key in a file of a backbone."""
_BLOCK = re.compile(
    r"res(?P<n>[2-5])_(?P<block>\d+)_branch(?P<where>1|2a|2b|2c)_(?P<kind>w|bn_s|bn_b)"
)
_STEM = {
    "conv1_w": "conv1.weight",
    "res_conv1_bn_s": "bn1.weight",
    "res_conv1_bn_b": "bn1.bias",
}
_LAYERS = {  # convolution and batch norm
    "1": ("downsample.0", "downsample.1"),
    "2a": ("conv1", "bn1"),
    "2b": ("conv2", "bn2"),
    "2c": ("conv3", "bn3"),
}
_EPS = 1e-5


def is_backbone(arrays: Mapping[str, Tensor]) -> bool:
    """Whether the weights are those of such a ResNet."""
    return "conv1_w" in arrays


def convert_backbone(arrays: Mapping[str, Tensor], path: Path) -> dict[str, Any]:
    """The contents of a file that `DETECTION.*.BACKBONE_WEIGHTS` takes.

    Args:
        arrays: by Caffe2's names.
        path: their file, for errors.

    Raises:
        UserError: a weight has an unknown name. Missing weights are found at loading.
    """
    state: dict[str, Tensor] = {}
    unknown = []
    for name, value in arrays.items():
        target = rename(name)
        if target is not None:
            state[target] = value
        elif not re.fullmatch(r"(fc1000|pred)_[wb]|.*_momentum", name) and (
            name != "conv1_b" or value.any()
        ):
            unknown.append(name)
    if unknown:
        raise UserError(
            f"{path} holds {len(unknown)} weights that a ResNet with folded batch norms does not "
            f"have ({', '.join(unknown[:3])}{', ...' if len(unknown) > 3 else ''})"
        )
    for name in [name for name in state if re.search(r"(bn\d|downsample\.1)\.weight$", name)]:
        norm = name.removesuffix("weight")
        state[f"{norm}running_mean"] = torch.zeros_like(state[name])
        # With the norm's eps this is 1: the factor stays as it is.
        state[f"{norm}running_var"] = torch.full_like(state[name], 1 - _EPS)
    return {"model": state, BACKBONE: {"input": "bgr", "stride_in_1x1": True}}


def rename(name: str) -> str | None:
    """torchvision's name of a weight; None without a counterpart."""
    match = _BLOCK.fullmatch(name)
    if not match:
        return _STEM.get(name)
    conv, norm = _LAYERS[match["where"]]
    kinds = {"w": f"{conv}.weight", "bn_s": f"{norm}.weight", "bn_b": f"{norm}.bias"}
    return f"layer{int(match['n']) - 1}.{match['block']}.{kinds[match['kind']]}"
