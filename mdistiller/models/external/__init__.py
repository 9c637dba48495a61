"""Networks of timm and torchvision: "timm/NAME" and "torchvision/NAME" in every zoo.

    net = get_model_entry("timm/vit_tiny_patch16_224", "cifar")(num_classes=10, image_size=(32, 32))

They are built for the number of classes and, where the architecture has a fixed size (`img_size` of
timm, `image_size` of torchvision), for the images of the data. Weights are random, or with
`pretrained=True` the released ones: the classifier is then a new one if the classes are others.
Further keyword arguments go to the library: `patch_size=4`, say. Each library's own feature
extraction gives logits and features in one forward; see :class:`ExternalNet` for what they are.
"""

from __future__ import annotations

import importlib
import pickle
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import PurePosixPath
from typing import Any
from urllib.parse import urlsplit

from mdistiller.models.external._wrapper import ExternalNet
from mdistiller.models.released import TORCHVISION, Pretrained, pretrained_on
from mdistiller.models.zoo import LIBRARIES, ModelEntry
from mdistiller.preprocessing import Preprocessing
from mdistiller.registry import UserError, first_line, suggest


def import_timm() -> Any:
    """The package timm.

    Raises:
        UserError: it is not installed.
    """
    try:
        return importlib.import_module("timm")
    except ImportError as error:
        raise UserError(
            f"timm cannot be imported ({first_line(error)}); pip install mdistiller[timm], or "
            "choose another network"
        ) from error


def unknown_network(full_name: str, names: list[str]) -> UserError:
    """The error for a name that the library does not have."""
    package, _, name = full_name.partition("/")
    return UserError(f"{package} has no network {name!r}{suggest(name, names)}")


def for_images(
    make: Callable[..., Any], key: str, size: Any, name: str, settings: dict[str, Any]
) -> Any:
    """`make(**settings)`, with the image size as argument `key` if `make` accepts it.

    Raises:
        UserError: `make` refuses the arguments.
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


class Timm:
    """Builds "timm/NAME" or "timm/NAME.TAG"; the tag says which released weights."""

    def __init__(self, full_name: str):
        self.__name__ = full_name
        self.library = import_timm()
        self.name = full_name.partition("/")[2]
        if not self.library.is_model(self.name):
            raise unknown_network(full_name, self.library.list_models())

    def __call__(
        self,
        num_classes: int = 1000,
        image_size: tuple[int, int] | None = None,
        pretrained: bool = False,
        **settings: Any,
    ) -> ExternalNet:
        from mdistiller.models.external._timm import TimmNet

        if settings.get("patch_drop_rate"):
            raise UserError(
                f"{self.__name__}: patch_drop_rate {settings['patch_drop_rate']} leaves out "
                "patches in training, so the rest form no map; leave it out, or set it to 0"
            )
        make = partial(self.library.create_model, self.name)
        settings["num_classes"] = num_classes
        if pretrained:
            self.require_release(pretrained, settings)
            settings["pretrained"] = True
        overlay = settings.get("pretrained_cfg_overlay", {})
        if "file" in overlay:  # timm reads JAX's arrays in a way of their own
            arrays = str(overlay["file"]).endswith(".npz")
            settings["pretrained_cfg_overlay"] = {"custom_load": arrays, **overlay}
        try:
            net = for_images(make, "img_size", image_size, self.__name__, settings)
        except (OSError, EOFError, pickle.PickleError) as error:  # of the download or the file
            raise UserError(
                f"the released weights of {self.__name__} could not be loaded "
                f"({first_line(error)}); timm downloads them on first use, or takes them from "
                "pretrained_cfg_overlay: {file: PATH} among the network's arguments"
            ) from error
        net.input_channels = settings.get("in_chans", 3)
        return TimmNet(net, self.__name__, image_size or net.default_cfg["input_size"][1:])

    def require_release(self, pretrained: Any, settings: Mapping[str, Any]) -> None:
        """Refuse a choice of weights that timm does not have."""
        if pretrained is not True:
            raise UserError(
                f"pretrained {pretrained!r}: timm's weights are chosen by name, "
                f"{self.__name__}.TAG; set pretrained: True"
            )
        if self.pretrained_on(settings) is None:
            raise UserError(f"timm publishes no weights of {self.__name__}; choose another network")

    def pretrained_on(self, settings: Mapping[str, Any]) -> Pretrained | None:
        """Classes and preprocessing of the weights by timm's record; None without weights."""
        if "pretrained_cfg" in settings:
            raise UserError(
                f"{self.__name__}: pretrained_cfg cannot be given; choose released weights by "
                "name, timm/NAME.TAG, or change parts of the record by pretrained_cfg_overlay"
            )
        default = self.library.get_pretrained_cfg(self.name)
        if default is None:
            return None
        try:
            record = replace(default, **settings.get("pretrained_cfg_overlay", {}))
        except TypeError as error:
            raise UserError(f"{self.__name__}: pretrained_cfg_overlay: {error}") from error
        if not record.has_weights:
            return None
        return Pretrained(record.num_classes, _timm_preprocessing(record))

    def preprocessing(self, settings: Mapping[str, Any], file: str) -> Preprocessing | None:
        """Preprocessing by which timm evaluates the architecture; None if unknown."""
        release = self.pretrained_on(settings)
        if release is not None:
            return release.preprocessing
        record = self.library.get_pretrained_cfg(self.name)
        return None if record is None else _timm_preprocessing(record)


