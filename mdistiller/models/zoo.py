"""The model zoos: tables of networks by name, and their entries (ModelEntry)."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from mdistiller.models.released import (
    TORCHVISION,
    Pretrained,
    place_of,
    pretrained_on,
    released_file,
    url_of,
)
from mdistiller.models.staged import StagedNet
from mdistiller.preprocessing import Preprocessing
from mdistiller.registry import Registry, UserError
from mdistiller.runtime import project_root
from mdistiller.weights import load_network, split_key


class ModelEntry(NamedTuple):
    """An entry of a zoo: unpacks as `(constructor, checkpoint)`; a call builds the network.

    `checkpoint` is a file of released weights, or `torchvision:` and their name in torchvision. A
    constructor with an argument `pretrained` loads released weights itself; if it has attributes
    `pretrained_on` and `preprocessing`, the methods of these names call them.
    """

    constructor: Callable[..., StagedNet]
    checkpoint: str | None = None

    def __call__(
        self,
        *args: Any,
        pretrained: bool | str = False,
        new_head: bool = False,
        **kwargs: Any,
    ) -> StagedNet:
        """Build the network, with the released weights if `pretrained`.

        A string instead of True names one of several releases, if the constructor has several.
        With `new_head`, weights for another number of classes get a new classifier; without, they
        are refused, except by constructors that load released weights themselves.

        Raises:
            UserError: there are no released weights, they cannot be loaded, or they do not fit.
        """
        if pretrained and self.loads_itself:
            return self.constructor(*args, pretrained=pretrained, **kwargs)
        net = self.constructor(*args, **kwargs)
        if pretrained:
            name = self.constructor.__name__
            if self.checkpoint is None:
                raise UserError(f"{name} has no released weights; name a checkpoint of your own")
            classes = kwargs.get("num_classes") or net.classifier().weight.shape[0]
            path = self.released(None if new_head else classes)
            if path is None:
                raise UserError(
                    f"the released weights of {name} are not at {self.checkpoint}; put them there "
                    "(download_ckpts/README.md says where from), or name a checkpoint of your own"
                )
            load_network(net, path, name, classes, new_head)
        return net

    @property
    def loads_itself(self) -> bool:
        """Whether the constructor takes `pretrained`."""
        return "pretrained" in inspect.signature(self.constructor).parameters

    def pretrained_on(self, settings: Mapping[str, Any]) -> Pretrained | None:
        """Classes and preprocessing of the released weights for `settings`, if known.

        Args:
            settings: keyword arguments of the constructor.
        """
        if self.checkpoint is not None:
            return pretrained_on(self.checkpoint)
        describe = getattr(self.constructor, "pretrained_on", None)
        return describe(settings) if describe else None

    def preprocessing(self, settings: Mapping[str, Any], weights: Any = "") -> Preprocessing | None:
        """Preprocessing of images for weights of this architecture's library, if known.

        Args:
            weights: a file, whose name may be that of one of several releases.
        """
        describe = getattr(self.constructor, "preprocessing", None)
        if describe:
            return describe(settings, split_key(weights)[0].name)  # type: ignore[no-any-return]
        release = self.pretrained_on(settings)
        return release.preprocessing if release else None

    @property
    def of_library(self) -> bool:
        """Whether the network is of a library that documents its preprocessing (timm, ...)."""
        return hasattr(self.constructor, "preprocessing")

    def is_release(self, path: str | Path) -> bool:
        """Whether a file, in any folder, has the name of the released weights."""
        return (
            self.checkpoint is not None
            and split_key(path)[0].name == place_of(self.checkpoint).name
        )

    def default_classes(self) -> int:
        """The constructor's default number of classes."""
        argument = inspect.signature(self.constructor).parameters.get("num_classes")
        if argument is None or argument.default is argument.empty:
            name = getattr(self.constructor, "__name__", type(self.constructor).__name__)
            raise UserError(
                f"the checkpoint of {name} is for a number of classes that its constructor does "
                "not state: give it num_classes=..., with a default (docs/extend/own_backbone.md)"
            )
        return int(argument.default)

    def released(self, num_classes: int | None = None, fetch: bool = True) -> Path | None:
        """The file of the released weights; None if it does not exist.

        Args:
            num_classes: classes of the data, if known.
            fetch: download the file if it is missing and torchvision publishes it.

        Raises:
            UserError: the download fails, or would be of weights for another number of classes.
        """
        if self.checkpoint is None:
            return None
        path, url = place_of(self.checkpoint), url_of(self.checkpoint)
        if path.is_file():
            return path
        if url is None or not fetch:
            return None
        name = self.constructor.__name__
        if num_classes not in (None, self.default_classes()):
            raise UserError(
                f"the released weights of {name} are for {self.default_classes()} classes, but "
                f"{num_classes} are wanted; name a checkpoint of your own"
            )
        return released_file(self.checkpoint, name)


cifar_model_dict = Registry("CIFAR model")
tiny_imagenet_model_dict = Registry("Tiny-ImageNet model")
imagenet_model_dict = Registry("ImageNet model")

#: Libraries by the part of a name before its slash: "LIBRARY/NAME".
LIBRARIES = Registry("model library")

_ZOOS = Registry("model zoo")
_ZOOS.update(
    cifar=cifar_model_dict, tiny_imagenet=tiny_imagenet_model_dict, imagenet=imagenet_model_dict
)

Constructor = TypeVar("Constructor", bound=Callable[..., StagedNet])


def register_model(
    zoo: str, name: str, *, checkpoint: str | None = None
) -> Callable[[Constructor], Constructor]:
    """Decorator that enters a constructor into a zoo.

    Args:
        zoo: "cifar", "tiny_imagenet" or "imagenet".
        name: the name that configs use.
        checkpoint: released weights, relative to `download_ckpts/`; or `torchvision:` and
            torchvision's name of them.
    """
    path = checkpoint
    if checkpoint and not checkpoint.startswith(TORCHVISION):
        path = str(project_root() / "download_ckpts" / checkpoint)

    def enter(constructor: Constructor) -> Constructor:
        _ZOOS[zoo].add(name, ModelEntry(constructor, path))
        return constructor

    return enter


def get_model_entry(name: str, zoo: str) -> ModelEntry:
    """The entry `name` of a zoo ("cifar", "tiny_imagenet" or "imagenet").

    Plain tuples (constructor, checkpoint), as in the original's tables, are accepted as entries. A
    name with a slash is a network of another library, in every zoo.

    Raises:
        UserError: the zoo, library or model is unknown.
    """
    library, slash, _ = name.partition("/")
    if slash:
        return LIBRARIES[library](name)  # type: ignore[no-any-return]
    entry = _ZOOS[zoo][name]
    return entry if isinstance(entry, ModelEntry) else ModelEntry(*entry)


def zoo_names(zoo: str) -> list[str]:
    """Names of the networks of a zoo ("cifar", "tiny_imagenet" or "imagenet")."""
    return list(_ZOOS[zoo])


def library_names(library: str) -> list[str]:
    """Names "LIBRARY/NAME" of all networks of another library; some may be refused here."""
    names: list[str] = LIBRARIES[library].names()
    return names
