"""Call a network's constructor and check that it fits the data."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from mdistiller.dataset import Data, TestData
from mdistiller.models import ModelEntry, as_staged, with_channels
from mdistiller.preprocessing import input_channels
from mdistiller.registry import UserError, first_line


def make_network(
    entry: ModelEntry,
    num_classes: int,
    image_size: tuple[int, int],
    settings: Any,
    key: str,
    channels: int = 3,
) -> nn.Module:
    """Call an entry's constructor.

    Args:
        num_classes: 0: a backbone, whose classifier makes logits [N, 0].
        image_size: (height, width), for constructors that ask.
        settings: further keyword arguments; `key` is what the config calls them. `num_classes: 0`
            among them makes a backbone whatever the data.
        channels: of the images. A network for 3 has its first convolution changed for others
            (:func:`mdistiller.models.with_channels`), unless its arguments say in_chans.

    Raises:
        UserError: the network needs other arguments, or does not fit the images.
    """
    settings = dict(settings)
    if settings.get("num_classes") == 0:
        num_classes = settings.pop("num_classes")
    facts = constructor_facts(entry, max(1, num_classes), image_size)
    name = getattr(entry.constructor, "__name__", "of your own")
    net = _construct(entry, name, facts, settings, key)
    takes, staged = input_channels(net), as_staged(net, name, image_size)
    if takes == 3 and channels != 3:
        with_channels(staged, channels, name)
    elif channels != takes:
        raise UserError(
            f"network {name} takes images of {takes} channels, and the data have {channels}: set "
            f"DATASET.CHANNELS {takes}, or change {key}"
        )
    if num_classes == 0:
        remove_classes(staged, name)
    return staged


def _construct(
    entry: ModelEntry, name: str, facts: Mapping[str, Any], settings: dict[str, Any], key: str
) -> nn.Module:
    clash = sorted(facts.keys() & settings.keys())
    if clash:
        raise UserError(f"{key} gives {', '.join(clash)}, which comes from the data: leave it out")
    missing = required_arguments(entry) - {*facts, *settings}
    if missing:
        raise UserError(f"network {name} needs {', '.join(sorted(missing))}: give it in {key}")
    try:
        net = entry(**facts, **settings)
    except TypeError as error:
        if not settings:
            raise
        raise UserError(f"{key} {settings}: {error}") from error
    if not isinstance(net, nn.Module):
        raise UserError(
            f"the constructor of network {name} returns a {type(net).__name__}, not a module "
            "(docs/extend/own_backbone.md)"
        )
    return net


def remove_classes(net: Any, name: str) -> None:
    """Leave the classifier of a network without classes: its logits are [N, 0].

    Raises:
        UserError: the classifier is not known.
    """
    if not hasattr(net, "classifier"):
        raise UserError(
            f"network {name} cannot serve as a backbone without classes: it has no classifier() "
            "that could be left out; derive it from StagedNet (docs/extend/own_backbone.md)"
        )
    layer = net.classifier()
    width = "out_features" if isinstance(layer, nn.Linear) else "out_channels"
    setattr(layer, width, 0)
    for part in ("weight", "bias"):
        value = getattr(layer, part)
        if value is not None:
            setattr(layer, part, nn.Parameter(value.detach()[:0].clone(), requires_grad=False))


def required_arguments(entry: ModelEntry) -> set[str]:
    """Names of the constructor's arguments without a default."""
    return {
        parameter.name
        for parameter in inspect.signature(entry.constructor).parameters.values()
        if parameter.default is parameter.empty
        and parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY)
    }


def constructor_facts(
    entry: ModelEntry, num_classes: int, image_size: tuple[int, int]
) -> dict[str, Any]:
    """The facts about the data that are passed to an entry's constructor."""
    wanted = inspect.signature(entry.constructor).parameters
    takes_any = any(parameter.kind is parameter.VAR_KEYWORD for parameter in wanted.values())
    facts: dict[str, Any] = {}
    if "num_classes" in wanted or takes_any:
        facts["num_classes"] = num_classes
    if "image_size" in wanted:
        facts["image_size"] = image_size
    return facts


@torch.no_grad()
def check_input(net: nn.Module, name: str, data: Data | TestData, backbone: bool = False) -> None:
    """Refuse a network that cannot take the data's images, or returns another number of logits.

    The network is unchanged.

    Args:
        backbone: it has no classes, whatever the data.
    """
    was_training = net.training
    net.eval()
    try:
        logits = net(torch.zeros(1, input_channels(net), *data.image_size))[0]
    except UserError:
        raise
    except (RuntimeError, ValueError) as error:
        height, width = data.image_size
        first = first_line(error)
        raise UserError(f"network {name} cannot take {width}x{height} images: {first}") from error
    finally:
        net.train(was_training)
    if logits.shape[1:] != (0 if backbone else data.num_classes,):
        raise UserError(
            f"network {name} gives logits {list(logits.shape)} for an image, but the data has "
            f"{data.num_classes} classes; let its constructor take num_classes "
            "(docs/extend/own_backbone.md)"
        )
