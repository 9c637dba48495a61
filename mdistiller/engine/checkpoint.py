"""Checkpoints: written atomically; for reading see `mdistiller.weights`."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from mdistiller.models._input import input_norm
from mdistiller.registry import UserError
from mdistiller.weights import load_checkpoint, load_state, strip_prefix

__all__ = [
    "load_checkpoint",
    "load_state",
    "network_contents",
    "replacing",
    "save_checkpoint",
    "strip_prefix",
]


def network_contents(net: nn.Module) -> dict[str, Any]:
    """What a file of one network holds: weights, and `norm`, how its images are normalised."""
    return {"model": net.state_dict(), "norm": input_norm(net)}


def save_checkpoint(obj: Any, path: str | os.PathLike[str]) -> None:
    """Write `obj` so that `path` holds either the old or the whole new file, also after a crash."""
    with replacing(Path(path)) as temporary, temporary.open("wb") as handle:
        try:
            torch.save(obj, handle)
        except RuntimeError as error:  # how torch's zip writer reports a full disk
            raise UserError(f"cannot write {path}: {str(error).splitlines()[0]}") from error


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A file to write in place of `path`, which it becomes at the end, in one move.

    If anything is raised in between it is removed, and `path` stays as it was.
    """
    temporary = path.with_name(
        f".{path.stem}.tmp{path.suffix}"
    )  # one process writes; a stray one is reused
    try:
        yield temporary
        with temporary.open("r+b") as handle:
            os.fsync(handle.fileno())
        os.replace(temporary, path)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or error}") from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()
    _sync_folder(path.parent)


def _sync_folder(folder: Path) -> None:
    """Make a rename in `folder` durable, where the system offers it."""
    with contextlib.suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
