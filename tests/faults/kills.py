"""SIGKILL at random moments, half of them in the middle of an operation on a file."""

from __future__ import annotations

import os
import random
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from multiprocessing.process import BaseProcess
from typing import Any

from faults.work import Outcome, Work

_OPERATIONS = ("fsync", "replace", "link", "unlink")


@dataclass
class Variant:
    """A run to kill: what is other than in the usual one, and how often.

    Args:
        share: of the kills.
    """

    name: str
    share: float
    settings: dict[str, Any] = field(default_factory=dict)


VARIANTS = (
    Variant("killed", 0.5),
    Variant(
        "dot with a cache",
        0.25,
        {
            "SOLVER__TRAINER": "dot",
            "DISTILLER__TEACHER_CACHE": "disk",
            "DATASET__AUGMENT": "none",
        },
    ),
    Variant(
        "bank and workers",
        0.25,
        {
            "DISTILLER__TYPE": "CRD",
            "CRD__NCE__K": 16,
            "DATASET__LOADER": "workers",
            "DATASET__NUM_WORKERS": 1,
        },
    ),
)


def kills(work: Work) -> Outcome:
    """Kill and continue until a run is through, run after run; compare each with the whole one."""
    outcome, draw = Outcome("kills survived"), random.Random(work.seed)
    within = 0
    for variant in VARIANTS:
        wanted = outcome.tried + int(variant.share * (4 if work.quick else 60))
        within += _kill_often(work, variant, wanted, draw, outcome)
    if not within:
        outcome.losses.append("no run was continued within an epoch")
    return outcome


def _kill_often(
    work: Work, variant: Variant, wanted: int, draw: random.Random, outcome: Outcome
) -> int:
    """Until enough kills are `tried`; returns how many times a run went on within an epoch."""
    started, settings = time.perf_counter(), variant.settings
    whole = f"whole {variant.name}"
    if work.finish(whole, **{**settings, "LOG__SAVE_EVERY_MINUTES": 0.0}):
        outcome.losses.append(f"{whole}: failed\n{work.output(whole)[-2000:]}")
        return 0
    length = time.perf_counter() - started
    number, resumed_within = 0, 0
    while outcome.tried < wanted:
        number += 1
        name = f"{variant.name}{number}"
        fruitless, code = 0, None
        while code is None or code < 0:
            calm = outcome.tried >= wanted or fruitless > 20
            code = _attempt(work, name, settings, draw, length, calm)
            outcome.tried += code == -signal.SIGKILL
            fruitless += 1
        if code:
            outcome.losses.append(f"{name}: ended with {code}\n{work.output(name)[-2000:]}")
            return resumed_within
        resumed_within += work.output(name).count(", within epoch")
        outcome.losses += work.differences(name, work.run_folder(whole))
        work.forget(name)
    return resumed_within


def _attempt(
    work: Work,
    name: str,
    settings: dict[str, Any],
    draw: random.Random,
    length: float,
    calm: bool,
) -> int:
    """One start of a run; its exit code."""
    if calm:
        return work.finish(name, **settings)
    if draw.random() < 0.5:
        trap = die_in_operation(draw.randrange(3, 90), draw.random() < 0.5)
        process = work.start(name, before=trap, **settings)
        process.join()
    else:
        process = work.start(name, **settings)
        kill_after(process, draw.uniform(0.1, 1.2) * length)
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
