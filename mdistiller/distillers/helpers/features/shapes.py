"""Shapes of what a network returns, found by a forward pass on a blank image."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from mdistiller.distillers.helpers.training.checks import logits_and_features
from mdistiller.preprocessing import input_channels
from mdistiller.registry import UserError

Size = tuple[int, int] | None
"""(height, width) of the images; None where it is not given."""


def missing_feature(name: str, returned: Iterable[str]) -> UserError:
    """The error for a feature that a network does not return."""
    return UserError(
        f"this method needs {name!r}, which the network does not return "
        f"(it returns {', '.join(returned) or 'no features'}; docs/extend/own_backbone.md)"
    )


class FeatureShapes(dict[str, Any]):
    """Name of a feature -> its shape, or list of shapes; a missing feature is a UserError.

    Flat features [N, D] among the stages' are refused: methods that read stages need maps.
    """

    def __getitem__(self, name: str) -> Any:
        shapes = super().__getitem__(name)
        if name in ("feats", "preact_feats"):
            require_maps(name, shapes)
        return shapes

    def __missing__(self, name: str) -> Any:
        raise missing_feature(name, self)


def require_maps(name: str, shapes: Iterable[Sequence[int]]) -> None:
    """Refuse flat features where a method compares maps."""
    flat = next((shape for shape in shapes if len(shape) < 3), None)
    if flat is not None:
        raise UserError(
            f"this method needs maps [N, C, H, W], but the network returns {name!r} of shape "
            f"{list(flat)} (docs/extend/own_backbone.md)"
        )


@contextlib.contextmanager
def preserve_state(net: nn.Module) -> Iterator[None]:
    """Put `net` in eval mode; on exit restore the modes and the global random generators."""
    modes = [(module, module.training) for module in net.modules()]
    gpus = {param.device for param in net.parameters() if param.is_cuda}
    net.eval()
    try:
        with torch.random.fork_rng(devices=list(gpus)):
            yield
    finally:
        for module, mode in modes:
            module.training = mode


def blank_image(net: nn.Module, image_size: Sequence[int] | None = None) -> Tensor:
    """Zeros [1, C, height, width] in the dtype and on the device of `net`; 32 x 32 by default."""
    height, width = image_size or (32, 32)
    some = next(net.parameters(), torch.empty(0))
    return torch.zeros(1, input_channels(net), height, width, dtype=some.dtype, device=some.device)


@torch.no_grad()
def probe(net: nn.Module, image_size: Sequence[int] | None = None) -> FeatureShapes:
    """Shapes of the features of `net` by name, and of its "logits", for one blank image.

    The network runs in eval mode; its parameters, buffers and modes and the global random
    generators keep their state.

    Args:
        image_size: (height, width); None: 32 x 32, enough where only channels are asked for.
    """
    with preserve_state(net):
        logits, features = logits_and_features(net(blank_image(net, image_size)), net)
    outputs = {"logits": logits, **features}
    return FeatureShapes({name: _shapes(value) for name, value in outputs.items()})


def _shapes(value: Any) -> Any:
    if isinstance(value, (list, tuple)):
        return [_shapes(item) for item in value]
    return value.shape


def get_feat_shapes(
    student: nn.Module, teacher: nn.Module, input_size: Sequence[int]
) -> tuple[list[torch.Size], list[torch.Size]]:
    """Shapes of the `feats` of both networks for one image of `input_size` (height, width)."""
    shapes = [probe(net, input_size) for net in (student, teacher)]
    first, second = (s.get("feats") or s["feats"] for s in shapes)
    return first, second
