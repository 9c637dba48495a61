"""Wrapper that makes a StagedNet of a plain classifier, which returns logits."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from mdistiller.models.external._torchvision import try_maps
from mdistiller.models.external._wrapper import (
    FAILURES,
    MOST_WITHOUT_STEM,
    Collected,
    HookedNet,
    recorded_outputs,
    run_blank,
    share_state,
    stage_indices,
)
from mdistiller.models.staged import StagedNet, UnsupportedError
from mdistiller.registry import UserError, first_line


class PlainNet(HookedNet):
    """A wrapped network that returns logits, alone or with other values.

    Its classifier is the linear layer (or 1x1 convolution) whose output is the logits, and its
    stages are the last maps of each resolution. A network with RepDistiller's signature,
    `forward(x, is_feat=False)`, gives its own features, the first as the stem's.
    """

    def prepare(self, net: nn.Module, image: Tensor) -> nn.Module:
        self.gives_features = takes_is_feat(net)
        self.stage_names = []
        self.head = self._find_head(net, image)
        maps = {name: value for name, value in try_maps(net, image).items() if is_map(value)}
        maps.pop(self.head, None)
        if not maps:
            raise self.unsupported("none of its layers gives maps [N, C, h, w]")
        self.final_name = list(maps)[-1]
        if not self.gives_features:
            self.stage_names = choose_stages(maps)
        return self.keep_layers(net)

    def _find_head(self, net: nn.Module, image: Tensor) -> str:
        """Name of the last layer whose output is the logits."""
        with recorded_outputs(net) as outputs:
            logits = self.logits_of(net, image)

        def makes_logits(name: str) -> bool:
            if not isinstance(net.get_submodule(name), (nn.Linear, nn.Conv2d)):
                return False
            value = outputs[name].flatten(1)
            return value.shape == logits.shape and torch.allclose(value, logits, equal_nan=True)

        heads = [name for name in outputs if makes_logits(name)]
        if not heads:
            raise self.unsupported("its logits are not the output of a linear layer")
        return heads[-1]

    def logits_of(self, net: nn.Module, image: Tensor) -> Tensor:
        logits = logits_in(net(image))
        if logits is None or logits.ndim != 2:
            raise self.unsupported("it returns no logits [N, classes]")
        return logits

    def collect(self, x: Tensor) -> Collected:
        features: Sequence[Any] = []
        if self.gives_features:
            features, logits = self.net(x, is_feat=True)
        else:
            logits = logits_in(self.net(x))
        stages, final_map, pooled = self.take_layers()
        maps = [value for value in features if is_map(value)] or stages
        return Collected(logits, maps, [], final_map, pooled)

    def unsupported(self, reason: str) -> UnsupportedError:
        return UnsupportedError(
            f"network {self.name} cannot be used: {reason}; docs/extend/own_backbone.md shows what "
            "a network has to return"
        )


class LogitsNet(nn.Module):
    """A network without maps, wrapped: `(logits, {})` for the methods that read logits alone.

    The state dict is that of the wrapped network.

    Raises:
        UserError: it does not run on images of `image_size` (height, width), or gives no logits.
    """

    def __init__(self, net: nn.Module, name: str, image_size: Sequence[int]):
        super().__init__()
        self.net, self.name = net, name
        try:
            output = run_blank(net, image_size)
        except FAILURES as error:
            size, reason = f"{image_size[1]}x{image_size[0]}", first_line(error)
            raise UserError(f"{name} does not run on {size} images: {reason}") from error
        logits = logits_in(output)
        if logits is None or logits.ndim != 2:
            raise UnsupportedError(
                f"network {name} cannot be used: it returns no logits [N, classes]; "
                "docs/extend/own_backbone.md shows what a network has to return"
            )
        share_state(self)

    def forward(self, x: Tensor) -> tuple[Tensor | None, dict[str, Any]]:
        """Logits [N, classes], and no features."""
        return logits_in(self.net(x)), {}


def has_maps(net: nn.Module, image_size: Sequence[int]) -> bool:
    """Whether a layer of a network returns a map of more than one position.

    True if the network does not run on such images. Its mode is restored.
    """
    try:
        with recorded_outputs(net) as outputs:
            run_blank(net, image_size)
    except FAILURES:
        return True
    return any(map(is_map, outputs.values()))


def as_staged(net: nn.Module, name: str, image_size: Sequence[int]) -> nn.Module:
    """`net` itself if it returns `(logits, features)`, else wrapped.

    Raises:
        UserError: it does not run on such images, or cannot be wrapped.
    """
    if isinstance(net, StagedNet):
        return net
    try:
        output = run_blank(net, image_size)
    except Exception:  # the wrapper reports it
        output = None
    if keeps_contract(output):
        return net
    if has_maps(net, image_size):
        return PlainNet(net, name, image_size)
    return net if is_logits_and_mapping(output) else LogitsNet(net, name, image_size)


def keeps_contract(output: Any) -> bool:
    """Whether a network's output is `(logits, features)` as methods read them."""
    return is_logits_and_mapping(output) and not {"feats", "pooled_feat"}.isdisjoint(output[1])


def is_logits_and_mapping(output: Any) -> bool:
    """Whether a network's output is logits and a mapping, perhaps empty."""
    if not (isinstance(output, (tuple, list)) and len(output) == 2):
        return False
    return isinstance(output[0], Tensor) and isinstance(output[1], Mapping)


def logits_in(output: Any) -> Tensor | None:
    """The logits in a plain network's output: a tensor, a tuple, or an object with `logits`."""
    if isinstance(output, Tensor):
        return output
    if isinstance(output, Mapping):
        output = output.get("logits")
    elif hasattr(output, "logits"):
        output = output.logits
    elif isinstance(output, (tuple, list)) and output:
        output = output[0]
    return output if isinstance(output, Tensor) else None


def takes_is_feat(net: nn.Module) -> bool:
    """Whether a network has RepDistiller's signature."""
    return "is_feat" in inspect.signature(net.forward).parameters


def is_map(value: Any) -> bool:
    """Whether a value is a map of more than one position."""
    return isinstance(value, Tensor) and value.ndim == 4 and value.shape[2:].numel() > 1


def choose_stages(maps: Mapping[str, Tensor]) -> list[str]:
    """The stem and the stages among all layers, by their maps: the last of each resolution."""
    names = list(maps)
    last = {tuple(value.shape[2:]): k for k, value in enumerate(maps.values())}
    chosen = sorted(last.values())
    if len(chosen) == 1:
        chosen = stage_indices([1] * len(names))
    if len(chosen) <= MOST_WITHOUT_STEM:
        chosen = [0, *chosen]
    return [names[k] for k in chosen]
