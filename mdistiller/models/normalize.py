"""A network that was trained on images normalised in another way than those it is given."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from mdistiller.preprocessing import Statistics

#: Mean and standard deviation of each channel, for images in [0, 1].


def renormalize_input(net: nn.Module, given: Statistics, own: Statistics) -> None:
    """Have `net` see images normalised by `own` where it is given such normalised by `given`.

    One multiplication and addition a channel before each forward; nothing where the two agree, to
    float32's precision. State dicts stay as they are.
    """
    (mean, std), (own_mean, own_std) = (
        [list(map(float, part)) for part in s] for s in (given, own)
    )
    net._image_norm = [own_mean, own_std]  # type: ignore[assignment]
    pairs = zip(mean + std, own_mean + own_std, strict=True)
    if all(math.isclose(one, other, rel_tol=1e-6, abs_tol=1e-7) for one, other in pairs):
        return
    factor = [s / o for s, o in zip(std, own_std, strict=True)]
    offset = [(m - o) / d for m, o, d in zip(mean, own_mean, own_std, strict=True)]
    for name, values in (("input_factor", factor), ("input_offset", offset)):
        net.register_buffer(name, torch.tensor(values).view(-1, 1, 1), persistent=False)
    net.register_forward_pre_hook(_renormalize)


def input_norm(net: nn.Module) -> list[list[float]] | None:
    """[mean, std] that a network wants its images normalised with; None if it was never told."""
    return getattr(net, "_image_norm", None)


def _renormalize(net: Any, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    image, *rest = inputs
    return (image * net.input_factor + net.input_offset, *rest)
