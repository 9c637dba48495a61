"""One run in a folder at a time: a file that the system locks, and frees when its holder dies."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

from filelock import FileLock, Timeout

from mdistiller.engine.utils import log_msg
from mdistiller.registry import UserError


@contextlib.contextmanager
def locked(folder: Path, wait: str = "") -> Iterator[None]:
    """Keep other processes off a folder; within this one it may be entered several times.

    Args:
        wait: what to print while another process is in it; empty: do not wait for it.

    Raises:
        UserError: another process is in it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    lock = _lock(folder)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        occupied = f"{folder} is being written by another process"
        if not wait:
            raise UserError(f"{occupied}: wait for it, or choose another EXPERIMENT.NAME") from None
        print(log_msg(f"{wait} ({occupied})"), flush=True)
        lock.acquire()
    try:
        yield
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
    """The same object for a folder in all threads: a teacher's is locked by who needs it and by its
    run, and runs in lock-step, each in a thread, may share one."""
    return FileLock(folder.absolute() / ".lock", is_singleton=True, thread_local=False)
