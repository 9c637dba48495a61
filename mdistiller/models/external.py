"""Networks of timm and torchvision: "timm/NAME" and "torchvision/NAME" in every zoo.

    net = get_model_entry("timm/vit_tiny_patch16_224", "cifar")(num_classes=10, image_size=(32, 32))

They are built with random weights for the number of classes and, where the architecture has a
fixed size (`img_size` of timm, `image_size` of torchvision), for the images of the data. Further
keyword arguments go to the library: `patch_size=4`, say. Each library's own feature extraction
gives logits and features in one forward; see :class:`ExternalNet` for what they are.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from functools import partial
from typing import Any

from mdistiller.models._base import LIBRARIES, ModelEntry
from mdistiller.models._external import ExternalNet, first_line
from mdistiller.registry import UserError, suggest


def library(name: str, hint: str) -> Any:
    """The imported package.

    Raises:
        UserError: it is not installed; `hint` says how to change that.
    """
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise UserError(f"{name} cannot be imported ({first_line(error)}); {hint}") from error


def known_name(full_name: str, known: list[str]) -> UserError:
    """The error for a name that the library does not have."""
    package, _, name = full_name.partition("/")
    return UserError(f"{package} has no network {name!r}{suggest(name, known)}")


def for_images(
    make: Callable[..., Any], key: str, size: Any, name: str, settings: dict[str, Any]
) -> Any:
    """`make(**settings)`, told the size of the images under `key` if it takes that.

    Raises:
        UserError: it cannot be built so.
    """
    attempts = [settings]
    if size is not None and key not in settings:
        attempts.insert(0, {**settings, key: size})
    for attempt in attempts:
        try:
            return make(**attempt)
        except TypeError as error:
            if attempt is not settings and key in str(error):
                continue  # any size will do
            raise cannot_be_built(name, attempt, error) from error
        except (ValueError, AssertionError, RuntimeError) as error:
            raise cannot_be_built(name, attempt, error) from error
    raise AssertionError("unreachable")


def cannot_be_built(name: str, settings: dict[str, Any], error: Exception) -> UserError:
    """The error for a constructor that refuses its arguments."""
    given = ", ".join(f"{key}={value}" for key, value in settings.items())
    return UserError(f"{name} cannot be built with {given}: {first_line(error)}")


@LIBRARIES.register("timm")
def timm_entry(full_name: str) -> ModelEntry:
    """The entry of "timm/NAME"."""
    timm = library("timm", "pip install mdistiller[timm], or choose another network")
    name = full_name.partition("/")[2]
    if not timm.is_model(name):
        raise known_name(full_name, timm.list_models())

    def build(
        num_classes: int = 1000, image_size: tuple[int, int] | None = None, **settings: Any
    ) -> ExternalNet:
        from mdistiller.models._timm import TimmNet

        make = partial(timm.create_model, name)
        settings["num_classes"] = num_classes
        net = for_images(make, "img_size", image_size, full_name, settings)
        return TimmNet(net, full_name, image_size or net.default_cfg["input_size"][1:])

    build.__name__ = full_name
    return ModelEntry(build)


@LIBRARIES.register("torchvision")
def torchvision_entry(full_name: str) -> ModelEntry:
    """The entry of "torchvision/NAME"."""
    from torchvision import models  # a slow import

    name = full_name.partition("/")[2]
    known = models.list_models(module=models)
    if name not in known:
        raise known_name(full_name, known)

    def build(
        num_classes: int = 1000, image_size: tuple[int, int] | None = None, **settings: Any
    ) -> ExternalNet:
        from mdistiller.models._torchvision import TorchvisionNet

        make = partial(models.get_model, name, weights=None)
        settings["num_classes"] = num_classes
        height, width = image_size or (224, 224)
        side = height if image_size and height == width else None
        net = for_images(make, "image_size", side, full_name, settings)
        return TorchvisionNet(net, full_name, (height, width))

    build.__name__ = full_name
    return ModelEntry(build)
