"""Where the time of a training step goes: a clock that its parts are entered on and left."""

from __future__ import annotations

import contextlib
import functools
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch

PARTS = ("data", "teacher", "student forward", "loss", "backward", "optimizer", "bookkeeping")


class Clock:
    """Time by part. Of parts within another the inner one counts, so the sum is the whole.

    On a GPU every change of part waits for the device: parts then do not overlap, and the whole
    is longer than an undisturbed step.
    """

    def __init__(self, device: str):
        self.cuda = device.startswith("cuda")
        self.tick = time.process_time if device == "cpu" else time.perf_counter
        self.spent: defaultdict[str, float] = defaultdict(float)
        self._stack: list[str] = []
        self._since = 0.0

    def _charge(self) -> None:
        if self.cuda:
            torch.cuda.synchronize()
        now = self.tick()
        if self._stack:
            self.spent[self._stack[-1]] += now - self._since
        self._since = now

    @contextlib.contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Time within goes to `name`."""
        self._charge()
        self._stack.append(name)
        try:
            yield
        finally:
            self._charge()
            self._stack.pop()

    def timed(self, name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        """`call`, on the clock."""

        @functools.wraps(call)
        def timed(*args: Any, **kwargs: Any) -> Any:
            with self.part(name):
                return call(*args, **kwargs)

        return timed

    def iterated(self, name: str, items: Iterable[Any]) -> Iterator[Any]:
        """`items`, the making of each on the clock."""
        iterator = iter(items)
        while True:
            with self.part(name):
                try:
                    item = next(iterator)
                except StopIteration:
                    return
            yield item


def put_on_clock(trainer: Any, clock: Clock) -> None:
    """Have the parts of a trainer's epochs timed from now on; the trainer is spoilt by it."""
    model, loader = trainer.model, trainer.train_loader
    items = type(loader).__iter__

    class Timed(type(loader)):  # type: ignore[misc]
        def __iter__(self) -> Iterator[Any]:
            return clock.iterated("data", items(self))

    loader.__class__ = Timed
    for owner, method, name in (
        (trainer, "batch_inputs", "data"),
        (model, "forward", "loss"),
        (model.student, "forward", "student forward"),
        (model, "run_teacher", "teacher"),
        (trainer, "optimize", "backward"),
        (trainer.optimizer, "zero_grad", "optimizer"),
        (trainer.optimizer, "step", "optimizer"),
    ):
        setattr(owner, method, clock.timed(name, getattr(owner, method)))
    if model.teacher is not None:  # of methods that call it directly
        model.teacher.forward = clock.timed("teacher", model.teacher.forward)
    trainer.train_epoch = clock.timed("bookkeeping", trainer.train_epoch)
