"""One run in a folder at a time.

A file in the folder is locked by the system, which frees it when its holder dies. A second one says
who that is. Its holder touches it every few seconds: so the lock also keeps off another
machine, where a shared file system does not pass the system's lock on.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path

from filelock import FileLock, Timeout

from mdistiller.engine.utils import log_msg
from mdistiller.registry import UserError

BEAT = 10.0
"""Seconds between two signs of life."""
STALE = 45.0
"""Seconds to wait for one from a holder on another machine; else it counts as dead."""

_held: dict[Path, int] = {}  # of this process; a teacher's run is locked by who needs it and by it


@contextlib.contextmanager
def locked(folder: Path, wait: str = "") -> Iterator[None]:
    """Keep other runs off a folder.

    Args:
        wait: what to say while another one is in it; empty: do not wait for it.

    Raises:
        UserError: another one is in it.
    """
    folder = folder.absolute()
    if folder in _held:
        yield
        return
    folder.mkdir(parents=True, exist_ok=True)
    lock = _lock(folder)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        if not wait:
            raise UserError(_occupied(folder)) from None
        print(log_msg(f"{wait} ({_occupied(folder)})"), flush=True)
        lock.acquire()
    try:
        _wait_for_other_machine(folder)
        with _signs_of_life(folder):
            _held[folder] = 1
            try:
                yield
            finally:
                del _held[folder]
    finally:
        lock.release()


def is_locked(folder: Path) -> bool:
    """Whether another process of this machine, or of one that shares its locks, is in a folder."""
    lock = _lock(folder)
    if not Path(lock.lock_file).is_file():
        return False
    try:
        with lock.acquire(timeout=0):
            return False
    except Timeout:
        return True


def _lock(folder: Path) -> FileLock:
    return FileLock(folder / ".lock")


def _holder(folder: Path) -> Path:
    return folder / ".holder"


def _read(folder: Path) -> tuple[str, int]:
    """Host and process of who is in a folder, or was."""
    try:
        facts = json.loads(_holder(folder).read_text())
        return str(facts["host"]), int(facts["process"])
    except (OSError, ValueError, KeyError, TypeError):
        return "", 0


def _occupied(folder: Path) -> str:
    host, process = _read(folder)
    who = f"process {process} on {host}" if host else "another process"
    return f"{folder} is being written by {who}: wait for it, or choose another EXPERIMENT.NAME"


def _wait_for_other_machine(folder: Path) -> None:
    """Give a holder on another machine the time to show that it lives.

    Its clock may be another, and so may the disk's: only whether the file's time moves counts.

    Raises:
        UserError: it does.
    """
    host, process = _read(folder)
    if not host or host == socket.gethostname():
        return
    print(log_msg(f"waiting {STALE:.0f} s to see whether process {process} on {host} lives"))
    last = _holder(folder).stat().st_mtime
    until = time.monotonic() + STALE
    while time.monotonic() < until:
        time.sleep(0.5)
        if not _holder(folder).is_file():
            return
        if _holder(folder).stat().st_mtime != last:
            raise UserError(_occupied(folder))


@contextlib.contextmanager
def _signs_of_life(folder: Path) -> Iterator[None]:
    """Say who is in a folder, again and again."""
    path = _holder(folder)
    path.write_text(json.dumps({"host": socket.gethostname(), "process": os.getpid()}))
    stop = threading.Event()

    def beat() -> None:
        while not stop.wait(BEAT):
            with contextlib.suppress(OSError):
                os.utime(path)

    thread = threading.Thread(target=beat, daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()
        path.unlink(missing_ok=True)
