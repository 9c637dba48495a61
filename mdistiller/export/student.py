"""The student to export: its network, the preprocessing of its images, and how it was trained."""

from __future__ import annotations

import copy
import functools
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from mdistiller.engine.cfg import Config
from mdistiller.models import StagedNet, get_model_entry
from mdistiller.networks.make import make_network
from mdistiller.preprocessing import Preprocessing, Statistics, input_channels

_TRACED_BATCH = 2  # torch.export takes 1 for a constant
_LARGEST_BATCH = 2**20  # torch 2.6 refuses transformers without a bound


@dataclass
class Student:
    """A trained network in eval mode, on the CPU, and the facts that go out with it.

    Attributes:
        name, zoo, settings: which entry of the model zoo it is, and arguments of its constructor.
        num_classes, classes: of its data; the names are empty if unknown.
        image_size: (height, width) in pixels.
        mean, std: what images in [0, 1] are normalised with, per channel; empty if unknown.
        dataset: name of the data, empty if unknown.
        checkpoint: the file its weights are from.
        cfg: the config of the run it is from, or that it was exported with.
        run: of a run folder: its `record`; else None.
        preprocessing: how images are brought to their size, if that is known.
        evaluated: of a run folder: the network as `eval` builds it, which normalises images anew if
            it wants to, and what the loader's are normalised with; else None.
    """

    net: nn.Module
    name: str
    zoo: str
    settings: dict[str, Any]
    num_classes: int
    classes: list[str]
    image_size: tuple[int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    dataset: str
    checkpoint: str
    cfg: Config
    run: RunFacts | None = None
    preprocessing: Preprocessing | None = None
    evaluated: tuple[nn.Module, Statistics] | None = None

    def build(self, **settings: Any) -> nn.Module:
        """A fresh network of the same kind; random weights, but for `pretrained`."""
        return make_network(
            get_model_entry(self.name, self.zoo),
            self.num_classes,
            self.image_size,
            {**self.settings, **settings},
            "DISTILLER.STUDENT_ARGS",
            self.channels,
        )

    @property
    def channels(self) -> int:
        """Of the images."""
        return len(self.mean) or 3

    def metadata(self, normalizes: bool = False) -> dict[str, str]:
        """What a file can say about itself: texts, of all but names in JSON.

        Args:
            normalizes: whether the file holds the normalisation, and takes images in [0, 1].
        """
        facts = {
            "normalizes": normalizes,
            "num_classes": self.num_classes,
            "image_size": self.image_size,
            "mean": self.mean,
            "std": self.std,
            "classes": self.classes,
            "arguments": self.settings,
        }
        if self.preprocessing is not None:
            facts["preprocessing"] = asdict(self.preprocessing)
        texts = {key: json.dumps(value) for key, value in facts.items() if value not in ([], ())}
        return {"model": self.name, "zoo": self.zoo, "dataset": self.dataset, **texts}


@dataclass
class RunFacts:
    """What a run folder tells beside weights.

    Attributes:
        choice: the checkpoint that was asked for: best, latest, epoch_N, ema_best or ema_latest.
        summary: of `summary.json`; empty while the run is not finished.
        epochs: the lines of `metrics.jsonl`, without those of a stage before the main one.
        start: the last entry of `run.json`.
    """

    choice: str
    summary: dict[str, Any] = field(default_factory=dict)
    epochs: list[dict[str, Any]] = field(default_factory=list)
    start: dict[str, Any] = field(default_factory=dict)


class Deployed(nn.Module):
    """Images [N, 3, H, W] to logits [N, classes], and nothing else.

    Args:
        net: is copied.
        image_size: (height, width).
        mean, std: normalise images in [0, 1] first; empty: they come normalised.
        opset: of ONNX; None: the exporter's usual one.
        dynamic_batch: make ONNX for any batch size; else for one image.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        net: nn.Module,
        image_size: tuple[int, int],
        mean: Sequence[float] = (),
        std: Sequence[float] = (),
        opset: int | None = None,
        dynamic_batch: bool = True,
    ):
        super().__init__()
        self.opset, self.dynamic_batch = opset, dynamic_batch
        self.example = (torch.zeros(_TRACED_BATCH, input_channels(net), *image_size),)
        self.net = _traceable(net)
        self.normalizes = bool(mean)
        if mean:
            self.register_buffer("mean", torch.tensor(mean).view(-1, 1, 1))
            self.register_buffer("std", torch.tensor(std).view(-1, 1, 1))
        self.eval()  # all of it: the tracing exporter restores the mode of the outermost module

    def forward(self, image: Tensor) -> Tensor:
        if self.normalizes:
            image = (image - self.mean) / self.std
        logits: Tensor = self.net(image)[0]
        return logits

    @functools.cached_property
    def program(self) -> torch.export.ExportedProgram:
        """What torch.export makes of it, for any batch size."""
        shapes = ({0: torch.export.Dim("batch", min=1, max=_LARGEST_BATCH)},)
        return torch.export.export(self, self.example, dynamic_shapes=shapes, strict=False)


def _traceable(net: nn.Module) -> nn.Module:
    """A copy for torch.export, which reads children by attribute.

    A child named "classifier" is hidden by the method of that name: here it has another.
    """
    net = copy.deepcopy(net).eval().requires_grad_(False)
    if isinstance(net, StagedNet) and hasattr(type(net), net.head):
        net._modules["classifier_"] = net._modules.pop(net.head)
        net.head = "classifier_"
    return net
