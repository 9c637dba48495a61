"""Several runs in one process, in lock-step: a batch is made once, and the teacher runs once.

Each run has a thread of its own, of which one works at a time. A run hands on its turn before
every batch and every epoch, and the run that is furthest behind goes next: so all are within a step
of one another, and what one has made for a step the others find. What is global in a process,
random generators and standard output, is each run's own while it works. A run computes what it
would compute alone, to the bit.

Shared are batches (:class:`SharedLoader`), the outputs of a frozen teacher for them
(:class:`SharedTeacher`), and the cache of its logits (DISTILLER.TEACHER_CACHE).
"""

from __future__ import annotations

import copy
import functools
import io
import sys
import threading
import time
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import replace
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from mdistiller.distillers import Distiller
from mdistiller.engine.checkpoints.resume import add_waited, random_state, set_random_state
from mdistiller.engine.frozen_teacher.cache import TeacherCache
from mdistiller.engine.frozen_teacher.cacheable import is_wanted
from mdistiller.engine.frozen_teacher.fingerprint import computation, teacher_digest
from mdistiller.engine.frozen_teacher.frozen import is_frozen, named_tensors
from mdistiller.engine.stages import STRIDE

T = TypeVar("T")
Progress = tuple[int, int, int]
"""0 in an initialisation stage or before, 1 in the main one; epoch; step."""

_thread = threading.local()


def current_turn() -> Turn | None:
    """The turn of the run in this thread; None of a run that trains alone."""
    turn: Turn | None = getattr(_thread, "turn", None)
    return turn


class Outcome(Generic[T]):
    """What a run has come to: its `value`, or the `error` that ended it."""

    def __init__(self) -> None:
        self.value: T | None = None
        self.error: BaseException | None = None

    def reraise(self) -> None:
        """Raise the error, if there is one."""
        if self.error is not None:
            raise self.error


def run_together(jobs: Sequence[Callable[[], T]], device: torch.device) -> list[Outcome[T]]:
    """Call the jobs in threads that take turns; each one's failure is its own.

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
    return outcomes


class Ambient:
    """What is global in a process, as a run left it."""

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
    """Whose turn it is, and what its runs share."""

    def __init__(self, device: torch.device):
        self.device = device
        self.expected = 0
        self._changed = threading.Condition()
        self._waiting: dict[int, Progress] = {}
        self._working: int | None = None
        self._ended = 0
        self._stopped = False
        self.shared: dict[Hashable, Any] = {}

    def wait(self, number: int, progress: Progress) -> None:
        """Hand on the turn, until no other run is behind `progress`."""
        with self._changed:
            if self._working == number:
                self._working = None
            self._waiting[number] = progress
            self._choose()
            while self._working != number:
                if self._stopped:
                    raise GroupStoppedError
                self._changed.wait()

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


class SharedLoader:
    """One run's view of a loader that several runs share; everything else is the loader's.

    Args:
        loader: a training loader whose epochs can be begun anywhere (`set_epoch(epoch, start)`).
        turn: of the run.
        memo: the latest batch, the same dict for all views.
    """

    def __init__(self, loader: Any, turn: Turn, memo: dict[str, Any]):
        self._loader, self._turn, self._memo = loader, turn, memo
        self._epoch, self._start, self._begun = 0, 0, True

    @property  # type: ignore[misc]
    def __class__(self) -> type:  # type: ignore[override]
        """To `isinstance`, it is of the loader's class."""
        return type(self._loader)

    def __len__(self) -> int:
        return len(self._loader)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        if self._epoch and self._loader.epoch != self._epoch:
            self._memo.clear()
            self._loader.set_epoch(self._epoch)
        return getattr(self._loader, name)

    @property
    def epoch(self) -> int:
        """The epoch of this run."""
        return self._epoch

    def merge_last_batch(self) -> None:
        """As the loader's, for this run and those that merge it as well."""
        loader, key = copy.copy(self._loader), ("joined", id(self._loader))
        loader.merge_last_batch()
        self._loader, self._memo = self._turn.share(key, lambda: (loader, {}))

    def set_epoch(self, epoch: int, start: int = 0) -> None:
        """Begin an epoch, once no other run is in an earlier one."""
        self._turn.wait((*_stage_epoch(epoch), start))
        self._epoch, self._start, self._begun = epoch, start, False

    def __iter__(self) -> Iterator[Any]:
        if self._begun:
            self.set_epoch(self._epoch + 1)
        self._begun = True
        for step in range(self._start, len(self)):
            self._turn.wait((*_stage_epoch(self._epoch), step))
            yield self._batch(step)

    def _batch(self, step: int) -> Any:
        """The batch of a step, made by the first run that comes to it."""
        memo, at = self._memo, (self._epoch, step)
        if memo.get("at") != at or _versions(memo["batch"]) != memo["versions"]:
            if memo.get("next") != at:
                self._loader.set_epoch(self._epoch, step)
                memo["batches"] = iter(self._loader)
            batch = _moved(next(memo["batches"]), self._turn.group.device)
            _mark(batch[0], at)
            memo.update(at=at, batch=batch, versions=_versions(batch), next=(self._epoch, step + 1))
        return memo["batch"]


