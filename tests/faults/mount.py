"""A small disk in memory, as the only one that a process sees at a place (Linux, where allowed)."""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

_NEW_USER, _NEW_MOUNTS = 0x10000000, 0x00020000
_PRIVATE = 0x40000 | 0x4000  # MS_PRIVATE, and all below


def small_disk(folder: Path, size: int) -> Callable[[], Callable[[], object]]:
    """For a process that begins: mount a file system of a given size at `folder`.

    What that returns copies the disk's files to where :func:`take_out` finds them: nobody else sees
    the disk, and it goes with the process.
    """

    def before() -> Callable[[], object]:
        _own_mounts()
        folder.mkdir(parents=True, exist_ok=True)
        options = f"size={size}".encode()
        _succeed(_libc().mount(b"tmpfs", str(folder).encode(), b"tmpfs", 0, options))
        return lambda: shutil.copytree(folder, _copy(folder))

    return before


def take_out(folder: Path) -> None:
    """Put the files of a small disk that was mounted here into the folder itself."""
    if _copy(folder).is_dir():
        shutil.rmtree(folder)
        _copy(folder).rename(folder)


def can_mount() -> bool:
    """Whether the system lets a process of this user mount a disk of its own."""
    with tempfile.TemporaryDirectory() as place:
        process = multiprocessing.get_context("fork").Process(target=_try, args=(Path(place),))
        process.start()
        process.join()
        return process.exitcode == 0


def _try(place: Path) -> None:
    try:
        small_disk(place, 1 << 20)()
    except (OSError, AttributeError):  # refused, or no Linux
        os._exit(1)


def _copy(folder: Path) -> Path:
    return folder.with_name(f"{folder.name}.disk")


def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None, use_errno=True)


def _succeed(code: int) -> None:
    if code:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))


def _own_mounts() -> None:
    """Give this process mounts of its own, and the right to make some."""
    user, group = os.getuid(), os.getgid()
    _succeed(_libc().unshare(_NEW_USER | _NEW_MOUNTS))
    for file, text in (
        ("setgroups", "deny"),
        ("uid_map", f"0 {user} 1"),
        ("gid_map", f"0 {group} 1"),
    ):
        Path("/proc/self", file).write_text(text)
    _succeed(_libc().mount(b"none", b"/", None, _PRIVATE, None))
