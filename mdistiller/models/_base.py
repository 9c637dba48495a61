"""The contract of all networks (StagedNet), and the tables that hold them (ModelEntry)."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple, TypeVar, cast

import torch.nn.functional as F
from torch import Tensor, nn

from mdistiller.models._neck import Neck, read_neck, with_inputs
from mdistiller.models._released import (
    TORCHVISION,
    Pretrained,
    place_of,
    pretrained_on,
    released_file,
    url_of,
)
from mdistiller.preprocessing import Preprocessing
from mdistiller.registry import Registry, UserError
from mdistiller.runtime import project_root
from mdistiller.weights import load_network, split_key

#: What a stage gives: its output, and that before its last ReLU (None where there is no ReLU).
Staged = tuple[Tensor, Tensor | None]


class UnsupportedError(UserError, NotImplementedError):
    """A network is asked for something that its architecture does not have."""


class StageInfo(NamedTuple):
    """One stage after the stem: the modules that are run in turn, and what comes out of them."""

    paths: tuple[str, ...]
    channels: int
    norm: str | None


class StagedNet(nn.Module):
    """A network that gives `(logits, features)`; its stages are declared where they are built.

    `features` holds
        feats: list of the stem's and every stage's output;
        preact_feats: the same before each stage's last ReLU; the stem's entry is its output once
            more. Left out where stages have no such ReLU (MobileNetV2's linear bottlenecks);
        final_map: the map that becomes `pooled_feat`;
        pooled_feat: the classifier's input.

    A family registers its layers under the names of the released checkpoints, in their order, and
    calls :meth:`declare_stage` for each stage. It defines :meth:`stem`, and overrides
    :meth:`last_map` or :meth:`embed` where its head is more than pooling.

    :meth:`add_neck` gives a network another head; `final_map` is then what the neck returns.

    No ReLU or sum here works in place: a tensor in `features` stays what it was.
    """

    #: Name of the child that makes the logits.
    head = "fc"
    #: Whether pooled_feat is the average of final_map over positions.
    globally_pooled = True
    #: Whether stages are made of tokens (transformers, mixers) rather than of channels.
    tokens = False
    #: Whether the classifier has initial weights beside trained ones of the rest (`load_network`).
    untrained_head = False
    #: Names of modules in other libraries' files, and the names here, for reading their weights.
    key_aliases: Mapping[str, str] = MappingProxyType({})

    def __init__(self, stem_channels: int):
        super().__init__()
        self.stem_channels = stem_channels
        self.stages: list[StageInfo] = []
        self.neck: Neck | None = None

    def declare_stage(self, *paths: str, channels: int, norm: str | None = None) -> None:
        """Declare the next stage.

        Args:
            paths: submodules that are run in turn; each maps a tensor to a :data:`Staged` pair.
            channels: width of the stage's output.
            norm: the batch norm right before the stage's last ReLU, if there is one.
        """
        self.stages.append(StageInfo(paths, channels, norm))

    def stem(self, x: Tensor) -> Tensor:
        """The layers before the first stage."""
        raise NotImplementedError

    def run_stages(self, x: Tensor) -> list[Staged]:
        """Output and pre-activation of the stem and of every stage."""
        out = self.stem(x)
        preact: Tensor | None = out
        outputs: list[Staged] = [(out, preact)]
        for stage in self.stages:
            for path in stage.paths:
                out, preact = self.get_submodule(path)(out)
            outputs.append((out, preact))
        return outputs

    def last_map(self, out: Tensor, preact: Tensor | None) -> Tensor:
        """What is pooled, from the last stage's pair."""
        return out

    def embed(self, final_map: Tensor) -> Tensor:
        """The classifier's input, from the last map."""
        return F.adaptive_avg_pool2d(final_map, 1).flatten(1)

    def forward(self, x: Tensor) -> tuple[Tensor, dict[str, Any]]:
        """Logits [N, classes] and the features described above."""
        outputs = self.run_stages(x)
        final_map = self.last_map(*outputs[-1])
        if self.neck is not None:
            final_map = self.neck(final_map)
        pooled = self.embed(final_map)
        logits = self.classifier()(pooled).flatten(1)
        features: dict[str, Any] = {"feats": [out for out, _ in outputs]}
        if all(preact is not None for _, preact in outputs):
            features["preact_feats"] = [preact for _, preact in outputs]
        return logits, features | {"pooled_feat": pooled, "final_map": final_map}

    def classifier(self) -> nn.Linear | nn.Conv2d:
        """The layer that makes the logits.

        Checkpoints of two families (vgg, CIFAR MobileNetV2) call that child `classifier` as well.
        This method hides it from reading by attribute (`get_submodule`, `functional_call`);
        assignment, state dicts and `named_modules` see it as ever.
        """
        layer = self._modules[self.head]
        return cast(
            "nn.Linear | nn.Conv2d", layer[-1] if isinstance(layer, nn.Sequential) else layer
        )

    def add_neck(self, hidden: int, outputs: int, size: tuple[int, int]) -> None:
        """Put a :class:`Neck` behind the last map, and a new classifier of its width after it.

        Files of such a network load into a plain one of its kind by :func:`load_network`.

        Raises:
            UnsupportedError: the head is more than a linear layer on an average, or has a neck.
        """
        if not self.globally_pooled or self.neck is not None:
            raise UnsupportedError(
                f"{type(self).__name__} takes no neck: its head has to be one linear layer on the "
                "average of its last map; choose another network"
            )
        self._insert_neck(Neck(self.classifier().weight.shape[1], hidden, outputs, size))

    def accept_neck(self, state: Mapping[str, Tensor]) -> None:
        """Take on the neck that a state dict brings, if the whole of it then fits."""
        neck = read_neck(state)
        if neck is not None and self._fits_with_neck(neck, state):
            self._insert_neck(neck)

    def _fits_with_neck(self, neck: Neck, state: Mapping[str, Tensor]) -> bool:
        """Whether a state dict is that of this network with `neck`, for the same classes."""
        if not self.globally_pooled or neck.inputs != self.classifier().weight.shape[1]:
            return False
        expected = self.state_dict()

        def fits(key: str) -> bool:
            axes = 1 if key.startswith(f"{self.head}.") else None  # the classifier's inputs differ
            return key in state and state[key].shape[:axes] == expected[key].shape[:axes]

        return self.neck is None and all(map(fits, expected))

    def _insert_neck(self, neck: Neck) -> None:
        """Register `neck`, and behind it a fresh classifier of its width in place of the old."""
        head = self._modules.pop(self.head)
        self.neck = neck.to(next(self.parameters()))
        if isinstance(head, nn.Sequential):
            head[-1] = with_inputs(head[-1], neck.outputs)
        else:
            head = with_inputs(head, neck.outputs)
        self._modules[self.head] = head

    def adapt_state(self, state: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """`state`, which does not fit as it is, made to: position embeddings resampled, say."""
        return state

    def get_stage_channels(self) -> list[int]:
        """Width of every entry of `feats`, the stem's first."""
        return [self.stem_channels, *(stage.channels for stage in self.stages)]

    def get_bn_before_relu(self) -> list[nn.Module]:
        """The batch norms right before the stages' last ReLUs, stem excluded.

        Raises:
            UnsupportedError: no stage of this network ends so.
        """
        norms = [stage.norm for stage in self.stages if stage.norm is not None]
        if not norms:
            raise UnsupportedError(
                f"{type(self).__name__} has no batch norm over all channels before the last ReLU "
                "of its stages; methods that read one (OFD) need another teacher"
            )
        return [self.get_submodule(norm) for norm in norms]


class ModelEntry(NamedTuple):
    """A zoo's entry. Unpacks as `(constructor, checkpoint)`; calling it builds the network.

    `checkpoint` is a file of released weights, or `torchvision:` and torchvision's name of them. A
    constructor with an argument `pretrained` loads released weights itself; its attribute
    `pretrained_on`, if it has one, says of given settings what :meth:`pretrained_on` returns.
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

        A text instead of True chooses among several releases, where the constructor knows some.
        With `new_head`, weights for another number of classes get a new classifier instead of being
        refused; a constructor that loads released weights itself never refuses them.

        Raises:
            UserError: there are no released weights, or they cannot be had or do not fit.
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
        """What the released weights for keyword arguments `settings` were trained on, if known."""
        if self.checkpoint is not None:
            return pretrained_on(self.checkpoint)
        known = getattr(self.constructor, "pretrained_on", None)
        return known(settings) if known else None

    def preprocessing(self, settings: Mapping[str, Any], weights: Any = "") -> Preprocessing | None:
        """How the images of weights of this architecture's own library are prepared, if known.

        Args:
            weights: a file, whose name may be that of one of several releases.
        """
        known = getattr(self.constructor, "preprocessing", None)
        if known:
            return known(settings, split_key(weights)[0].name)  # type: ignore[no-any-return]
        found = self.pretrained_on(settings)
        return found.preprocessing if found else None

    @property
    def of_library(self) -> bool:
        """Whether the network is of another library, which states how its images are prepared."""
        return hasattr(self.constructor, "preprocessing")

    def is_release(self, path: str | Path) -> bool:
        """Whether a file is that of the released weights, wherever it lies: it has their name."""
        return (
            self.checkpoint is not None
            and split_key(path)[0].name == place_of(self.checkpoint).name
        )

    def default_classes(self) -> int:
        """The number of classes that the constructor takes if it is told none."""
        known = inspect.signature(self.constructor).parameters.get("num_classes")
        if known is None or known.default is known.empty:
            name = getattr(self.constructor, "__name__", type(self.constructor).__name__)
            raise UserError(
                f"the checkpoint of {name} is for a number of classes that its constructor does "
                "not state: give it num_classes=..., with a default (docs/own_backbone.md)"
            )
        return int(known.default)

    def released(self, num_classes: int | None = None, fetch: bool = True) -> Path | None:
        """The file of the released weights; None if it is not there.

        Args:
            num_classes: classes of the data, if known.
            fetch: download the file if it is not there and torchvision publishes it.

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

#: Makers of entries by the part of a name before its slash: "LIBRARY/NAME".
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

    A plain tuple (constructor, checkpoint), as the original's tables hold, is an entry as well. A
    name with a slash is that of another library's network, whatever the zoo.

    Raises:
        UserError: there is no such zoo, library or model.
    """
    library, slash, _ = name.partition("/")
    if slash:
        found: ModelEntry = LIBRARIES[library](name)
        return found
    entry = _ZOOS[zoo][name]
    return entry if isinstance(entry, ModelEntry) else ModelEntry(*entry)


def zoo_names(zoo: str) -> list[str]:
    """Names of the networks of a zoo ("cifar", "tiny_imagenet" or "imagenet")."""
    return list(_ZOOS[zoo])


def library_names(library: str) -> list[str]:
    """Names "LIBRARY/NAME" of all networks of another library; not all fit here."""
    names: list[str] = LIBRARIES[library].names()
    return names