def _timm_preprocessing(record: Any) -> Preprocessing:
    """Preprocessing in a record of timm (a PretrainedCfg)."""
    resize = {"squash": "stretch", "border": "pad"}.get(record.crop_mode, "crop")
    height, width = record.input_size[1:]
    return Preprocessing(
        *(tuple(record.mean), tuple(record.std)),
        *(height if height == width else 0, resize, record.crop_pct, record.interpolation),
    )


class Torchvision:
    """Builds "torchvision/NAME"; `pretrained` may name one of several releases."""

    def __init__(self, full_name: str):
        self.__name__ = full_name
        self.library = importlib.import_module("torchvision.models")  # a slow import
        self.name = full_name.partition("/")[2]
        names = self.library.list_models(module=self.library)
        if self.name not in names:
            raise unknown_network(full_name, names)

    def __call__(
        self,
        num_classes: int = 1000,
        image_size: tuple[int, int] | None = None,
        pretrained: bool | str = False,
        **settings: Any,
    ) -> ExternalNet:
        from mdistiller.models.external._torchvision import TorchvisionNet, load_released

        if "weights" in settings:
            raise UserError(f"{self.__name__}: set pretrained: {settings['weights']}, not weights")
        release = self.release(pretrained) if pretrained else None
        make = partial(self.library.get_model, self.name, weights=None)
        settings["num_classes"] = num_classes
        height, width = image_size or (224, 224)
        side = height if image_size and height == width else None
        net = for_images(make, "image_size", side, self.__name__, settings)
        wrapped = TorchvisionNet(net, self.__name__, (height, width))
        if release:
            load_released(wrapped, release)
        return wrapped

    def release(self, pretrained: bool | str = True) -> str:
        """`torchvision:` and the name of the weights; True: those that torchvision recommends."""
        releases = self.library.get_model_weights(self.name)
        choice = "DEFAULT" if pretrained is True else pretrained
        if choice not in releases.__members__:
            names = ", ".join(release.name for release in releases)
            raise UserError(
                f"pretrained {pretrained!r}: the released weights of {self.__name__} are {names}; "
                "name one of them, or set it to True"
            )
        return f"{TORCHVISION}{releases[choice]}"

    def pretrained_on(self, settings: Mapping[str, Any]) -> Pretrained | None:
        """Classes and preprocessing of the weights that `settings` choose."""
        return pretrained_on(self.release(settings.get("pretrained") or True))

    def preprocessing(self, settings: Mapping[str, Any], file: str) -> Preprocessing | None:
        """Preprocessing of the release whose file name is `file`, else of the default release."""
        releases = self.library.get_model_weights(self.name)
        for choice in releases:
            if PurePosixPath(urlsplit(choice.url).path).name == file:
                settings = {"pretrained": choice.name}
        if not settings.get("pretrained") and not releases.__members__:
            return None
        release = self.pretrained_on(settings)
        return release.preprocessing if release else None


@dataclass(frozen=True)
class Library:
    """Entries and names of a library's networks; registered under the part before the slash."""

    make: Callable[[str], Any]
    names: Callable[[], list[str]]

    def __call__(self, full_name: str) -> ModelEntry:
        return ModelEntry(self.make(full_name))


def timm_names() -> list[str]:
    """All of timm's networks."""
    return [f"timm/{name}" for name in import_timm().list_models()]


def torchvision_names() -> list[str]:
    """All of torchvision's classifiers."""
    models = importlib.import_module("torchvision.models")
    return [f"torchvision/{name}" for name in models.list_models(module=models)]


LIBRARIES.add("timm", Library(Timm, timm_names))
LIBRARIES.add("torchvision", Library(Torchvision, torchvision_names))
