"""The memory format of images and convolutions (SOLVER.CHANNELS_LAST)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import convert_conv2d_weight_memory_format

from mdistiller.distillers import Distiller


def use_channels_last(distiller: Distiller) -> None:
    """Convert all convolution weights to torch.channels_last, in place.

    Student and teacher convert their images likewise, whoever calls them: the maps between two
    convolutions then follow by themselves. Copies of a network do the same.
    """
    convert_conv2d_weight_memory_format(distiller, torch.channels_last)  # type: ignore[arg-type]
    for net in (*distiller.students(), distiller.teacher):
        if isinstance(net, nn.Module):
            net.register_forward_pre_hook(channels_last_input)


def channels_last_input(net: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Any, ...]:
    """The hook of :func:`use_channels_last`."""
    image, *rest = inputs
    return (image.contiguous(memory_format=torch.channels_last), *rest)
