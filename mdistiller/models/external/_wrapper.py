"""Networks of other libraries behind the contract of StagedNet."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from mdistiller.models.staged import StagedNet, UnsupportedError
from mdistiller.preprocessing import input_channels
from mdistiller.registry import UserError, first_line

_QUARTERS = 4
MOST_WITHOUT_STEM = 4
"""Of more stages than this the first counts as the stem."""


FAILURES = (RuntimeError, ValueError, AssertionError, TypeError, AttributeError, LookupError)


class Collected(NamedTuple):
    """What one forward of a wrapped network gives.

    Attributes:
        logits: [N, classes].
        maps: of the stem and of every stage, [N, C, h, w].
        class_tokens: of every stage, [N, P, C]; empty for networks without such.
        final_map: what is pooled, [N, D, h, w].
        pooled: the classifier's input, [N, D].
    """

    logits: Tensor
    maps: list[Tensor]
    class_tokens: list[Tensor]
    final_map: Tensor
    pooled: Tensor


class ExternalNet(StagedNet):
    """A wrapped network that gives `(logits, features)` as :class:`StagedNet` does.

    `feats` are the last outputs of each resolution, or, of networks with one resolution, those at
    each quarter of the depth; before them comes the stem's. Tokens are reshaped to maps
    [N, C, h, w]; class tokens are kept apart in `class_tokens`, a list of [N, P, C] for each stage,
    absent where there are none. There are no `preact_feats`.

    The state dict is that of the wrapped network, so its own checkpoint files fit.

    Args:
        net: the network, which :meth:`collect` of the subclass knows how to run.
        name: for errors.
        image_size: (height, width) that it is tried on.

    Raises:
        UserError: it does not run on such images, or its head is more than a linear layer.
    """

    def __init__(self, net: nn.Module, name: str, image_size: Sequence[int]):
        super().__init__(stem_channels=0)
        self.name = name
        channels = input_channels(net)
        self.input_channels = channels
        image = torch.rand(1, channels, *image_size, generator=torch.Generator().manual_seed(0))
        with torch.no_grad(), uneven_norms(net):
            try:
                logits = self.logits_of(net.eval(), image)
            except UserError:
                raise
            except FAILURES as error:
                size, reason = f"{image_size[1]}x{image_size[0]}", first_line(error)
                raise UserError(f"{name} does not run on {size} images: {reason}") from error
            try:
                self.net = self.prepare(net, image)
                self._declare(image, logits)
            except UserError:
                raise
            except FAILURES as error:
                reason = f"its features cannot be read ({first_line(error)})"
                raise self.unsupported(reason) from error
        share_state(self)

    def logits_of(self, net: nn.Module, image: Tensor) -> Tensor:
        """What the network, as it was given, says of an image: [N, classes]."""
        logits: Tensor = net(image)
        return logits

    def prepare(self, net: nn.Module, image: Tensor) -> nn.Module:
        """The network as :meth:`collect` runs it; finds out what that needs.

        Args:
            net: in eval mode.
            image: a batch of one.
        """
        return net

    def collect(self, x: Tensor) -> Collected:
        """Run the network."""
        raise NotImplementedError

    def forward(self, x: Tensor) -> tuple[Tensor, dict[str, Any]]:
        collected = self.collect(x)
        features: dict[str, Any] = {"feats": collected.maps}
        if collected.class_tokens:
            features["class_tokens"] = collected.class_tokens
        features |= {"pooled_feat": collected.pooled, "final_map": collected.final_map}
        return collected.logits, features

    def _declare(self, image: Tensor, expected: Tensor) -> None:
        """Set the stages' channels and check the contract; `expected`: the network's logits."""
        logits, features = self.eval()(image)
        pooled = features["pooled_feat"]
        again = self.classifier()(pooled).flatten(1)
        if not (_close(logits, expected) and _close(again, expected)):
            raise self.unsupported("its logits are not the classifier of its pooled features")
        self.globally_pooled = _close(features["final_map"].mean((2, 3)), pooled.flatten(1))
        self.stem_channels, *widths = (feat.shape[1] for feat in features["feats"])
        for width in widths:
            self.declare_stage(channels=width)
        self.train()

    def add_neck(self, hidden: int, outputs: int, size: tuple[int, int]) -> None:
        """Refused: the wrapped network computes its logits itself."""
        raise UnsupportedError(
            f"{self.name} cannot get another head, as this method gives its student: choose a "
            "network of the zoo, or one that derives from StagedNet (docs/extend/own_backbone.md)"
        )

    def accept_neck(self, state: Mapping[str, Tensor]) -> None:
        """Nothing: no file of such a network has a neck."""

    def unsupported(self, reason: str) -> UnsupportedError:
        """The error for a network that does not fit the contract."""
        return UnsupportedError(f"{self.name} cannot be used here: {reason}; choose another one")


class HookedNet(ExternalNet):
    """A wrapped network whose features are outputs of layers that :meth:`prepare` names.

    Attributes:
        stage_names: layers whose outputs are the stem's and the stages'.
        final_name: layer whose output is pooled.
        head: the classifier.
    """

    stage_names: list[str]
    final_name: str

    def keep_layers(self, net: nn.Module) -> nn.Module:
        """Make the named layers of `net` keep what :meth:`take_layers` returns."""
        for name in {*self.stage_names, self.final_name}:
            keep_output(net.get_submodule(name))
        keep_input(net.get_submodule(self.head))
        return net

    def take_layers(self) -> tuple[list[Tensor], Tensor, Tensor]:
        """Outputs of the stages and of the final layer, and the classifier's input."""
        names = {*self.stage_names, self.final_name}
        kept = {name: take(self.net.get_submodule(name)) for name in names}
        pooled = take(self.net.get_submodule(self.head))
        return [kept[name] for name in self.stage_names], kept[self.final_name], pooled

    def classifier(self) -> nn.Linear | nn.Conv2d:
        layer = self.net.get_submodule(self.head)
        assert isinstance(layer, (nn.Linear, nn.Conv2d))
        return layer


