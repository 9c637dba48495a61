"""What a network costs: its parameters, and the operations of one forward."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from mdistiller.preprocessing import input_channels


class Cost(NamedTuple):
    """Of one image.

    Attributes:
        parameters: their number.
        flops: operations of convolutions and matrix products, a multiplication and an addition
            counted as two (torch.utils.flop_counter).
        features: what the forward gave beside the logits.
    """

    parameters: int
    flops: int
    features: dict[str, Any]


@torch.no_grad()
def count_cost(net: nn.Module, image_size: tuple[int, int]) -> Cost:
    """Run a network, in the mode it is in, on one image of (height, width) and count."""
    counter = FlopCounterMode(display=False)
    with counter:
        _, features = net(torch.zeros(1, input_channels(net), *image_size))
    parameters = sum(p.numel() for p in net.parameters())
    return Cost(parameters, counter.get_total_flops(), features)
