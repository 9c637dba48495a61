"""Networks for images of one or four channels, from those for three."""

from __future__ import annotations

from typing import TypeVar

import torch
from torch import nn

from mdistiller.registry import UserError

Net = TypeVar("Net", bound=nn.Module)


def with_channels(net: Net, channels: int, name: str = "") -> Net:
    """`net`, for images of 3 channels, with its first convolution changed in place for others.

    Its weights become their sum over the channels for 1; for more, their mean serves for the new
    channels, and all are scaled by 3 / channels: so the outputs keep their size, and released
    weights stay useful.

    Raises:
        UserError: the first convolution does not take 3 channels.
    """
    convs = (module for module in net.modules() if isinstance(module, nn.Conv2d))
    first = next(convs, None)
    if first is None or first.in_channels != 3 or first.groups != 1:
        raise UserError(
            f"network {name or type(net).__name__} does not begin with a convolution of 3 "
            f"channels, which could be changed to {channels}: set DATASET.CHANNELS 3"
        )
    with torch.no_grad():
        mean = first.weight.mean(dim=1, keepdim=True)
        more = [first.weight, mean.expand(-1, max(0, channels - 3), -1, -1)]
        weight = 3 * mean if channels == 1 else torch.cat(more, dim=1) * (3 / channels)
    first.weight, first.in_channels = nn.Parameter(weight), channels
    net.input_channels = channels  # type: ignore[assignment]
    return net
