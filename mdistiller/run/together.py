"""Several runs in one process, in lock-step.

Each run has a thread, and one thread works at a time. A run passes its turn on before every batch
and every epoch, and the run furthest behind goes next: so all are within a step of one another, and
what one has made for a step is there for the others (`sharing.py`). Process-wide state (random
generators, standard output) is saved and restored at each change of turn. A run computes the same
bits as alone.
"""

from __future__ import annotations

import io
import itertools
import sys
import threading
import time
from collections.abc import Callable, Hashable, Sequence
from typing import Any, Generic, TypeVar

import torch

from mdistiller.distributed.failure import fails_everywhere
from mdistiller.engine.checkpoints.resume import add_waited, random_state, set_random_state

T = TypeVar("T")
Progress = tuple[int, int, int]
"""0 in an initialisation stage or before, 1 in the main one; epoch; step."""

_thread = threading.local()
_serials = itertools.count()


def current_turn() -> Turn | None:
    """The turn of this thread's run; None for a run that trains alone."""
    turn: Turn | None = getattr(_thread, "turn", None)
    return turn


class Outcome(Generic[T]):
    """The result of a run: its `value`, or the `error` that ended it."""

    def __init__(self) -> None:
        self.value: T | None = None
        self.error: BaseException | None = None

    def reraise(self) -> None:
        """Raise the error, if there is one."""
        if self.error is not None:
            raise self.error


def run_together(jobs: Sequence[Callable[[], T]], device: torch.device) -> list[Outcome[T]]:
    """Call the jobs in threads that take turns; a failure ends only its own job.

    Args:
        jobs: each trains one run.
        device: on which all train.
    """
    group = Group(device)
    outcomes: list[Outcome[T]] = [Outcome() for _ in jobs]

    def work(turn: Turn, job: Callable[[], T], outcome: Outcome[T]) -> None:
        _thread.turn = turn
        try:
            turn.wait((0, 0, 0))
            outcome.value = job()
        except BaseException as error:
            outcome.error = error
            if isinstance(error, Exception) and not fails_everywhere(turn.name):
                # another process waits within this run: its sums would mix with the next one's
                group.broken_by = error
                group.stop()
        finally:
            turn.end()

    threads = [
        threading.Thread(target=work, args=(Turn(group, number), job, outcome), daemon=True)
        for number, (job, outcome) in enumerate(zip(jobs, outcomes, strict=True))
    ]
    group.expected = len(threads)
    ambient = Ambient(device)
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    except BaseException:  # a signal between two steps: before the first one, or after the last
        group.stop()
        for thread in threads:
            thread.join()
        raise
    finally:
        ambient.restore()
    if group.broken_by is not None:
        raise group.broken_by
    return outcomes


class Ambient:
    """Process-wide state (random generators, standard output) as a run left it."""

    def __init__(self, device: torch.device):
        self.device, self.random = device, random_state(device)
        self.streams = sys.stdout, sys.stderr

    def restore(self) -> None:
        """Put it back."""
        set_random_state(self.random, self.device)
        sys.stdout, sys.stderr = self.streams


class GroupStoppedError(KeyboardInterrupt):
    """The whole group was ended from outside."""


class Group:
    """A group of runs: whose turn it is, and the objects they share."""

    def __init__(self, device: torch.device):
        self.device = device
        self.serial = next(_serials)
        self.expected = 0
        self._changed = threading.Condition()
        self._waiting: dict[int, Progress] = {}
        self._working: int | None = None
        self._ended = 0
        self._stopped = False
        self.broken_by: Exception | None = None  # what ended a run in this process alone
        self.shared: dict[Hashable, Any] = {}

    def wait(self, number: int, progress: Progress) -> None:
        """Hand on the turn, until no other run is behind `progress`."""
        with self._changed:
            if self._working == number:
                self._working = None
            self._waiting[number] = progress
            self._choose()
            while self._working != number and not self._stopped:
                self._changed.wait()
            if self._stopped:
                raise GroupStoppedError

    def end(self, number: int) -> None:
        """Take a run out of the group."""
        with self._changed:
            self._ended += 1
            self._waiting.pop(number, None)
            if self._working == number:
                self._working = None
            self._choose()

    def stop(self) -> None:
        """End all runs at their next turn."""
        with self._changed:
            self._stopped = True
            self._changed.notify_all()

    def _choose(self) -> None:
        """Give the turn to the run that is furthest behind, once all wait for it."""
        everyone = len(self._waiting) == self.expected - self._ended
        if self._working is None and self._waiting and everyone:
            self._working = min(self._waiting, key=lambda n: (self._waiting[n], n))
            del self._waiting[self._working]
            self._changed.notify_all()


class Turn:
    """A run's place in its group."""

    def __init__(self, group: Group, number: int):
        self.group, self.number = group, number
        self.name = f"{group.serial}/{number}"  # the same in all processes of a launch

    def wait(self, progress: Progress) -> None:
        """Let the runs behind `progress` go first."""
        ambient, began = Ambient(self.group.device), time.perf_counter()
        self.group.wait(self.number, progress)
        add_waited(time.perf_counter() - began)
        ambient.restore()

    def end(self) -> None:
        """Leave the group."""
        self.group.end(self.number)

    def alone(self, function: Callable[..., T]) -> Callable[..., T]:
        """`function` for what a run does by itself, such as training its teacher."""

        def call(*args: Any, **more: Any) -> T:
            _thread.turn = None
            try:
                return function(*args, **more)
            finally:
                _thread.turn = self

        return call

    def share(self, key: Hashable, make: Callable[[], T]) -> T:
        """What the first run of the group made under `key`."""
        if key not in self.group.shared:
            self.group.shared[key] = make()
        value: T = self.group.shared[key]
        return value


class PrefixedStream(io.TextIOBase):
    """A text stream whose lines begin with the name of a run."""

    def __init__(self, stream: Any, name: str):
        self.stream, self.prefix, self._begun = stream, f"{name}: ", False

    def write(self, text: str) -> int:
        """Write text, every line of it behind the prefix."""
        for line in text.splitlines(keepends=True):
            self.stream.write(line if self._begun else self.prefix + line)
            self._begun = not line.endswith("\n")
        return len(text)

    def flush(self) -> None:
        self.stream.flush()
