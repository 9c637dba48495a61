"""Hashes of what a frozen teacher's outputs depend on: weights, images, views, numerics."""

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
from mdistiller.frozen_teacher.frozen import count_hooks, named_tensors
from mdistiller.models.normalize import input_norm, input_size

_BLOCK = 4096  # images hashed at a time
_SAMPLES = 256  # views that are made to see what the augmentation does


def digest(parts: Iterable[Tensor | str]) -> str:
    """The first 40 hex digits of the SHA-256 of texts and tensors (with dtype and shape)."""
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
    """Digest of a network's tensors by name, its input normalisation and its forward hooks."""
    named = (part for name, tensor in named_tensors(teacher) for part in (name, tensor))
    facts = f"{type(teacher).__qualname__} {input_norm(teacher)} {count_hooks(teacher)}"
    facts += f" {input_size(teacher)}" if input_size(teacher) else ""
    return digest([facts, *named])


def data_digest(loader: TrainLoader) -> str:
    """Digest of the bytes of all training images, in their order."""
    return digest(loader.dataset.images.split(_BLOCK))


def image_set_digest(images: Any) -> str:
    """Digest of a set of training images and their classes.

    For images in memory: the bytes. For files: names and sizes, since reading all takes as long as
    an epoch. For shards: names and counts. For files and shards also the decoding settings.
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
    """Digest of what view numbers mean: the pixels of some views as the teacher sees them."""
    augment = loader.augment
    parameters = augment.draw(loader.num_data, torch.Generator().manual_seed(0))
    index = torch.arange(min(loader.num_data, _SAMPLES))
    device = loader.dataset.targets.device
    images = loader.images(index.to(device), parameters.to(device))
    name = f"{type(augment).__module__}.{type(augment).__qualname__} {loader.num_views}"
    return digest([name, augment.views(parameters)[index], images])


def computation(distiller: Distiller, cfg: Any, device: torch.device) -> str:
    """Description of all that changes the teacher's outputs: device, dtype, folding, ..."""
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
