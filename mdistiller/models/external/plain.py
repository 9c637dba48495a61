"""A user's plain classifier, one that returns logits and little else, as a StagedNet."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from mdistiller.models._base import StagedNet, UnsupportedError
from mdistiller.models.external._torchvision import try_maps
from mdistiller.models.external._wrapper import (
    FAILURES,
    MOST_WITHOUT_STEM,
    Collected,
    ExternalNet,
    keep_input,
    keep_output,
    share_state,
    stage_indices,
    take,
)
from mdistiller.registry import UserError, first_line


class PlainNet(ExternalNet):
    """A network that returns logits, alone or with other things, wrapped.

    Its classifier is the linear layer (or 1x1 convolution) whose output is the logits, and its
    stages are the last maps of each resolution. A network with RepDistiller's signature,
    `forward(x, is_feat=False)`, gives its own features, the first as the stem's.
    """

    def prepare(self, net: nn.Module, image: Tensor) -> nn.Module:
        self.gives_features = takes_is_feat(net)
        self.stage_names: list[str] = []
        self.head = self._find_head(net, image)
        found = {name: value for name, value in try_maps(net, image).items() if is_map(value)}
        found.pop(self.head, None)
        if not found:
            raise self.unsupported("none of its layers gives maps [N, C, h, w]")
        self.final_name = list(found)[-1]
        if not self.gives_features:
            self.stage_names = choose_stages(found)
        for name in {*self.stage_names, self.final_name}:
            keep_output(net.get_submodule(name))
        keep_input(net.get_submodule(self.head))
        return net

    def _find_head(self, net: nn.Module, image: Tensor) -> str:
        """Name of the last layer whose output is the logits."""
        found: dict[str, Tensor] = {}

        def note(name: str, layer: nn.Module, inputs: Any, output: Tensor) -> None:
            found[name] = output.flatten(1)

        layers = {
            name: layer
            for name, layer in net.named_modules()
            if name and isinstance(layer, (nn.Linear, nn.Conv2d))
        }
        hooks = [layer.register_forward_hook(partial(note, n)) for n, layer in layers.items()]
        logits = self.logits_of(net, image)
        for hook in hooks:
            hook.remove()
        heads = [
            name
            for name, value in found.items()
            if value.shape == logits.shape and torch.allclose(value, logits, equal_nan=True)
        ]
        if not heads:
            raise self.unsupported("its logits are not the output of a linear layer")
        return heads[-1]

    def logits_of(self, net: nn.Module, image: Tensor) -> Tensor:
        logits = logits_in(net(image))
        if logits is None or logits.ndim != 2:
            raise self.unsupported("it returns no logits [N, classes]")
        return logits

    def collect(self, x: Tensor) -> Collected:
        if self.gives_features:
            own, logits = self.net(x, is_feat=True)
            maps = [value for value in own if is_map(value)]
        else:
            logits, maps = logits_in(self.net(x)), []
        names = {*self.stage_names, self.final_name}
        kept = {name: take(self.net.get_submodule(name)) for name in names}
        maps = maps or [kept[name] for name in self.stage_names]
        pooled = take(self.net.get_submodule(self.head))
        return Collected(logits, maps, [], kept[self.final_name], pooled)

    def classifier(self) -> nn.Linear | nn.Conv2d:
        layer = self.net.get_submodule(self.head)
        assert isinstance(layer, (nn.Linear, nn.Conv2d))
        return layer

    def unsupported(self, reason: str) -> UnsupportedError:
        return UnsupportedError(
            f"network {self.name} cannot be used: {reason}; docs/own_backbone.md shows what a "
            "network has to return"
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
        training = net.training
        with torch.no_grad():
            try:
                output = net.eval()(torch.zeros(1, 3, *image_size))
            except FAILURES as error:
                size, reason = f"{image_size[1]}x{image_size[0]}", first_line(error)
                raise UserError(f"{name} does not run on {size} images: {reason}") from error
        net.train(training)
        logits = logits_in(output)
        if logits is None or logits.ndim != 2:
            raise UnsupportedError(
                f"network {name} cannot be used: it returns no logits [N, classes]; "
                "docs/own_backbone.md shows what a network has to return"
            )
        share_state(self)

    def forward(self, x: Tensor) -> tuple[Tensor | None, dict[str, Any]]:
        """Logits [N, classes], and no features."""
        return logits_in(self.net(x)), {}


def has_maps(net: nn.Module, image_size: Sequence[int]) -> bool:
    """Whether a layer of a network gives a map of more than one position; leaves it as it was.

    True as well where that cannot be tried.
    """
    seen: list[bool] = []
    hooks = [
        layer.register_forward_hook(lambda layer, inputs, output: seen.append(is_map(output)))
        for name, layer in net.named_modules()
        if name
    ]
    training = net.training
    try:
        with torch.no_grad():
            net.eval()(torch.zeros(1, 3, *image_size))
    except FAILURES:
        return True
    finally:
        net.train(training)
        for hook in hooks:
            hook.remove()
    return any(seen)


def as_staged(net: nn.Module, name: str, image_size: Sequence[int]) -> nn.Module:
    """`net` itself if it returns `(logits, {...})` by itself, else wrapped.

    Raises:
        UserError: it does not run on such images, or cannot be wrapped.
    """
    if isinstance(net, StagedNet):
        return net
    training, output = net.training, None
    try:
        with torch.no_grad():
            output = net.eval()(torch.zeros(1, 3, *image_size))
    except Exception:  # which the wrapper reports
        output = None
    net.train(training)
    if keeps_contract(output):
        return net
    if has_maps(net, image_size):
        return PlainNet(net, name, image_size)
    return net if is_logits_and_mapping(output) else LogitsNet(net, name, image_size)


def keeps_contract(output: Any) -> bool:
    """Whether a network's output is `(logits, features)` as methods read them."""
    return is_logits_and_mapping(output) and not {"feats", "pooled_feat"}.isdisjoint(output[1])


def is_logits_and_mapping(output: Any) -> bool:
    """Whether a network's output is logits, and a mapping of further things, perhaps empty."""
    if not (isinstance(output, (tuple, list)) and len(output) == 2):
        return False
    return isinstance(output[0], Tensor) and isinstance(output[1], Mapping)


def logits_in(output: Any) -> Tensor | None:
    """The logits in what a plain network returned: a tensor, a tuple, or a thing with `logits`."""
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


def choose_stages(found: Mapping[str, Tensor]) -> list[str]:
    """The stem and the stages among all layers, by their maps: the last of each resolution."""
    names = list(found)
    last = {tuple(value.shape[2:]): k for k, value in enumerate(found.values())}
    chosen = sorted(last.values())
    if len(chosen) == 1:
        chosen = stage_indices([1] * len(names))
    if len(chosen) <= MOST_WITHOUT_STEM:
        chosen = [0, *chosen]
    return [names[k] for k in chosen]
