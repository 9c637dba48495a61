"""Files of weights: written atomically; for reading see `mdistiller.weights`."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from mdistiller.models.normalize import input_norm
from mdistiller.registry import UserError
from mdistiller.weights import load_checkpoint, load_state, strip_prefix

__all__ = [
    "file_entries",
    "load_checkpoint",
    "load_state",
    "network_contents",
    "replacing",
    "save_checkpoint",
    "strip_prefix",
]


def network_contents(net: nn.Module) -> dict[str, Any]:
    """What a file of one network holds: weights, and `norm`, how its images are normalised.

    A network may have more to say, as a dict `file_entries` of plain values: of a classifier it has
    `data`, what the network was trained on, its classes by name.
    """
    return {"model": net.state_dict(), "norm": input_norm(net), **file_entries(net)}


def file_entries(net: nn.Module) -> dict[str, Any]:
    """What a network's file says beside weights."""
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
        raise UserError(_failure(Path(path), cause)) from error


def _failure(path: Path, error: Exception) -> str:
    reason = (
        getattr(error, "strerror", None) or (str(error) or type(error).__name__).splitlines()[0]
    )
    kept = "; the file that is there stays as it was" if path.exists() else ""
    return f"cannot write {path}: {reason}{kept}"


def _nothing(temporary: Path) -> None:
    """What most do between writing a file and moving it."""


@contextlib.contextmanager
def replacing(path: Path, before: Callable[[Path], None] = _nothing) -> Iterator[Path]:
    """A file to write in place of `path`, which it becomes at the end, in one move.

    If anything is raised in between it is removed, and `path` stays as it was.

    Args:
        before: called with the file that is written and durable, before it is moved.
    """
    temporary = path.with_name(
        f".{path.stem}.tmp{path.suffix}"
    )  # one process writes; a stray one is reused
    try:
        yield temporary
        with temporary.open("r+b") as handle:
            os.fsync(handle.fileno())
        before(temporary)
        os.replace(temporary, path)
    except OSError as error:
        raise UserError(_failure(path, error)) from error
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
