"""Files that are written beside their place and then moved there, so that none is ever half."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path

from mdistiller.registry import UserError, first_line


def write_failure(path: Path, error: Exception) -> str:
    """Why a file could not be written, and that the old one is still there if so."""
    reason = getattr(error, "strerror", None) or first_line(error)
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
        raise UserError(write_failure(path, error)) from error
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
