"""Input normalisation and size of a network that was trained on other images."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mdistiller.preprocessing import Statistics


def renormalize_input(net: nn.Module, given: Statistics, wanted: Statistics) -> None:
    """Make `net`, trained on images normalised by `wanted`, take images normalised by `given`.

    Adds one multiplication and addition per channel before each forward, or nothing where the two
    agree to float32's precision. State dicts do not change.
    """
    (mean, std), (own_mean, own_std) = (
        [list(map(float, part)) for part in s] for s in (given, wanted)
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


def resize_input(net: nn.Module, size: tuple[int, int]) -> None:
    """Make `net` resize its images to `size` (height, width) before each forward, bicubically."""
    net._input_size = size  # type: ignore[assignment]
    net.register_forward_pre_hook(_resize)


def _resize(net: Any, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    image, *rest = inputs
    if tuple(image.shape[2:]) == net._input_size:
        return inputs
    return (F.interpolate(image, net._input_size, mode="bicubic", antialias=True), *rest)


def input_size(net: nn.Module) -> tuple[int, int] | None:
    """The size set by :func:`resize_input`; None if it was not called."""
    return getattr(net, "_input_size", None)


def input_norm(net: nn.Module) -> list[list[float]] | None:
    """[mean, std] set by :func:`renormalize_input`; None if it was not called."""
    return getattr(net, "_image_norm", None)


def _renormalize(net: Any, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    image, *rest = inputs
    return (image * net.input_factor + net.input_offset, *rest)
