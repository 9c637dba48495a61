"""SIGKILL at random moments, half of them in the middle of an operation on a file."""

from __future__ import annotations

import os
import random
import signal
import time
from collections.abc import Callable
from multiprocessing.process import BaseProcess

from mdistiller.cli._faults.work import Outcome, Work

_OPERATIONS = ("fsync", "replace", "link", "unlink")


def kills(work: Work) -> Outcome:
    """Kill and continue until a run is through, run after run; compare each with the whole one."""
    draw = random.Random(work.seed)
    outcome = Outcome("kills survived")
    wanted = 6 if work.quick else 60
    started = time.perf_counter()
    work.finish("timed")
    length = time.perf_counter() - started
    outcome.losses += work.differences("timed")
    number, resumed_within = 0, 0
    while outcome.tried < wanted or not outcome.tried:
        number += 1
        name = f"killed{number}"
        fruitless, code = 0, None
        while code is None or code < 0:
            calm = outcome.tried >= wanted or fruitless > 20
            code = _attempt(work, name, draw, length, calm)
            outcome.tried += code == -signal.SIGKILL
            fruitless += 1
        if code:
            outcome.losses.append(f"{name}: ended with {code}\n{work.output(name)[-2000:]}")
            return outcome
        resumed_within += work.output(name).count(", within epoch")
        outcome.losses += work.differences(name)
        work.forget(name)
    if not resumed_within:
        outcome.losses.append("no run was continued within an epoch")
    return outcome


def _attempt(work: Work, name: str, draw: random.Random, length: float, calm: bool) -> int:
    """One start of a run; its exit code."""
    if calm:
        return work.finish(name)
    if draw.random() < 0.5:
        process = work.start(
            name, before=die_in_operation(draw.randrange(3, 90), draw.random() < 0.5)
        )
        process.join()
    else:
        process = work.start(name)
        kill_after(process, draw.uniform(0.1, 0.8) * length)
    return process.exitcode or 0


def kill_after(process: BaseProcess, seconds: float, number: int = signal.SIGKILL) -> None:
    """Send a signal to a process after a while, unless it has ended, and wait for its end."""
    process.join(seconds)
    if process.exitcode is None and process.pid is not None:
        os.kill(process.pid, number)
    process.join()


def die_in_operation(count: int, before: bool) -> Callable[[], None]:
    """A trap: the process dies just before, or just after, its `count`-th operation on a file."""

    def lay() -> None:
        left = count

        def deadly(original: Callable[..., object]) -> Callable[..., object]:
            def call(*args: object, **kwargs: object) -> object:
                nonlocal left
                left -= 1
                if left == 0 and before:
                    os.kill(os.getpid(), signal.SIGKILL)
                result = original(*args, **kwargs)
                if left == 0:
                    os.kill(os.getpid(), signal.SIGKILL)
                return result

            return call

        for name in _OPERATIONS:
            setattr(os, name, deadly(getattr(os, name)))

    return lay
