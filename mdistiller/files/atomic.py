"""Atomic writes: a file is written under a temporary name and then renamed."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path

from mdistiller.registry import UserError, first_line


def write_failure(path: Path, error: Exception) -> str:
    """The error text for a failed write; says whether the old file still exists."""
    reason = getattr(error, "strerror", None) or first_line(error)
    kept = "; the file that is there stays as it was" if path.exists() else ""
    return f"cannot write {path}: {reason}{kept}"


@contextlib.contextmanager
def replacing(path: Path, before: Callable[[Path], object] | None = None) -> Iterator[Path]:
    """Context with a temporary file that replaces `path` at its end, in one rename.

    On an exception it is removed, and `path` stays unchanged.

    Args:
        before: called with the written and flushed file, before the rename.
    """
    temporary = path.with_name(f".{path.stem}.tmp{path.suffix}")  # a stray one is reused
    try:
        yield temporary
        with temporary.open("r+b") as handle:
            os.fsync(handle.fileno())
        if before is not None:
            before(temporary)
        os.replace(temporary, path)
    except OSError as error:
        raise UserError(write_failure(path, error)) from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()
    _sync_folder(path.parent)


def write_cache(path: Path, text: str) -> None:
    """Write a file that can be computed again, in one rename, if possible: several processes may
    write the same one at once."""
    with contextlib.suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{path.name}.{os.getpid()}")
        temporary.write_text(text)
        temporary.replace(path)


def _sync_folder(folder: Path) -> None:
    """Flush a rename in `folder` to disk, where the system supports that."""
    with contextlib.suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
