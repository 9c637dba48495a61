"""An ONNX file or a program of torch.export as a network to evaluate: logits without features."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from mdistiller.dataset import TestData
from mdistiller.evaluation.load import load_predictor
from mdistiller.evaluation.predict import Predictor
from mdistiller.models.normalize import renormalize_input
from mdistiller.preprocessing import Preprocessing
from mdistiller.registry import UserError

SUFFIXES = (".onnx", ".pt2")


class ExportedNetwork(nn.Module):
    """Images normalised for the data to logits, on the CPU.

    Args:
        path: the file.
        data: the images; their size and classes must be those of the file.

    Raises:
        UserError: they are not, or the file cannot be read.
    """

    def __init__(self, path: Path, data: TestData):
        super().__init__()
        self.predictor = load_predictor(path, device="cpu")
        _check(self.predictor, path, data)
        raw = ((0.0,) * len(data.mean), (1.0,) * len(data.mean))  # of images in [0, 1]
        wanted: Any = self.predictor.normalization or raw
        renormalize_input(self, (data.mean, data.std), wanted)

    def forward(self, images: Tensor) -> tuple[Tensor, dict[str, Any]]:
        inputs = images.cpu()
        if self.predictor.normalization is None:
            inputs = (inputs * 255).round() / 255  # free of rounding, as from bytes
        return self.predictor.logits(inputs).to(images.device), _NoFeatures(self.predictor.name)


class _NoFeatures(dict[str, Any]):
    """The features of a file: reading one is an error."""

    def __init__(self, path: str):
        super().__init__()
        self.path = path

    def __contains__(self, name: object) -> bool:
        raise UserError(
            f"{self.path} gives logits without features; name the run folder or the .safetensors "
            "file instead"
        )


def stated_preprocessing(path: Path) -> tuple[str, Preprocessing]:
    """The network's name in its zoo, and how the file says that its images are prepared."""
    stated = load_predictor(path, device="cpu")
    mean, std = (tuple(part) for part in stated.normalization or ((), ()))
    side = stated.image_size[0]
    return stated.model, replace(stated.preprocessing, mean=mean, std=std, image_size=side)


def _check(predictor: Predictor, path: Path, data: TestData) -> None:
    ours, theirs = list(predictor.classes), list(data.classes)
    numbers = ours == [str(k) for k in range(len(ours))]  # a file may not state names
    other = ours != theirs and (not numbers or set(ours) == set(theirs))
    if other or len(ours) != data.num_classes:
        raise UserError(
            f"{path} is for {len(ours)} classes ({', '.join(ours[:3])}, "
            f"...); the data have {data.num_classes} ({', '.join(theirs[:3])}, ...), which "
            "must be the same in the same order"
        )
    if predictor.image_size != tuple(data.image_size):
        height, width = predictor.image_size
        raise UserError(
            f"{path} takes images of {width}x{height} pixels, and the data have "
            f"{data.image_size[1]}x{data.image_size[0]}; set DATASET.IMAGE_SIZE {height}"
        )
