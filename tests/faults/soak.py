"""Training, dying and going on for a long time."""

from __future__ import annotations

import os
import random
import signal
import statistics
import time
from collections.abc import Sequence
from pathlib import Path

from faults.processes import join, start_pair
from faults.work import Outcome, Work

_YOUNG = 3.0  # seconds after which a process is first measured
_LIFE = (4.0, 20.0)
_LONG = {"SOLVER__EPOCHS": 150, "SOLVER__LR_DECAY_STAGES": [75], "LOG__KEEP_CHECKPOINTS": 2}
GROWTH = 1.1
"""Times the memory that a process may gain in its life, and from the first third to the last."""


def memory_and_files(process: int) -> tuple[float, int]:
    """MB in memory, and open files, of a process (Linux)."""
    pages = int(Path(f"/proc/{process}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 1e6, len(os.listdir(f"/proc/{process}/fd"))


def soak(work: Work, minutes: float) -> Outcome:
    """Kill and continue runs of two processes until the time is up; then finish and compare."""
    outcome, draw = Outcome("soak: lives survived"), random.Random(work.seed)
    if any(join(start_pair(work, "pair", **_LONG, LOG__SAVE_EVERY_MINUTES=0.0))):
        outcome.losses.append(f"the undisturbed pair failed\n{work.output('pair')[-3000:]}")
        return outcome
    whole, until = work.run_folder("pair"), time.monotonic() + 60 * minutes
    number, runs, lives = 0, 0, []
    while time.monotonic() < until:
        name = f"soak{number}"
        processes = start_pair(work, name, **_LONG, LOG__SAVE_EVERY_MINUTES=0.05)
        time.sleep(_YOUNG)
        first = _measure(processes)
        for process in processes:
            process.join(draw.uniform(*_LIFE) / 2)
        last = _measure(processes)
        if first and last:
            lives.append((*first, *last))
            kind = draw.choice((signal.SIGKILL, signal.SIGTERM))
            chosen = processes if kind == signal.SIGTERM else [draw.choice(processes)]
            for process in chosen:
                os.kill(process.pid or 0, kind)
            outcome.tried += 1
        codes = join(processes)
        if codes == [0, 0]:
            outcome.losses += _compare(work, name, whole)
            number, runs = number + 1, runs + 1
        elif first and not last:
            outcome.losses.append(f"{name}: ended with {codes}\n{work.output(name)[-3000:]}")
            number += 1
    if any(join(start_pair(work, name, **_LONG))):
        outcome.losses.append(f"{name}: not continued\n{work.output(name)[-3000:]}")
    outcome.losses += _compare(work, name, whole)
    outcome.losses += _growth(lives)
    print(f"{runs + 1} runs of {_LONG['SOLVER__EPOCHS']} epochs finished in {minutes:g} minutes")
    return outcome


def _measure(processes: Sequence[object]) -> tuple[float, int] | None:
    """Of the larger of the processes, None if one has ended."""
    try:
        found = [memory_and_files(process.pid) for process in processes]  # type: ignore[attr-defined]
    except (OSError, IndexError):
        return None
    return max(memory for memory, _ in found), max(files for _, files in found)


def _compare(work: Work, name: str, whole: Path) -> list[str]:
    found = work.differences(name, whole)
    work.forget(name)
    return found


def _growth(lives: Sequence[tuple[float, int, float, int]]) -> list[str]:
    """Says what memory and open files did; returns what grew."""
    if len(lives) < 3:
        return []
    third = max(1, len(lives) // 3)
    losses = []
    for kind, young, old in (("MB in memory", 0, 2), ("open files", 1, 3)):
        inside = statistics.median(life[old] / life[young] for life in lives)
        early, late = (
            statistics.median(life[old] for life in part)
            for part in (lives[:third], lives[-third:])
        )
        print(
            f"{kind}: {early:.0f} in the first third of {len(lives)} lives, {late:.0f} in the "
            f"last; within a life times {inside:.3f}"
        )
        if max(inside, late / early) > GROWTH:
            losses.append(f"{kind} grew")
    return losses
