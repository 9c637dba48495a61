"""What the attempts at a trial amount to: which count, which hold it, whose process still lives."""

from __future__ import annotations

import os
import socket
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from optuna.trial import FrozenTrial, TrialState

GRACE = 120.0  # seconds without a sign of life after which another machine's attempt is dead
DEATHS = 3  # that many attempts that die within an epoch are a failure


@dataclass
class Status:
    """Where a trial stands: "open", "running", "done", "pruned" or "failed"."""

    state: str
    results: list[dict[str, Any]]  # of its runs, once done
    params: dict[str, Any]  # of a searched point
    error: str = ""


def status(attempts: list[FrozenTrial], forgiven: int) -> Status:
    for attempt in attempts:
        if attempt.state in (TrialState.COMPLETE, TrialState.PRUNED):
            results = attempt.user_attrs.get("results", [])
            state = "done" if attempt.state == TrialState.COMPLETE else "pruned"
            return Status(state, results, attempt.params)
    attempts = counting(attempts, forgiven)
    for attempt in attempts:
        if holds(attempt):
            error = attempt.user_attrs.get("error", "")
            return Status("failed" if error else "running", [], attempt.params, error)
    deaths = [a for a in attempts if _died(a) and not a.intermediate_values]
    if len(deaths) >= DEATHS:
        error = f"its process died {len(deaths)} times within an epoch (out of memory?)"
        return Status("failed", [], {}, error)
    return Status("open", [], {})


def counting(attempts: list[FrozenTrial], forgiven: int) -> list[FrozenTrial]:
    """Attempts without those that failed and are forgiven."""
    return [a for a in attempts if a.number > forgiven or a.state != TrialState.FAIL]


def holds(attempt: FrozenTrial) -> bool:
    """Whether an attempt keeps others from the trial: it is done, failed, or alive."""
    if attempt.state.is_finished():
        return attempt.state != TrialState.FAIL or "error" in attempt.user_attrs
    return _alive(attempt)


def _died(attempt: FrozenTrial) -> bool:
    if attempt.state.is_finished():
        return attempt.user_attrs.get("end") == "died"
    return not _alive(attempt)


def _alive(attempt: FrozenTrial) -> bool:
    """Whether a running attempt's process shows signs of life."""
    attrs = attempt.user_attrs
    if attrs["place"] == place() and not _process_exists(attrs["pid"]):
        return False
    return bool(time.time() - attrs["alive"] < GRACE)


def place() -> str:
    """Where process numbers mean the same: this machine, and on Linux its space of them."""
    try:
        space = os.readlink("/proc/self/ns/pid")
    except OSError:
        space = ""
    return f"{socket.gethostname()} {space}".strip()


def _process_exists(pid: int) -> bool:
    if os.name != "posix":  # elsewhere signal 0 is no harmless question
        return True
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    try:  # one that ended and was not waited for still has its number
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return True
    return state not in "ZX"
