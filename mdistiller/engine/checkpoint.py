"""Checkpoints: written atomically; for reading see `mdistiller.weights`."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path
from typing import Any

import torch

from mdistiller.registry import UserError
from mdistiller.weights import load_checkpoint, load_state, strip_prefix

__all__ = ["load_checkpoint", "load_state", "save_checkpoint", "strip_prefix"]


def save_checkpoint(obj: Any, path: str | os.PathLike[str]) -> None:
    """Write `obj` so that `path` holds either the old or the whole new file, also after a crash."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.tmp")  # one process writes; a stray one is reused
    try:
        with temporary.open("wb") as handle:
            torch.save(obj, handle)
            handle.flush()
            os.fsync(handle.fileno())
        os.replace(temporary, path)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or error}") from error
    except RuntimeError as error:  # how torch's zip writer reports a full disk
        raise UserError(f"cannot write {path}: {str(error).splitlines()[0]}") from error
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
