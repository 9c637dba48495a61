"""Lock a run folder against other processes; the system frees the lock when its holder dies."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

from filelock import FileLock, Timeout

from mdistiller.console import log_msg
from mdistiller.registry import UserError


@contextlib.contextmanager
def locked(folder: Path, wait: str = "") -> Iterator[None]:
    """Lock a folder against other processes; within this process it may be entered several times.

    Args:
        wait: what to print while another process holds the lock; empty: do not wait for it.

    Raises:
        UserError: another process holds the lock.
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
    """Whether another process holds a folder's lock, on this machine or on one that shares its
    locks."""
    lock = _lock(folder)
    if not Path(lock.lock_file).is_file():
        return False
    try:
        with lock.acquire(timeout=0):
            return False
    except Timeout:
        return True


def _lock(folder: Path) -> FileLock:
    """One lock per folder for all threads: a teacher's folder is locked by the student's run and
    again by the teacher's own, and runs in lock-step, each in a thread, may share one."""
    return FileLock(folder.absolute() / ".lock", is_singleton=True, thread_local=False)
