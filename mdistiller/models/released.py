"""Released weights: location of their file, and download of those published by torchvision."""

from __future__ import annotations

import re
from pathlib import Path, PurePosixPath
from typing import NamedTuple
from urllib.parse import urlsplit

import torch

from mdistiller.files import fetch
from mdistiller.preprocessing import Preprocessing

TORCHVISION = "torchvision:"


class Pretrained(NamedTuple):
    """Number of classes and preprocessing of released weights."""

    classes: int
    preprocessing: Preprocessing


def url_of(checkpoint: str) -> str | None:
    """The address of `torchvision:ResNet18_Weights.IMAGENET1K_V1` and the like; None for a file."""
    if not checkpoint.startswith(TORCHVISION):
        return None
    from torchvision.models import get_weight  # a slow import that most runs do not need

    return str(get_weight(checkpoint.removeprefix(TORCHVISION)).url)


def pretrained_on(checkpoint: str) -> Pretrained | None:
    """Classes and preprocessing of `torchvision:...` weights; None for a file."""
    if not checkpoint.startswith(TORCHVISION):
        return None
    from torchvision.models import get_weight

    weights = get_weight(checkpoint.removeprefix(TORCHVISION))
    view = weights.transforms()
    (side,), (resized,) = view.crop_size, view.resize_size
    return Pretrained(
        len(weights.meta["categories"]),
        Preprocessing(
            *(tuple(view.mean), tuple(view.std)),
            *(side, "crop", side / resized, view.interpolation.value),
        ),
    )


def torchvision_accuracy(checkpoint: str) -> float:
    """Top-1 in % on ImageNet's validation images that torchvision reports for its weights."""
    from torchvision.models import get_weight

    metrics = get_weight(checkpoint.removeprefix(TORCHVISION)).meta["_metrics"]
    return float(metrics["ImageNet-1K"]["acc@1"])


def place_of(checkpoint: str) -> Path:
    """Path of released weights, which may not exist yet; downloads go to torch.hub's folder."""
    url = url_of(checkpoint)
    if url is None:
        return Path(checkpoint)
    return Path(torch.hub.get_dir(), "checkpoints", PurePosixPath(urlsplit(url).path).name)


def released_file(checkpoint: str, name: str) -> Path:
    """The file of `torchvision:...` weights, downloaded if it is missing."""
    path, url = place_of(checkpoint), url_of(checkpoint)
    if not path.is_file() and url is not None:
        digest = re.search(r"-([0-9a-f]{8,})\.", path.name)
        fetch(
            url,
            path,
            f"the released weights of {name}",
            sha256=digest[1] if digest else "",
            advice=f"get {url} and put it at {path}, or name a checkpoint of your own",
        )
    return path