@contextlib.contextmanager
def recorded_outputs(net: nn.Module) -> Iterator[dict[str, Any]]:
    """Within the context, the last output of every submodule by name, in order of the calls."""
    outputs: dict[str, Any] = {}

    def record(name: str, layer: nn.Module, inputs: Any, output: Any) -> None:
        outputs.pop(name, None)  # a layer that is called again comes later
        outputs[name] = output

    layers = [(name, layer) for name, layer in net.named_modules() if name]
    hooks = [layer.register_forward_hook(partial(record, name)) for name, layer in layers]
    try:
        yield outputs
    finally:
        for hook in hooks:
            hook.remove()


def run_blank(net: nn.Module, image_size: Sequence[int]) -> Any:
    """The output of `net` in eval mode for an image of zeros; its mode is restored."""
    training = net.training
    try:
        with torch.no_grad():
            return net.eval()(torch.zeros(1, input_channels(net), *image_size))
    finally:
        net.train(training)


@contextlib.contextmanager
def uneven_norms(net: nn.Module) -> Iterator[None]:
    """For a while, no norm of `net` is the identity: one that is left out shows in the logits.

    Afterwards weights, biases and running statistics are as they were.
    """
    generator = torch.Generator().manual_seed(0)
    kept: list[tuple[Tensor, Tensor]] = []
    for module in net.modules():
        if "Norm" not in type(module).__name__:  # libraries have kinds of their own
            continue
        for name, spread in (("weight", 1), ("running_var", 1), ("bias", 0), ("running_mean", 0)):
            value = getattr(module, name, None)
            if isinstance(value, Tensor):
                kept.append((value.data, value.data.clone()))
                drawn = torch.rand(value.shape, generator=generator)
                value.data.copy_(drawn * 0.5 + 0.75 * spread)
    try:
        yield
    finally:
        for value, before in kept:
            value.copy_(before)


def stage_indices(heights: Sequence[int]) -> list[int]:
    """Which of the outputs are stages: the last of every resolution, or each quarter of the depth.

    Args:
        heights: of the outputs, from shallow to deep.
    """
    count = len(heights)
    if len(set(heights)) > 1:
        return [k for k in range(count) if k + 1 == count or heights[k + 1] != heights[k]]
    return sorted({-(-count * quarter // _QUARTERS) - 1 for quarter in range(1, _QUARTERS + 1)})


def as_map(tokens: Tensor, grid: Sequence[int]) -> Tensor:
    """Tokens [N, P + h * w, C], the first P without a place, as a map [N, C, h, w]."""
    height, width = grid
    return tokens[:, -height * width :].mT.unflatten(2, (height, width))


def _close(first: Tensor, second: Tensor) -> bool:
    return first.shape == second.shape and torch.allclose(first, second, rtol=1e-3, atol=1e-4)


def keep_output(layer: nn.Module) -> None:
    """Have a layer keep its output of each forward, for :func:`take`."""
    layer.register_forward_hook(_keep_output)


def keep_input(layer: nn.Module) -> None:
    """Have a layer keep its first input of each forward, for :func:`take`."""
    layer.register_forward_pre_hook(_keep_input)


def take(layer: Any) -> Tensor:
    """What a layer kept; it keeps it no longer."""
    kept: Tensor = layer.kept
    layer.kept = None
    return kept


# The hooks refer to no network, so a copied network has hooks of its own.
def _keep_output(layer: Any, inputs: Any, output: Any) -> None:
    layer.kept = output[0] if isinstance(output, tuple) else output  # some add the map's size


def _keep_input(layer: Any, inputs: Any) -> None:
    layer.kept = inputs[0]


def share_state(wrapper: nn.Module) -> None:
    """Give a wrapper the state dict of what it has as `net`."""
    wrapper.register_state_dict_post_hook(_unwrap_keys)
    wrapper.register_load_state_dict_pre_hook(_wrap_keys)


def _unwrap_keys(module: nn.Module, state: dict[str, Any], prefix: str, metadata: Any) -> None:
    wrapped = f"{prefix}net."
    for key in [key for key in state if key.startswith(wrapped)]:
        state[prefix + key[len(wrapped) :]] = state.pop(key)


def _wrap_keys(module: nn.Module, state: dict[str, Any], prefix: str, *rest: Any) -> None:
    for key in [key for key in state if key.startswith(prefix)]:
        state[f"{prefix}net.{key[len(prefix) :]}"] = state.pop(key)
