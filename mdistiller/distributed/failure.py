"""When one process of several fails: end all of them and print the cause once.

The processes share a counter of failures in the TCPStore at MASTER_ADDR:MASTER_PORT, which torchrun
or rank 0 runs. The process that raises it to 1 prints the cause. The others either fail in turn,
because a connection closed, and print nothing; or wait for the failed one, until a thread that
watches the counter ends them. So any process may be the one that a launcher notices first.
"""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections.abc import Iterator
from datetime import timedelta
from functools import lru_cache

from torch.distributed import TCPStore

from mdistiller.runtime import world_size

POLL = 1.0
"""Seconds between two looks at the counter."""
LINGER = 1.5
"""Seconds that the process which tells stays, so that all see the counter: the store may go."""
ANSWER = 10.0
"""Seconds that the store has to answer."""
SAME_FAILURE = 60.0
"""Seconds in which a failure of one process counts as that of all."""
PATIENCE = 3.0
"""Seconds that the others wait to be ended by a launcher, which then names the right process."""


def alone() -> bool:
    """Whether this is the only process of its run."""
    return int(os.environ.get("WORLD_SIZE", 1)) == 1


def first_to_fail() -> bool:
    """Whether this process, which has failed, should print why; repeated calls agree.

    If all fail by the same cause, rank 0 prints it: the others wait a moment first.
    """
    return alone() or _claim()


def leave(told: bool) -> None:
    """Wait before the exit of a failed process."""
    if not alone():
        time.sleep(LINGER if told else PATIENCE)


@lru_cache(maxsize=1)
def _claim() -> bool:
    """Claim the report, with a time limit: the process that runs the store may be the one that
    hangs."""
    answers: list[bool] = []
    thread = threading.Thread(target=lambda: answers.append(_ask()), daemon=True)
    thread.start()
    thread.join(ANSWER)
    return not answers or answers[0]


def _ask() -> bool:
    try:
        store = _connect(seconds=5)
        latest = time.monotonic() + (os.environ.get("RANK", "0") != "0") * POLL
        while time.monotonic() < latest:
            if store.add(_key(), 0):
                return False
            time.sleep(0.05)
        return bool(store.add(_key(), 1) == 1)
    except RuntimeError:  # no store yet, or none any more: better told twice than not at all
        return True


def fails_everywhere(what: str) -> bool:
    """Whether all processes of a launch meet a failure, within a minute of one another.

    Counted in the store: a barrier could meet one at which another process waits elsewhere.

    Args:
        what: the name of what has failed, the same in all processes, used once.
    """
    if alone():
        return world_size() == 1
    latest = time.monotonic() + SAME_FAILURE
    try:
        store, key = _connect(seconds=5), f"{_key()}/{what}"
        count = store.add(key, 1)
        while count < int(os.environ["WORLD_SIZE"]) and time.monotonic() < latest:
            time.sleep(0.05)
            count = store.add(key, 0)
    except RuntimeError:  # the process that runs the store has ended
        return False
    return count == int(os.environ["WORLD_SIZE"])


@contextlib.contextmanager
def watching() -> Iterator[None]:
    """End this process when another one has failed, even if it waits for that one."""
    stop = threading.Event()
    thread = threading.Thread(target=_watch, args=(stop,), daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join(timeout=POLL)


def _watch(stop: threading.Event) -> None:
    try:
        store = _connect(seconds=1800)
        while not stop.wait(POLL):
            if store.add(_key(), 0) and not stop.wait(PATIENCE):
                os._exit(1)
    except RuntimeError:  # the store is gone: the connections of the processes will tell
        return


def _connect(seconds: float) -> TCPStore:
    host, port = os.environ.get("MASTER_ADDR", "localhost"), os.environ.get("MASTER_PORT", "29500")
    return TCPStore(
        host,
        int(port),
        is_master=False,
        wait_for_workers=False,
        timeout=timedelta(seconds=seconds),
    )


def _key() -> str:
    """The counter's key, one for each restart by torchrun."""
    return f"mdistiller/failures/{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}"
