"""What a frozen teacher's logits depend on: its weights, the images, their views, how it is run."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from mdistiller import __version__
from mdistiller.dataset.memory.loader import TrainLoader
from mdistiller.distillers import Distiller
from mdistiller.engine.frozen_teacher.frozen import count_hooks, named_tensors
from mdistiller.models.normalize import input_norm

_BLOCK = 4096  # images hashed at a time
_SAMPLES = 256  # views that are made to see what the augmentation does


def digest(parts: Iterable[Tensor | str]) -> str:
    """SHA-256 of texts, and of tensors with their types and shapes; 40 hex digits of it."""
    total = hashlib.sha256()
    for part in parts:
        if isinstance(part, Tensor):
            raw = part.detach().contiguous().cpu().reshape(-1).view(torch.uint8)
            total.update(f"{part.dtype} {tuple(part.shape)} ".encode())
            total.update(raw.numpy().data)
        else:
            total.update(f"{len(part)} {part} ".encode())
    return total.hexdigest()[:40]


def teacher_digest(teacher: nn.Module) -> str:
    """Of a network's tensors by name, of how its input is normalised, and of hooks on it."""
    named = (part for name, tensor in named_tensors(teacher) for part in (name, tensor))
    facts = f"{type(teacher).__qualname__} {input_norm(teacher)} {count_hooks(teacher)}"
    return digest([facts, *named])


def data_digest(loader: TrainLoader) -> str:
    """Of the bytes of all training images, in their order."""
    return digest(loader.dataset.images.split(_BLOCK))


def image_set_digest(images: Any) -> str:
    """Of a set of training images and their classes.

    Of a set in memory: the bytes. Of files: names and sizes, since reading all takes as long as an
    epoch; of shards their names and counts; of both, how files are decoded.
    """
    decoding = [str(getattr(images, name, "")) for name in ("upright", "scale_16_bit")]
    if getattr(images, "jpeg_scaling", "none") == "all":  # "train" scales random crops only
        decoding.append("all")
    parts: list[Tensor | str] = [type(images).__qualname__, images.targets.cpu(), *decoding]
    if hasattr(images, "images"):
        parts += images.images.split(_BLOCK)
    elif hasattr(images, "names"):
        parts.append(torch.tensor([os.stat(images.path(i)).st_size for i in range(len(images))]))
        parts += [os.fsdecode(name) for name in images.names]
    else:
        parts += [str(getattr(images, name, "")) for name in ("urls", "counts", "skipped")]
    return digest(parts)


def view_digest(loader: TrainLoader) -> str:
    """Of what the numbers of the views mean: some of them as the teacher sees them, to the bit."""
    augment = loader.augment
    parameters = augment.draw(loader.num_data, torch.Generator().manual_seed(0))
    index = torch.arange(min(loader.num_data, _SAMPLES))
    device = loader.dataset.targets.device
    images = loader.images(index.to(device), parameters.to(device))
    name = f"{type(augment).__module__}.{type(augment).__qualname__} {loader.num_views}"
    return digest([name, augment.views(parameters)[index], images])


def computation(distiller: Distiller, cfg: Any, device: torch.device) -> str:
    """How the teacher is computed, in words: all that moves its logits by rounding or more."""
    frozen = distiller.frozen
    if frozen is None or getattr(frozen, "plain", False):
        form, dtype = "plain", cfg.SOLVER.AMP
    else:
        form = f"folded {frozen.folded}, channels_last {frozen.channels_last}, fuses {frozen.fuses}"
        dtype = str(frozen.dtype)
    place = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    solver = cfg.SOLVER
    return (
        f"{form}, {dtype}, {place}, AMP {solver.AMP}, COMPILE {solver.COMPILE}, "
        f"CHANNELS_LAST {solver.CHANNELS_LAST}, products {torch.get_float32_matmul_precision()}, "
        f"TF32 {torch.backends.cudnn.allow_tf32}, torch {torch.__version__}, "
        f"mdistiller {__version__}"
    )
