"""Files of weights: written atomically; for reading see `mdistiller.weights`."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from torch import nn

from mdistiller.files.atomic import replacing, write_failure
from mdistiller.models.normalize import input_norm
from mdistiller.registry import UserError
from mdistiller.weights import load_checkpoint, load_state, strip_prefix

__all__ = [
    "file_entries",
    "load_checkpoint",
    "load_state",
    "network_contents",
    "save_checkpoint",
    "strip_prefix",
]


def network_contents(net: nn.Module) -> dict[str, Any]:
    """What a file of one network holds: weights, and `norm`, how its images are normalised.

    A network may add entries of plain values by a dict `file_entries`: a classifier's has `data`,
    which describes its training data and names the classes.
    """
    return {"model": net.state_dict(), "norm": input_norm(net), **file_entries(net)}


def file_entries(net: nn.Module) -> dict[str, Any]:
    """The metadata in a network's file, without its weights."""
    own: dict[str, Any] = getattr(net, "file_entries", {})
    return own


def save_checkpoint(obj: Any, path: str | os.PathLike[str]) -> None:
    """Write `obj` so that `path` holds either the old or the whole new file, also after a crash."""
    with replacing(Path(path)) as temporary, temporary.open("wb") as handle:
        write_checkpoint(obj, handle, path)


def write_checkpoint(obj: Any, handle: Any, path: str | os.PathLike[str]) -> None:
    """Write `obj` to an open file, which is to become `path`."""
    try:
        torch.save(obj, handle)
    except RuntimeError as error:  # how torch's zip writer reports a full disk
        cause = error.__context__ if isinstance(error.__context__, OSError) else error
        raise UserError(write_failure(Path(path), cause)) from error