def _stage_epoch(epoch: int) -> tuple[int, int]:
    return (0, epoch) if epoch > STRIDE else (1, epoch)


def _moved(batch: Any, device: torch.device) -> Any:
    if isinstance(batch, Tensor):
        return batch.to(device, non_blocking=True)
    return type(batch)(_moved(item, device) for item in batch)


def _mark(images: Any, at: tuple[int, ...]) -> None:
    """Note on a batch's images which they are."""
    if isinstance(images, Tensor):
        images.batch_of_group = at  # type: ignore[attr-defined]
    else:
        for view, image in enumerate(images):
            _mark(image, (*at, view))


class SharedTeacher:
    """A frozen teacher that runs once for a batch, whichever runs ask for it.

    Args:
        teacher: the network, or what :attr:`Distiller.frozen` runs in its place; everything but the
            call is its.
        plain: whether it is the network itself.
    """

    def __init__(self, teacher: Any, plain: bool):
        self._teacher, self.plain = teacher, plain
        self._outputs: dict[tuple[int, ...], tuple[Any, list[int]]] = {}

    def __getattr__(self, name: str) -> Any:
        if name == "_teacher":  # while it is unpickled or copied
            raise AttributeError(name)
        return getattr(self._teacher, name)

    def refresh(self) -> None:
        """Take over the teacher's weights before the next forward."""
        if not self.plain:
            self._teacher.refresh()

    def __call__(self, image: Tensor) -> Any:
        at = getattr(image, "batch_of_group", None)
        if at is None:
            return self._teacher(image)
        output, versions = self._outputs.get(at, (None, None))
        if versions is None or _versions(output) != versions:  # a method has written into it
            self._outputs = {key: self._outputs[key] for key in self._outputs if key[:2] == at[:2]}
            output = self._teacher(image)
            self._outputs[at] = (output, _versions(output))
        return _copied(output)


def _versions(value: Any) -> list[int]:
    """Which change with every change of a tensor in nested containers."""
    return [leaf._version for leaf in tree_leaves(value) if isinstance(leaf, Tensor)]


def _copied(value: Any) -> Any:
    """The same tensors in containers of their own, so that a method may change these."""
    return tree_map(lambda leaf: leaf, value)


def shared_data(key: Hashable, make: Callable[[], Any]) -> Any:
    """The data of a run, which those of its group share whose `key` is equal."""
    turn = current_turn()
    if turn is None:
        return make()
    memo: dict[str, Any]
    data, memo = turn.share(("data", key), lambda: (make(), {}))
    return replace(data, train=SharedLoader(data.train, turn, memo))


def measured_once(distiller: Distiller, measure: Callable[[], T]) -> T:
    """What `measure` says of the teacher, called once for the runs that share it."""
    turn = current_turn()
    if turn is None or not isinstance(distiller.frozen, SharedTeacher):
        return measure()
    return turn.share(("accuracy", id(distiller.frozen)), measure)


def share_teacher(distiller: Distiller, cfg: Any, device: torch.device) -> None:
    """Have the runs of this thread's group share the teacher's outputs, where it is frozen."""
    turn, teacher = current_turn(), distiller.teacher
    if turn is None or teacher is None or distiller.watches_teacher or not is_frozen(distiller):
        return
    forward, plain = distiller.frozen or teacher, distiller.frozen is None
    key = ("teacher", teacher_digest(teacher), computation(distiller, cfg, device))
    shared, first = turn.share(key, lambda: (SharedTeacher(forward, plain), teacher))
    for (_, tensor), (_, stored) in zip(named_tensors(teacher), named_tensors(first), strict=True):
        tensor.data = stored.data  # its weights are in memory once
    for part in distiller.modules():
        if isinstance(part, Distiller) and part.teacher is teacher:
            part.frozen = shared
    if not is_wanted(cfg):
        turn.share(("runs for every batch", id(shared)), lambda: True)


def share_cache(trainer: Any) -> None:
    """Have the runs of this thread's group share the cache of the teacher's logits."""
    turn, shared = current_turn(), trainer.model.frozen
    if turn is None or not isinstance(shared, SharedTeacher):
        return
    always = ("runs for every batch", id(shared))
    for place, hook in enumerate(trainer.hooks):
        if isinstance(hook, TeacherCache):
            settings = [trainer.cfg.DISTILLER[f"TEACHER_CACHE{end}"] for end in ("", "_GB", "_DIR")]
            key = ("cache", id(shared), *settings)
            trainer.hooks[place] = cache = turn.share(key, functools.partial(_itself, hook))
            cache.teacher_runs = lambda: always in turn.group.shared


def _itself(value: T) -> T:
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
